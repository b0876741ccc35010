"""From a store URL to redis-py's clients. Nothing is connected before it is used.

``redis://``, ``rediss://`` (TLS) and ``unix://`` are redis-py's own; ``redis+cluster://`` and
``rediss+cluster://`` name any node of a Redis Cluster. User and password stand in the URL, and so
can redis-py's options (``?ssl_ca_certs=/ca.pem&socket_timeout=10&protocol=2``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import MovedError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

CLUSTER_MARK: Final = "+cluster://"
SCHEMES: Final = "redis://, rediss://, unix://, redis+cluster:// or rediss+cluster://"

CONNECT_TIMEOUT_S: Final = 2.0
SOCKET_TIMEOUT_S: Final = 5.0

_parse_url: Callable[[str], dict[str, Any]] = parse_url

AsyncClient = redis.asyncio.Redis | redis.asyncio.RedisCluster


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, or a cluster.

    Attributes:
        url: As redis-py takes it. Holds the password: never print it.
        where: Address for messages, without credentials.
        is_cluster: Whether it is a Redis Cluster.
    """

    url: str = field(repr=False)
    where: str
    is_cluster: bool


def parse_store_url(url: str) -> Endpoint:
    """Read a store URL.

    Raises:
        ValueError: It is malformed. The message does not repeat the URL, which may hold a password.
    """
    is_cluster = CLUSTER_MARK in url.split("?")[0]
    plain_url = url.replace(CLUSTER_MARK, "://", 1) if is_cluster else url
    try:
        options = _parse_url(plain_url)
        connection_class = options.pop("connection_class", redis.Connection)
        # An option that redis-py does not know would otherwise surface with the first command.
        connection_class(**options)
    except (ValueError, TypeError, redis.RedisError) as error:
        raise ValueError(f"malformed store URL ({error}); it begins with {SCHEMES}") from None
    if "path" in options:
        if is_cluster:
            raise ValueError("a Redis Cluster has no unix socket: use its redis+cluster:// URL")
        where = f"unix:{options['path']}"
    else:
        where = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return Endpoint(url=plain_url, where=where, is_cluster=is_cluster)


def async_client(endpoint: Endpoint) -> AsyncClient:
    """Return a client for event loops."""
    if endpoint.is_cluster:
        return redis.asyncio.RedisCluster.from_url(endpoint.url, **_cluster_options())
    return redis.asyncio.Redis.from_url(endpoint.url, **_client_options())


class Nodes(Protocol):
    """Which node holds a key. Blocking and thread-safe."""

    def client(self, key: str) -> redis.Redis:
        """Return the client of the node that holds ``key``."""

    def suspect(self, error: Exception) -> bool:
        """Take note of an error; return whether another node may hold the key now."""

    def close(self) -> None:
        """Close all connections."""


def blocking_nodes(endpoint: Endpoint) -> Nodes:
    """Return the nodes for worker threads."""
    return ClusterNodes(endpoint) if endpoint.is_cluster else SingleNode(endpoint)


class SingleNode:
    """One server holds every key."""

    def __init__(self, endpoint: Endpoint) -> None:
        pool = redis.ConnectionPool.from_url(endpoint.url, **_client_options())
        self._client = redis.Redis(connection_pool=pool)

    def client(self, key: str) -> redis.Redis:
        """Return the client of the server."""
        return self._client

    def suspect(self, error: Exception) -> bool:
        """Return ``False``: there is no other node."""
        return False

    def close(self) -> None:
        """Close all connections."""
        self._client.connection_pool.disconnect()


class ClusterNodes:
    """Every key has a slot, and every slot a node."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._cluster: redis.RedisCluster | None = None
        self._is_stale = False

    def client(self, key: str) -> redis.Redis:
        """Return the client of the node that holds ``key``, as far as we know."""
        cluster = self._current_cluster()
        node_of: Callable[[str], ClusterNode] = cluster.get_node_from_key
        return cluster.get_redis_connection(node_of(key))

    def suspect(self, error: Exception) -> bool:
        """Read the slots again before the next use: one has moved, or a node is gone."""
        self._is_stale = True
        return isinstance(error, MovedError)

    def close(self) -> None:
        """Close all connections."""
        if self._cluster is not None:
            self._cluster.close()

    def _current_cluster(self) -> redis.RedisCluster:
        with self._lock:
            if self._cluster is None:
                # redis-py's constructor connects, so this waits for the first use.
                self._cluster = redis.RedisCluster.from_url(
                    self._endpoint.url, **_cluster_options()
                )
            elif self._is_stale:
                self._cluster.nodes_manager.initialize()
            self._is_stale = False
            return self._cluster


def _client_options() -> dict[str, Any]:
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        # A write that was cut off may have been done: whether to send it again is for the caller
        # to decide.
        "retry": Retry(NoBackoff(), 0),
        # With them, pools no longer test whether an idle connection is still good.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _cluster_options() -> dict[str, Any]:
    # By default every fifth redirection, of which the first use has several, makes redis-py close
    # the connections that others are using.
    return _client_options() | {"reinitialize_steps": 0}
