"""The health probe against real servers."""

from __future__ import annotations

import asyncio
import sys

import pytest

from services.runtime import probe
from services.runtime.server import GrpcServer


async def run_probe(*arguments: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.runtime.probe", *arguments, stdout=asyncio.subprocess.PIPE
    )
    stdout, _ = await process.communicate()
    return process.returncode, stdout.decode()


async def test_a_serving_server_is_healthy(server: GrpcServer) -> None:
    port = await server.start()

    assert await run_probe(f"127.0.0.1:{port}") == (0, "SERVING\n")


async def test_a_draining_server_is_not_healthy(server: GrpcServer) -> None:
    port = await server.start()
    await server.drain()

    assert await run_probe(f"127.0.0.1:{port}") == (1, "NOT_SERVING\n")


def test_no_server_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    code = probe.main(["127.0.0.1:1"])

    assert code == 1
    assert capsys.readouterr().out.startswith("UNAVAILABLE: ")


def test_a_missing_address_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    code = probe.main([])

    assert code == 2
    assert "usage" in capsys.readouterr().err


async def test_the_probe_needs_no_torch() -> None:
    code = "import sys, services.runtime.probe; sys.exit('torch' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)

    assert await process.wait() == 0
