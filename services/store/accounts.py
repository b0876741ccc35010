"""What a tenant uses: sessions, stored bytes, and turns that run.

An account lies in another slot than the sessions that it counts, so it is written after them and
heals by itself: every commit writes its session's entry again, and whoever reads removes entries
whose time is over. A segment counts for every session that names it.
"""

from __future__ import annotations

import secrets
from typing import Final

from services.store import keys
from services.store.base import TenantUsage
from services.store.breaker import CircuitBreaker
from services.store.connect import AsyncClient
from services.store.failures import ttl_ms

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# The total is kept beside the numbers that it is made of, so that reading it costs the same for
# every number of sessions.
_FORGET: Final = """
local function forget(ends, bytes, session)
  local counted = redis.call('HGET', bytes, session)
  if counted then
    redis.call('HINCRBY', bytes, '', -counted)
    redis.call('HDEL', bytes, session)
  end
  redis.call('ZREM', ends, session)
end
"""

# KEYS: index of sessions, account ends, account bytes. ARGV: member of the index, lifetime,
# session, bytes. GT treats a key without a TTL as one that lives for ever, hence NX first.
_ENLIST: Final = f"""
{_NOW}{_FORGET}
redis.call('ZADD', KEYS[1], 0, ARGV[1])
forget(KEYS[2], KEYS[3], ARGV[3])
redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[3])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('HINCRBY', KEYS[3], '', ARGV[4])
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, ARGV[2], 'NX')
  redis.call('PEXPIRE', key, ARGV[2], 'GT')
end
"""

# KEYS: the same. ARGV: member of the index, session.
_STRIKE: Final = f"""
{_FORGET}
redis.call('ZREM', KEYS[1], ARGV[1])
forget(KEYS[2], KEYS[3], ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then redis.call('DEL', KEYS[3]) end
"""

# KEYS: account ends, account bytes. Answers the number of sessions and their bytes.
_USAGE: Final = f"""
{_NOW}{_FORGET}
for _, session in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)) do
  forget(KEYS[1], KEYS[2], session)
end
return {{redis.call('ZCARD', KEYS[1]), tonumber(redis.call('HGET', KEYS[2], '') or '0')}}
"""

# KEYS: running turns. ARGV: token, lifetime, limit. Answers whether there was room.
_BEGIN: Final = f"""
{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[3]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'NX')
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'GT')
return 1
"""

# KEYS: running turns. ARGV: token, lifetime.
_RENEW: Final = f"""
{_NOW}
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'NX')
redis.call('PEXPIRE', KEYS[1], ARGV[2], 'GT')
"""


class RedisAccounts:
    """Implements the accounts of ``SessionStore``.

    Args:
        client: For one event loop.
        breaker: Of the server.
    """

    def __init__(self, client: AsyncClient, breaker: CircuitBreaker) -> None:
        self._client = client
        self._breaker = breaker
        self._enlist_script = client.register_script(_ENLIST)
        self._strike_script = client.register_script(_STRIKE)
        self._usage_script = client.register_script(_USAGE)
        self._begin_script = client.register_script(_BEGIN)
        self._renew_script = client.register_script(_RENEW)

    async def usage(self, tenant: str) -> TenantUsage:
        """Return what a tenant uses."""
        names = [keys.account_ends(tenant), keys.account_bytes(tenant)]
        with self._breaker.guard():
            num_sessions, stored_bytes = await self._usage_script(keys=names)
        return TenantUsage(int(num_sessions), int(stored_bytes))

    async def begin_turn(self, tenant: str, *, limit: int, ttl_s: float) -> str | None:
        """Count one more turn and return its token; ``None`` if ``limit`` turns run."""
        token = secrets.token_hex(16)
        with self._breaker.guard():
            has_room = await self._begin_script(
                keys=[keys.running_turns(tenant)], args=[token, ttl_ms(ttl_s), limit]
            )
        return token if has_room else None

    async def renew_turn(self, tenant: str, token: str, *, ttl_s: float) -> None:
        """Count a turn for ``ttl_s`` more."""
        with self._breaker.guard():
            await self._renew_script(keys=[keys.running_turns(tenant)], args=[token, ttl_ms(ttl_s)])

    async def end_turn(self, tenant: str, token: str) -> None:
        """Count a turn no more."""
        with self._breaker.guard():
            await self._client.zrem(keys.running_turns(tenant), token)

    async def _enlist(
        self, tenant: str, session_id: str, *, created_us: int, size_bytes: int, lifetime: int
    ) -> None:
        """Put a session on its tenant's list and account."""
        member = keys.index_member(created_us, session_id)
        await self._enlist_script(
            keys=_names(tenant), args=[member, lifetime, session_id, size_bytes]
        )

    async def _strike(self, tenant: str, session_id: str, *, created_us: int) -> None:
        """Take a session off its tenant's list and account."""
        member = keys.index_member(created_us, session_id)
        await self._strike_script(keys=_names(tenant), args=[member, session_id])


def _names(tenant: str) -> list[str]:
    return [keys.session_index(tenant), keys.account_ends(tenant), keys.account_bytes(tenant)]
