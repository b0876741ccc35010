"""The decode pool on a real Ray, as its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from tiny_model import byte_tokenizer, generate, load_tiny, tiny_llama

from chunkserve.v1 import decode_pb2, decode_pb2_grpc, manifest_pb2, types_pb2
from services.decode.config import DecodeSettings
from services.runtime.errors import UnavailableError
from services.store import Store
from services.store.base import WorkerInfo

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # in Ray Serve's own models
    from services.decode.pool import PoolError, run_pool, wait_announced

START_S = 180.0
STOP_S = 60.0
PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def ray_directory() -> Iterator[Path]:
    """Where Ray puts its files; short, because of its unix sockets. Must be empty at the end."""
    path = Path(tempfile.mkdtemp(prefix="t-"))
    yield path
    left = list(path.iterdir())
    shutil.rmtree(path)
    assert left == []


class Pool:
    """A running ``python -m services.decode``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._descendants: set[psutil.Process] = set()

    async def ready(self) -> dict[str, object]:
        """Wait for the event that says so."""
        async with asyncio.timeout(START_S):
            while line := await self._stdout.readline():
                event = json.loads(line)
                if event["event"] == "decode.ready":
                    return dict(event)
        raise AssertionError(f"the pool ended: {(await self._stderr.read()).decode()}")

    def descendants(self) -> Sequence[psutil.Process]:
        """Return all processes below it."""
        found = psutil.Process(self._process.pid).children(recursive=True)
        self._descendants.update(found)
        return found

    async def has_started(self, name: str) -> None:
        """Wait until a process of this name is below it."""
        async with asyncio.timeout(START_S):
            while not self._has(name):  # noqa: ASYNC110  # the system sets no event
                await asyncio.sleep(0.01)

    def _has(self, name: str) -> bool:
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(name in word for word in process.cmdline()):
                    return True
        return False

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self.descendants()
        self._process.send_signal(number)
        return await self.ended()

    async def ended(self, timeout_s: float = STOP_S) -> int:
        """Wait for its end, and make sure that nothing of it is left."""
        async with asyncio.timeout(timeout_s):
            self.rest, self.errors = (text.decode() for text in await self._process.communicate())
        _, alive = psutil.wait_procs(self._descendants, timeout=STOP_S)
        assert alive == []
        assert self._process.returncode is not None
        return self._process.returncode

    async def kill(self) -> None:
        """End it whatever it does. Ray's processes end with it."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    @property
    def _stdout(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def _stderr(self) -> asyncio.StreamReader:
        assert self._process.stderr is not None
        return self._process.stderr


@asynccontextmanager
async def running_pool(
    valkey_url: str,
    model_path: Path,
    ray_directory: Path,
    *,
    ray_address: str = "",
    token: Path | None = None,
    **settings: object,
) -> AsyncIterator[Pool]:
    own = {f"CHUNKSERVE_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.decode",
        env={
            **plain_environment(token),
            "CHUNKSERVE_REDIS_URL": valkey_url,
            "CHUNKSERVE_MODEL": str(model_path),
            "CHUNKSERVE_TORCH_THREADS": "1",
            "CHUNKSERVE_HEARTBEAT_S": "0.3",
            "CHUNKSERVE_HEARTBEAT_TTL_S": "2",
            "RAY_TMPDIR": str(ray_directory),
            "RAY_ADDRESS": ray_address,
            **own,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    pool = Pool(process)
    try:
        yield pool
    finally:
        await pool.kill()


@asynccontextmanager
async def running_ray(
    port: int, directory: Path, token: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Ray that is not the pool's."""
    head = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).parent / "ray", "start", "--head", "--block"),
        *(f"--port={port}", f"--temp-dir={directory}", "--num-cpus=1"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=false"),
        "--object-store-memory=100000000",
        env=plain_environment(token),
        stdout=asyncio.subprocess.PIPE,
    )
    assert head.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            while b"Ray runtime started" not in (line := await head.stdout.readline()):
                assert line, "Ray ended"
        yield head
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        await head.communicate()
        _, alive = psutil.wait_procs(processes, timeout=STOP_S)
        assert alive == []
        shutil.rmtree(directory)


