"""A gateway with fake workers on the real store."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from services.store import Store
from tests.fakes import FakeCluster


@pytest.fixture
async def cluster(store: Store) -> AsyncIterator[FakeCluster]:
    """A gateway without workers."""
    async with FakeCluster(store) as running:
        yield running


@pytest.fixture
def unused_port() -> int:
    """A loopback port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
