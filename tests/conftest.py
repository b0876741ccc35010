"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator

import hypothesis
import pytest
import redis

from services.local.model import ensure_demo_model
from services.store import Store, open_store
from services.store.embedded import EmbeddedOptions, EmbeddedValkey

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile(
    "chunkserve", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("chunkserve")

# A job in the background is started with SIGINT ignored, and its children are with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[EmbeddedValkey]:
    """A real Valkey server of this test run, on a unix socket."""
    with EmbeddedValkey(EmbeddedOptions(maxmemory_bytes=1 << 30)) as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: EmbeddedValkey) -> Iterator[str]:
    """Store URL of an empty server. Afterwards every key that the test left must have a TTL."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
        yield valkey_server.url
        immortal = [key for key in client.scan_iter(count=1000) if client.ttl(key) == -1]
        client.flushall()
    assert immortal == [], "every key must have a TTL"


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[Store]:
    """The store on that server."""
    opened = open_store(valkey_url)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of the demo model; fetched and converted if it is not there."""
    return os.environ.get("CHUNKSERVE_TEST_MODEL") or str(ensure_demo_model())