def plain_environment(token: Path | None = None) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKSERVE_", "RAY_"))}
    if token is not None:
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def stream(address: str, num_tokens: int = 12) -> AsyncIterator[decode_pb2.DecodeResponse]:
    """Answer a one-off request on one worker."""
    request = decode_pb2.DecodeRequest(
        manifest=manifest_pb2.Manifest(tenant="default", token_ids=PROMPT),
        sampling=types_pb2.SamplingParams(max_tokens=num_tokens, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(address) as channel:
        async for event in decode_pb2_grpc.DecodeServiceStub(channel).Decode(request, timeout=60):
            yield event


async def answer(address: str) -> tuple[str, list[int]]:
    """Return the id of the worker that answered, and the tokens."""
    events = [event async for event in stream(address)]
    token_ids = [token_id for event in events for token_id in event.delta.token_ids]
    return events[0].started.worker_id, token_ids


async def workers_without(store: Store, dead: WorkerInfo, number: int) -> Sequence[WorkerInfo]:
    """Wait until so many workers are announced and the dead one is not."""
    async with asyncio.timeout(START_S):
        while True:
            workers = await store.workers()
            if len(workers) == number and dead.worker_id not in {w.worker_id for w in workers}:
                return workers
            await asyncio.sleep(0.05)


def listener(pool: Pool, worker: WorkerInfo) -> psutil.Process:
    """Return the process that serves a worker's address."""
    port = int(worker.address.rpartition(":")[2])
    [process] = [
        process
        for process in pool.descendants()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]
    return process


@pytest.mark.ray
@pytest.mark.slow
async def test_a_killed_worker_is_replaced_and_a_stopped_pool_leaves_nothing(
    valkey_url, store, model_path, ray_directory
):
    expected = generate(load_tiny(), PROMPT, 12)
    async with running_pool(
        valkey_url, model_path, ray_directory, decode_replicas=2, heartbeat_ttl_s=10
    ) as pool:
        event = await pool.ready()
        workers = await store.workers()
        assert sorted(event["workers"]) == sorted(worker.address for worker in workers)
        for worker in workers:
            assert await answer(worker.address) == (worker.worker_id, expected)

        dead, alive = workers
        listener(pool, dead).kill()
        now = await workers_without(store, dead, 2)
        assert alive in now
        [new] = [worker for worker in now if worker.worker_id != alive.worker_id]
        assert await answer(new.address) == (new.worker_id, expected)

        # A stream that runs when the pool is stopped is finished.
        events = stream(alive.address, num_tokens=200)
        seen = [await anext(events), await anext(events)]
        stopping = asyncio.create_task(pool.stop())
        seen += [event async for event in events]
        assert seen[-1].finish.num_generated_tokens == 200

        assert await stopping == 0
        assert "decode.stopping" in pool.rest
        assert await store.workers() == ()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("process", ["gcs_server", "ray::ServeReplica"])
async def test_a_pool_that_is_stopped_while_it_starts_leaves_nothing(
    valkey_url, store, model_path, ray_directory, process
):
    async with running_pool(valkey_url, model_path, ray_directory) as pool:
        await pool.has_started(process)

        assert await pool.stop(signal.SIGTERM) == 0

    assert await store.workers() == ()


@pytest.mark.ray
@pytest.mark.slow
async def test_a_pool_on_a_ray_of_others_leaves_it_running(
    valkey_url, store, model_path, ray_directory, tmp_path
):
    port = free_port()
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    async with (
        running_ray(port, ray_directory / "head", token) as head,
        running_pool(
            valkey_url,
            model_path,
            ray_directory,
            ray_address=f"127.0.0.1:{port}",
            token=token,
            heartbeat_ttl_s=10,
        ) as pool,
    ):
        await pool.ready()
        [worker] = await store.workers()
        assert await answer(worker.address) == (worker.worker_id, generate(load_tiny(), PROMPT, 12))

        assert await pool.stop() == 0

        assert await store.workers() == ()
        assert head.returncode is None


@pytest.mark.ray
@pytest.mark.slow
async def test_a_model_that_cannot_be_loaded_ends_the_pool_with_a_message(
    valkey_url, ray_directory, tmp_path
):
    async with running_pool(valkey_url, tmp_path / "nothing", ray_directory) as pool:
        await pool.has_started("gcs_server")

        code = await pool.ended(START_S)

    assert code == 1
    assert "could not start the decode workers" in pool.errors


async def test_a_pool_without_a_store_does_not_start():
    settings = DecodeSettings(model="tiny", redis_url="redis://127.0.0.1:1/0")

    with pytest.raises(UnavailableError):
        await run_pool(settings)


async def test_workers_that_do_not_come_are_an_error(store):
    with pytest.raises(PoolError, match="0 of 2 decode workers are announced"):
        await wait_announced(store, "decode-1", 2, timeout_s=0.01)


async def test_only_workers_of_the_pool_count(store):
    ours, other = (
        WorkerInfo(f"{pool}-1", "decode", "127.0.0.1:1", "m", "f", 1, 0, 1)
        for pool in ("decode-1", "decode-2")
    )
    for worker in (ours, other):
        await store.announce(worker, ttl_s=60)

    assert list(await wait_announced(store, "decode-1", 1, timeout_s=30)) == [ours]
