"""Which workers live: one key per worker that dies with its heartbeat, and an index of them."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from typing import Final

from services.runtime.telemetry import get_logger
from services.store import keys
from services.store.base import WorkerInfo
from services.store.breaker import CircuitBreaker
from services.store.connect import AsyncClient
from services.store.failures import ttl_ms

# The index must not die before the last worker in it.
_ANNOUNCE: Final = """
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[3], 'NX')
redis.call('PEXPIRE', KEYS[2], ARGV[3], 'GT')
"""

# Looks again: a worker may have come back since its key was found to be gone.
_FORGET: Final = """
for i, worker_id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then redis.call('SREM', KEYS[1], worker_id) end
end
"""


class RedisRegistry:
    """Implements ``Registry``.

    Args:
        client: For one event loop.
        breaker: Of the server.
    """

    def __init__(self, client: AsyncClient, breaker: CircuitBreaker) -> None:
        self._client = client
        self._breaker = breaker
        self._announce = client.register_script(_ANNOUNCE)
        self._forget = client.register_script(_FORGET)

    async def announce(self, worker: WorkerInfo, *, ttl_s: float) -> None:
        """Write or renew a worker's entry; without renewal it is gone after ``ttl_s``."""
        with self._breaker.guard():
            await self._announce(
                keys=[keys.worker(worker.worker_id), keys.worker_index()],
                args=[worker.worker_id, _to_json(worker), ttl_ms(ttl_s)],
            )

    async def withdraw(self, worker: WorkerInfo) -> None:
        """Remove a worker's entry at once."""
        with self._breaker.guard():
            await self._client.delete(keys.worker(worker.worker_id))
            await self._client.srem(keys.worker_index(), worker.worker_id)

    async def workers(self) -> Sequence[WorkerInfo]:
        """Return all living workers, by id."""
        with self._breaker.guard():
            members = await self._client.execute_command("SMEMBERS", keys.worker_index())
            worker_ids = sorted(member.decode() for member in members)
            if not worker_ids:
                return ()
            names = [keys.worker(worker_id) for worker_id in worker_ids]
            entries = await self._client.execute_command("MGET", *names)
            dead = [i for i, entry in enumerate(entries) if entry is None]
            if dead:
                await self._forget(
                    keys=[keys.worker_index(), *(names[i] for i in dead)],
                    args=[worker_ids[i] for i in dead],
                )
        workers = (_from_json(entry) for entry in entries if entry is not None)
        return tuple(worker for worker in workers if worker is not None)


def _to_json(worker: WorkerInfo) -> str:
    fields = dataclasses.asdict(worker)
    fields["default_policy"] = base64.b64encode(worker.default_policy).decode()
    return json.dumps(fields)


def _from_json(entry: bytes) -> WorkerInfo | None:
    """Read an entry; ``None`` for one that a release with other fields wrote."""
    try:
        fields = json.loads(entry)
        fields["default_policy"] = base64.b64decode(fields["default_policy"], validate=True)
        known = {field.name: fields[field.name] for field in dataclasses.fields(WorkerInfo)}
        return WorkerInfo(**known)
    except (ValueError, TypeError, KeyError) as error:
        get_logger().warning("registry.unreadable_worker", error=repr(error))
        return None
