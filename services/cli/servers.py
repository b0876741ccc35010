"""The commands that run one process of a cluster until it is stopped."""

from __future__ import annotations

from services.cli.lazy import load


def gateway() -> None:
    """Run a gateway: the door that clients talk to."""
    run_service("gateway")


def prefill() -> None:
    """Run a prefill worker: computes, compresses and stores the KV cache of prompts."""
    run_service("prefill")


def decode() -> None:
    """Run decode workers on Ray: they answer from stored KV caches."""
    run_service("decode")


def compress() -> None:
    """Run a compression worker: makes stored sessions smaller, on demand or if memory is short."""
    run_service("compress")


def run_service(name: str) -> None:
    """Run ``services.<name>.__main__.main()``."""
    load(f"services.{name}.__main__", extra="services").main()
