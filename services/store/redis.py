"""The store over Redis or Valkey: one server, or a Redis Cluster."""

from __future__ import annotations

from services.store.breaker import CircuitBreaker
from services.store.connect import Endpoint, async_client, blocking_nodes
from services.store.registry import RedisRegistry
from services.store.segments import RedisSegments
from services.store.sessions import RedisSessions
from services.store.transfer import RedisTransfer


class RedisStore(RedisSegments, RedisSessions, RedisTransfer, RedisRegistry):
    """Implements ``Store``.

    Segments go over a pool of blocking connections that worker threads share; all else over
    asynchronous connections of the event loop that uses it first.

    Args:
        endpoint: Where the server is. Nothing is connected before it is used.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        client = async_client(endpoint)
        breaker = CircuitBreaker(endpoint.where)
        RedisSegments.__init__(self, blocking_nodes(endpoint), breaker)
        RedisSessions.__init__(self, client, breaker)
        RedisTransfer.__init__(self, client, breaker)
        RedisRegistry.__init__(self, client, breaker)

    async def ping(self) -> None:
        """Raise ``UnavailableError`` unless the store answers."""
        with self._breaker.guard():
            await self._client.ping()

    async def close(self) -> None:
        """Close all connections."""
        self._nodes.close()
        await self._client.aclose()
