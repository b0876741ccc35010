"""A gateway with real tiny workers whose processes can die at any call to the store.

All of it runs in one process, on one event loop. A worker that is killed reaches the store no more
and says nothing more to the gateway, as if its process were gone: what it was about to do is not
done, and its entry in the registry stays until it expires.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from tiny_model import load_tiny

from chunkserve.v1 import compression_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from services.compress.compaction import Compactor
from services.compress.servicer import CompressionServicer
from services.decode.config import DecodeSettings
from services.decode.worker import DecodeWorker
from services.models.loader import LoadedModel
from services.prefill.config import PrefillSettings
from services.prefill.runner import PrefillRunner
from services.prefill.servicer import PrefillServicer
from services.runtime.errors import UnavailableError
from services.runtime.server import GrpcServer
from services.runtime.tasks import end_task
from services.store import Store, open_store
from services.store.base import WorkerInfo
from services.store.heartbeat import keep_announced
from tests.fakes import FakeCluster
from tests.integration.session_model import MIN_COMPRESS_TOKENS, SEGMENT_LEASE_S

MODEL = "tiny"
MAX_MODEL_LEN = 1024
LEASE_TTL_S = 60.0
WAIT_S = 60.0
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# Of the registry: they come by the clock, and are no part of any turn.
_HEARTBEATS = frozenset({"announce", "withdraw", "workers"})


def load_chatty() -> LoadedModel:
    """Return the tiny model, with a chat template."""
    loaded = load_tiny(max_model_len=MAX_MODEL_LEN)
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


class Moments:
    """What happens on the way of a request, so that something can be done at any of it.

    A moment is the start or the end of a call to the store by anybody, or an event that the client
    received. Threads and the event loop count alike.
    """

    def __init__(self) -> None:
        self.held = asyncio.Event()
        self._left = 0
        self._act: Callable[[], None] | None = None
        self._hold: asyncio.Event | None = None
        self._lock = threading.Lock()

    def arm(self, number: int, act: Callable[[], None]) -> None:
        """Call ``act``, once and on any thread, at the moment of this number, from 1."""
        with self._lock:
            self._left, self._act = number, act

    def disarm(self) -> None:
        """Forget what was armed, unless it has happened."""
        with self._lock:
            self._act = None

    def pass_by(self) -> None:
        """Let one moment pass."""
        with self._lock:
            self._left -= 1
            if self._left == 0 and self._act is not None:
                self._act()
                self._act = None

    @asynccontextmanager
    async def commits_held(self) -> AsyncIterator[Callable[[], None]]:
        """Let no turn be committed before the block calls what it is given, or ends."""
        self.held.clear()
        self._hold = asyncio.Event()
        try:
            yield self._hold.set
        finally:
            self._hold.set()
            self._hold = None

    async def before_commit(self) -> None:
        """Wait as long as commits are held."""
        if self._hold is not None:
            self.held.set()
            await self._hold.wait()


class MortalStore:
    """The store as one process sees it, until the process dies.

    Attributes:
        num_calls: Calls that run on the event loop.
        disowned: Segments that it stored for nobody: for one-off requests.
    """

    def __init__(self, store: Store, moments: Moments) -> None:
        self._store = store
        self._moments = moments
        self._is_dead = False
        self._buried = threading.Event()
        self._async_buried = asyncio.Event()
        self.num_calls = 0
        self.disowned: set[str] = set()

    def die(self) -> None:
        """Let nothing more through. On any thread."""
        self._is_dead = True

    def bury(self) -> None:
        """Let calls that wait end with an error, which nobody hears any more."""
        self._async_buried.set()
        self._buried.set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name in ("new_copy", "close"):
            return method
        if name in _HEARTBEATS:
            return functools.partial(self._beat, method)
        if inspect.iscoroutinefunction(method):
            return functools.partial(self._call_async, name, method)
        if name == "fetch_parts":
            return functools.partial(self._generate, method)
        return functools.partial(self._call, name, method)

    async def _beat(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._is_dead:
            raise UnavailableError("dead")
        return await method(*args, **options)

    async def _call_async(
        self, name: str, method: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        self.num_calls += 1
        try:
            self._moments.pass_by()
            await self._live_on_loop()
            if name == "commit_manifest":
                await self._moments.before_commit()
            answer = await method(*args, **options)
            self._moments.pass_by()
            await self._live_on_loop()
            return answer
        finally:
            self.num_calls -= 1

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if name == "put_segment" and options["owner"] is None:
            self.disowned.add(args[0])
        self._moments.pass_by()
        self._live()
        answer = method(*args, **options)
        self._moments.pass_by()
        self._live()
        return answer

    def _generate(self, method: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Any]:
        self._moments.pass_by()
        self._live()
        yield from method(*args, **options)

    async def _live_on_loop(self) -> None:
        if self._is_dead:
            await self._async_buried.wait()
            raise UnavailableError("dead")

    def _live(self) -> None:
        if self._is_dead:
            self._buried.wait(WAIT_S)
            raise UnavailableError("dead")


class Worker(Protocol):
    """What prefill, decode and compression workers have in common here."""

    worker_id: str
    store: MortalStore

    @property
    def num_active(self) -> int:
        """Requests whose handler has not ended."""

    async def end_server(self) -> None:
        """Cut all connections."""

    async def end(self) -> None:
        """End what is left of it."""


class Prefill:
    """A prefill worker."""

    def __init__(self, loaded: LoadedModel, store: MortalStore, worker_id: str) -> None:
        self.worker_id = worker_id
        self.store = store
        self._loaded = loaded
        self._runner = PrefillRunner(loaded, prefill_chunk_tokens=64, queue_size=16)
        settings = PrefillSettings(
            model=MODEL, min_compress_tokens=MIN_COMPRESS_TOKENS, segment_lease_s=SEGMENT_LEASE_S
        )
        self._servicer = _CountedPrefill(loaded, self._runner, store, settings, worker_id=worker_id)
        add = functools.partial(
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server, self._servicer
        )
        self._server = GrpcServer("127.0.0.1:0", [add], [])

    async def start(self) -> None:
        """Serve, and announce it."""
        self._port = await self._server.start()
        self._heartbeat = _heartbeat(self.store, self._describe)

    @property
    def num_active(self) -> int:
        return self._servicer.num_active + self._runner.num_active

    async def end_server(self) -> None:
        await self._server.stop(0)

    async def end(self) -> None:
        await end_task(self._heartbeat)
        self._runner.close()

    def _describe(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            role="prefill",
            address=f"127.0.0.1:{self._port}",
            model=MODEL,
            fingerprint=self._loaded.fingerprint,
            max_model_len=MAX_MODEL_LEN,
            num_active=self._runner.num_active,
            num_slots=self._runner.num_slots,
        )


class _CountedPrefill(PrefillServicer):
    num_active = 0

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> Any:
        with self._counted():
            return await super().Prefill(request, context)

    async def Rebuild(self, request: prefill_pb2.RebuildRequest, context: Any) -> Any:
        with self._counted():
            return await super().Rebuild(request, context)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.num_active += 1
        try:
            yield
        finally:
            self.num_active -= 1


class Decode:
    """A decode worker."""

    def __init__(self, loaded: LoadedModel, store: MortalStore, worker_id: str) -> None:
        self.worker_id = worker_id
        self.store = store
        # Room for a few sessions, so that some are resident and others are not.
        settings = DecodeSettings(model=MODEL, kv_bytes=1 << 20, torch_threads=1)
        self._worker = DecodeWorker(loaded, store, settings, worker_id=worker_id)

    async def start(self) -> None:
        """Serve, and announce it."""
        await self._worker.start()

    @property
    def num_active(self) -> int:
        return self._worker.memory.num_active + self._worker.engine.num_running

    async def end_server(self) -> None:
        await self._worker._server.stop(0)

    async def end(self) -> None:
        await self._worker.stop(grace_s=0)


class Compression:
    """A compression worker."""

    def __init__(self, store: MortalStore, worker_id: str) -> None:
        self.worker_id = worker_id
        self.store = store
        self._servicer = CompressionServicer(
            Compactor(store, lease_ttl_s=LEASE_TTL_S), max_concurrent_requests=4
        )
        add = functools.partial(
            compression_pb2_grpc.add_CompressionServiceServicer_to_server, self._servicer
        )
        self._server = GrpcServer("127.0.0.1:0", [add], [])

    async def start(self) -> None:
        """Serve, and announce it."""
        self._port = await self._server.start()
        self._heartbeat = _heartbeat(self.store, self.describe)

    @property
    def num_active(self) -> int:
        return self._servicer.num_active

    async def end_server(self) -> None:
        await self._server.stop(0)

    async def end(self) -> None:
        await end_task(self._heartbeat)

    def describe(self) -> WorkerInfo:
        """Return its entry in the registry."""
        return WorkerInfo(
            worker_id=self.worker_id,
            role="compression",
            address=f"127.0.0.1:{self._port}",
            model="",
            fingerprint="",
            max_model_len=0,
            num_active=self._servicer.num_active,
            num_slots=self._servicer.num_slots,
        )


class SessionCluster:
    """The gateway and its workers: two that prefill, two that decode, one that compresses.

    Use it as an async context manager.

    Attributes:
        moments: Of all processes and the client.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.moments = Moments()
        self.workers: dict[str, list[Any]] = {"prefill": [], "decode": [], "compression": []}
        self._loaded: list[LoadedModel] = []
        self._num_made = 0
        self._threads = _CountedThreads()
        self._killing: list[asyncio.Task[None]] = []
        self._num_killed = 0
        self._disowned: set[str] = set()

    async def __aenter__(self) -> SessionCluster:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(self._threads)
        self.store = open_store(self._url)
        self._gateway_store = MortalStore(open_store(self._url), self.moments)
        self._front = FakeCluster(
            self._gateway_store,
            lease_ttl_s=LEASE_TTL_S,
            failover_wait_s=WAIT_S,
            worker_refresh_s=0.001,
            default_model=MODEL,
        )
        await self._front.__aenter__()
        self.inference, self.sessions = self._front.inference, self._front.sessions
        for role in ("prefill", "prefill", "decode", "decode", "compression"):
            await self.add(role)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._killing)
        for worker in [worker for role in self.workers.values() for worker in role]:
            await worker.end_server()
            await worker.end()
            await worker.store.close()
        await self._front.__aexit__(None, None, None)
        await self._gateway_store.close()
        await self.store.close()

    async def add(self, role: str) -> None:
        """Start a worker, and wait until it is announced."""
        self._num_made += 1
        store, name = MortalStore(open_store(self._url), self.moments), f"{role}-{self._num_made}"
        worker: Any
        if role == "compression":
            worker = Compression(store, name)
        else:
            worker = (Prefill if role == "prefill" else Decode)(load_chatty(), store, name)
        await worker.start()
        self.workers[role].append(worker)
        async with asyncio.timeout(WAIT_S):
            while name not in {info.worker_id for info in await self.store.workers()}:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def kill(self, worker: Any) -> None:
        """Kill a worker at once. On the event loop's thread or any other."""
        worker.store.die()
        self._num_killed += 1
        self._loop.call_soon_threadsafe(
            lambda: self._killing.append(self._loop.create_task(self._bury(worker)))
        )

    async def replace_dead(self) -> None:
        """Start a worker for every one that was killed."""
        while len(self._killing) < self._num_killed:  # noqa: ASYNC110
            await asyncio.sleep(0)  # the event loop has yet to hear of it
        await asyncio.gather(*self._killing)
        self._killing, self._num_killed = [], 0
        missing = {"prefill": 2, "decode": 2, "compression": 1}
        for role, number in missing.items():
            while len(self.workers[role]) < number:
                await self.add(role)

    async def quiesce(self) -> None:
        """Wait until nothing runs any more on behalf of any request."""
        await self._front.gateway.wait_idle()
        async with asyncio.timeout(WAIT_S):
            # Handlers, threads and their cleaning up set no event for tests.
            while not self._is_idle():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def take_disowned(self) -> set[str]:
        """Return what workers stored for one-off requests since this was called last."""
        disowned, self._disowned = self._disowned, set()
        for worker in [worker for role in self.workers.values() for worker in role]:
            disowned |= worker.store.disowned
            worker.store.disowned = set()
        return disowned

    def _is_idle(self) -> bool:
        workers = [worker for role in self.workers.values() for worker in role]
        return not (
            self._threads.num_running
            or self._gateway_store.num_calls
            or any(worker.num_active or worker.store.num_calls for worker in workers)
        )

    async def _bury(self, worker: Any) -> None:
        for role in self.workers.values():
            if worker in role:
                role.remove(worker)
        stopping = asyncio.create_task(worker.end_server())
        # Handlers that wait for the store end when the connections are cut, or else below.
        await asyncio.wait([stopping], timeout=0.05)
        worker.store.bury()
        await stopping
        await worker.end()
        self._disowned |= worker.store.disowned
        await worker.store.close()
        if isinstance(worker, Compression):
            # Of these, the gateway tries no other one: as if its entry had expired.
            await self.store.withdraw(worker.describe())


class _CountedThreads(ThreadPoolExecutor):
    """Threads of the event loop, which knows how many work."""

    def __init__(self) -> None:
        super().__init__(max_workers=16, thread_name_prefix="blocking")
        self._running: set[Future[Any]] = set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        future = super().submit(*args, **options)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future


def _heartbeat(store: Any, describe: Callable[[], WorkerInfo]) -> asyncio.Task[None]:
    return asyncio.create_task(keep_announced(store, describe, interval_s=1.0, ttl_s=5.0))
