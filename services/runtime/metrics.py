"""Metrics in Prometheus' format, over HTTP: each module declares its own, this serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import start_http_server


@contextmanager
def served_metrics(listen: str) -> Iterator[int]:
    """Answer ``GET /metrics`` while the block runs.

    Args:
        listen: ``host:port``; port 0 lets the system choose. Empty: nothing is served.

    Yields:
        The port; 0 if nothing is served.

    Raises:
        OSError: The address is taken.
    """
    if not listen:
        yield 0
        return
    host, _, port = listen.rpartition(":")
    server, thread = start_http_server(int(port), host)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
