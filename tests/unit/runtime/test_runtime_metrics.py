"""Metrics over HTTP."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import Counter

from services.runtime.metrics import served_metrics

_SEEN = Counter("chunkserve_test_seen", "Counts what this test sees.")


def get(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def test_what_modules_count_is_served_while_the_block_runs():
    _SEEN.inc(3)

    with served_metrics("127.0.0.1:0") as port:
        before = get(port)
        _SEEN.inc()
        after = get(port)

    assert "# HELP chunkserve_test_seen_total Counts what this test sees." in before
    assert "chunkserve_test_seen_total 3.0" in before
    assert "chunkserve_test_seen_total 4.0" in after
    with pytest.raises(urllib.error.URLError):
        get(port)


def test_nothing_is_served_without_an_address():
    with served_metrics("") as port:
        assert port == 0


def test_an_address_that_is_taken_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with pytest.raises(OSError, match="in use"), served_metrics(address):
            pass
