"""Store URLs, and what errors of the server become."""

from __future__ import annotations

import pytest
from redis import exceptions

from services.runtime.errors import InvalidRequestError, OverloadedError, UnavailableError
from services.store import open_store
from services.store.connect import parse_store_url
from services.store.failures import service_error, ttl_ms


@pytest.mark.parametrize(
    ("url", "where", "is_cluster"),
    [
        ("redis://example:7000/0", "example:7000", False),
        ("redis://", "localhost:6379", False),
        ("rediss://user:secret@example:7000/2?ssl_cert_reqs=none", "example:7000", False),
        ("unix://:secret@/run/valkey.sock?db=1", "unix:/run/valkey.sock", False),
        ("redis+cluster://user:secret@example", "example:6379", True),
        ("rediss+cluster://example:7000?protocol=2", "example:7000", True),
    ],
)
def test_urls(url: str, where: str, is_cluster: bool):
    endpoint = parse_store_url(url)

    assert (endpoint.where, endpoint.is_cluster) == (where, is_cluster)
    assert "+cluster" not in endpoint.url
    assert "secret" not in repr(endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example:6379",
        "http://:secret@example",
        "redis://:secret@example:port",
        "redis://:secret@example/0?socket_timeout=soon",
        "redis://:secret@example/0?unknown_option=1",
        "unix+cluster://:secret@/run/valkey.sock",
    ],
)
def test_malformed_urls_are_refused_without_showing_the_password(url: str):
    with pytest.raises(ValueError, match="URL") as caught:
        open_store(url)

    assert "secret" not in str(caught.value)
    assert "redis+cluster://" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (exceptions.ConnectionError("Error 111"), UnavailableError, "is away (Error 111)"),
        (exceptions.TimeoutError("slow"), UnavailableError, "is away (slow)"),
        (ConnectionResetError("reset"), UnavailableError, "is away (reset)"),
        (TimeoutError("slow"), UnavailableError, "is away (slow)"),
        (exceptions.BusyLoadingError("LOADING"), UnavailableError, "starting up"),
        (exceptions.ReadOnlyError("READONLY"), UnavailableError, "changing roles"),
        (exceptions.ClusterDownError("CLUSTERDOWN"), UnavailableError, "cannot serve now"),
        (exceptions.MasterDownError("MASTERDOWN"), UnavailableError, "cannot serve now"),
        (exceptions.TryAgainError("TRYAGAIN"), UnavailableError, "cannot serve now"),
        (exceptions.MovedError("1 host:7000"), UnavailableError, "redis+cluster://"),
        (exceptions.AskError("1 host:7000"), UnavailableError, "are being moved, retry"),
        (exceptions.RedisClusterException("no node"), UnavailableError, "is away (no node)"),
        (exceptions.SlotNotCoveredError("slot"), UnavailableError, "is away (slot)"),
        (exceptions.ClusterError("TTL exhausted."), UnavailableError, "is away (TTL exhausted.)"),
        (exceptions.AuthenticationError("bad"), UnavailableError, "check the user"),
        (exceptions.NoPermissionError("NOPERM"), UnavailableError, "check the user"),
        (exceptions.ResponseError("NOAUTH required"), UnavailableError, "check the user"),
        (exceptions.ResponseError("ERR syntax"), UnavailableError, "Redis 7 or Valkey 7.2"),
        (exceptions.InvalidResponse("what"), UnavailableError, "is away (what)"),
        (exceptions.OutOfMemoryError("OOM"), OverloadedError, "is full"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_of_the_server_becomes_one_that_says_what_to_do(
    error: Exception, kind: type, text: str
):
    translated = service_error(error, "example:7000")

    assert type(translated) is kind
    assert text in translated.message
    assert "at example:7000" in translated.message
    assert translated.retry_after_s == 1.0


@pytest.mark.parametrize(("ttl_s", "expected"), [(1, 1000), (0.0001, 1), (1.5, 1500)])
def test_ttls_in_the_servers_unit(ttl_s: float, expected: int):
    assert ttl_ms(ttl_s) == expected


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e16])
def test_ttls_that_the_server_cannot_keep_are_refused(ttl_s: float):
    with pytest.raises(InvalidRequestError, match="ttl"):
        ttl_ms(ttl_s)
