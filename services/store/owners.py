"""Who names a segment: what keeps it alive, and what frees it when nobody does.

Beside a segment's keys, in their slot, lies a sorted set of owners. A member is a session, its
score the moment at which that ownership ends by itself. Whoever names a segment becomes an owner
first, in the script that makes sure that the segment is there; whoever names it no longer frees
it, in the script that makes sure that nobody else does. So a segment is never taken from under a
session, and none stays that no session names.

Knows the scripts and their arguments, and not which client runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from services.runtime.errors import CorruptError
from services.store import keys

# Owners and segments outlive the sessions that name them, so that a session that can be read can
# be used.
SEGMENT_GRACE_MS: Final = 60_000

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# GT treats a key without a TTL as one that lives for ever, hence NX first.
_OWN: Final = """
local function own(owners, owner, lifetime)
  redis.call('ZREMRANGEBYSCORE', owners, '-inf', now)
  redis.call('ZADD', owners, 'GT', now + lifetime, owner)
  redis.call('PEXPIRE', owners, lifetime, 'NX')
  redis.call('PEXPIRE', owners, lifetime, 'GT')
end
"""

# KEYS: owners, header, parts. ARGV: record, lifetime, owner or nothing. Answers the segment's
# bytes, or one of ``Outcome``.
CLAIM: Final = f"""
{_NOW}{_OWN}
if redis.call('GETRANGE', KEYS[2], 0, #ARGV[1] - 1) ~= ARGV[1] then return -2 end
local size_bytes = redis.call('STRLEN', KEYS[2]) - #ARGV[1]
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then return -1 end
  size_bytes = size_bytes + redis.call('STRLEN', KEYS[i])
end
for i = 2, #KEYS do redis.call('PEXPIRE', KEYS[i], ARGV[2], 'GT') end
if ARGV[3] ~= '' then own(KEYS[1], ARGV[3], ARGV[2]) end
return size_bytes
"""

# KEYS: owners, header. ARGV: the header's value, lifetime, owner or nothing, whether to replace a
# header that is there. Answers whether it is ours.
PUBLISH: Final = f"""
{_NOW}{_OWN}
if ARGV[4] == '0' and redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
if ARGV[3] ~= '' then own(KEYS[1], ARGV[3], ARGV[2]) end
return 1
"""

# KEYS: owners, header, parts. ARGV: record, owner. Answers 1 if nothing is left, 0 if somebody
# else owns it, or ``Outcome.CHANGED``.
RELEASE: Final = f"""
{_NOW}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREM', KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
if redis.call('GETRANGE', KEYS[2], 0, {keys.RECORD_SIZE - 1}) ~= ARGV[1] then return -2 end
for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
return 1
"""


class Outcome(IntEnum):
    """What a script answers where it did nothing.

    Attributes:
        INCOMPLETE: A part is missing.
        CHANGED: Another copy is stored since its header was read; read it again.
    """

    INCOMPLETE = -1
    CHANGED = -2


@dataclass(frozen=True, slots=True)
class Call:
    """Keys and arguments of a script."""

    keys: Sequence[str]
    args: Sequence[bytes | str | int]


def claim(segment_id: str, value: bytes, *, owner: str, lifetime: int) -> Call:
    """Return a call of ``CLAIM``: extend a segment's life and, if ``owner`` is given, own it.

    Args:
        segment_id: Which.
        value: All that its header's key holds.
        owner: From ``keys.owner``; empty for nobody.
        lifetime: Milliseconds.

    Raises:
        CorruptError: The value is damaged.
    """
    parts = keys.segment_parts(segment_id, value)
    return Call([*_names(segment_id), *parts], [value[: keys.RECORD_SIZE], lifetime, owner])


def publish(
    segment_id: str, value: bytes, *, owner: str, lifetime: int, replaces: bool = False
) -> Call:
    """Return a call of ``PUBLISH``: make the parts that ``value`` names the segment.

    Args:
        segment_id: Which.
        value: All that its header's key shall hold.
        owner: From ``keys.owner``; empty for nobody.
        lifetime: Milliseconds.
        replaces: Whether also if there is a header.
    """
    return Call(_names(segment_id), [value, lifetime, owner, int(replaces)])


def release(segment_id: str, value: bytes | None, *, owner: str) -> Call:
    """Return a call of ``RELEASE``: own a segment no longer, and free it if nobody does.

    Of one with a damaged header only that is freed: parts that nothing names any more expire.

    Args:
        segment_id: Which.
        value: All that its header's key holds; ``None`` if there is none.
        owner: From ``keys.owner``.
    """
    value = value or b""
    try:
        parts = keys.segment_parts(segment_id, value) if value else []
    except CorruptError:
        parts = []
    return Call([*_names(segment_id), *parts], [value[: keys.RECORD_SIZE], owner])


def _names(segment_id: str) -> list[str]:
    return [keys.segment_owners(segment_id), keys.segment_header(segment_id)]
