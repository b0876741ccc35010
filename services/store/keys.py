"""Names of the keys, and what a segment's header key says of its parts.

Every name begins with the version of the layout, so that two releases can share a server. What
must be changed together lies in one slot of Redis Cluster: the part of a name in braces is the
hash tag, and equal tags share a slot. A segment's id is a hash over its tenant, among others, so
the tenant is in its keys as well.
"""

from __future__ import annotations

import struct
import zlib
from urllib.parse import quote

from services.runtime.errors import CorruptError

_VERSION = "cs2"

# What precedes a segment's header in its key: checksum over the segment's id and everything behind
# the checksum, number of parts, and the name of the copy whose parts these are.
_CHECKSUM = struct.Struct(">I")
_PARTS = struct.Struct(">I8s")
RECORD_SIZE = _CHECKSUM.size + _PARTS.size
COPY_SIZE = 8


def manifest(tenant: str, session_id: str) -> str:
    """Hash ``{version, body, created_us, segments}`` of a session."""
    return f"{_VERSION}:{_session_tag(tenant, session_id)}:manifest"


def lease(tenant: str, session_id: str) -> str:
    """String: token of the turn that runs."""
    return f"{_VERSION}:{_session_tag(tenant, session_id)}:lease"


def turn_results(tenant: str, session_id: str) -> str:
    """Hash: what the session's latest turns answered, by request id."""
    return f"{_VERSION}:{_session_tag(tenant, session_id)}:results"


def turn_order(tenant: str, session_id: str) -> str:
    """List: the request ids of these turns, oldest first."""
    return f"{_VERSION}:{_session_tag(tenant, session_id)}:turns"


def reserved_segments(tenant: str, session_id: str) -> str:
    """Set: ids of segments that are or were to be named by a turn that is not committed."""
    return f"{_VERSION}:{_session_tag(tenant, session_id)}:reserved"


def owner(tenant: str, session_id: str) -> str:
    """A session among the owners of a segment."""
    return f"{_quoted(tenant)}/{_quoted(session_id)}"


def reserver(tenant: str, session_id: str) -> str:
    """A session's turn that is not committed yet, among the owners of a segment."""
    return f"{owner(tenant, session_id)}/turn"


def session_index(tenant: str) -> str:
    """Sorted set of a tenant's sessions, members from ``index_member``, all scores 0."""
    return f"{_VERSION}:{{{_quoted(tenant)}}}:sessions"


def account_ends(tenant: str) -> str:
    """Sorted set of a tenant's sessions; the score is when each expires unless used, in ms."""
    return f"{_VERSION}:{{{_quoted(tenant)}}}:account"


def account_bytes(tenant: str) -> str:
    """Hash: stored bytes of each of these sessions, and under the empty name of all of them."""
    return f"{_VERSION}:{{{_quoted(tenant)}}}:bytes"


def running_turns(tenant: str) -> str:
    """Sorted set of the turns that run; the score is when each counts no longer, in ms."""
    return f"{_VERSION}:{{{_quoted(tenant)}}}:running"


def index_member(created_us: int, session_id: str) -> bytes:
    """Member of the index: sorts by creation time, and tells a session from its namesakes."""
    return f"{created_us:016d}:{session_id}".encode()


def parse_index_member(member: bytes) -> tuple[int, str]:
    """Inverse of ``index_member``.

    Raises:
        ValueError: It is no member.
    """
    created_us, separator, session_id = member.decode().partition(":")
    is_member = len(created_us) == 16 and created_us.isascii() and created_us.isdigit()
    if not (is_member and separator and session_id):
        raise ValueError("not a member of the session index")
    return int(created_us), session_id


def segment_header(segment_id: str) -> str:
    """String: record, then the header."""
    return f"{_VERSION}:{_segment_tag(segment_id)}:header"


def segment_owners(segment_id: str) -> str:
    """Sorted set: sessions that name the segment; the score is when that ends by itself, in ms."""
    return f"{_VERSION}:{_segment_tag(segment_id)}:owners"


def segment_part(segment_id: str, copy: bytes, index: int) -> str:
    """String: one part of one copy."""
    return f"{_VERSION}:{_segment_tag(segment_id)}:{copy.hex()}:{index}"


def segment_lease(segment_id: str) -> str:
    """String: token of whoever computes the segment."""
    return f"{_VERSION}:{_segment_tag(segment_id)}:lease"


def segment_value(segment_id: str, copy: bytes, num_parts: int, header: bytes) -> bytes:
    """What the header's key holds: which parts belong to it, then the header."""
    checked = _PARTS.pack(num_parts, copy) + header
    return _CHECKSUM.pack(_checksum(segment_id, checked)) + checked


def segment_parts(segment_id: str, value: bytes) -> list[str]:
    """Keys of the parts that the header's key names.

    Args:
        segment_id: Whose key.
        value: All that the key holds: part of it cannot be checked.

    Raises:
        CorruptError: It is damaged, or another segment's.
    """
    num_parts, copy = segment_copy(segment_id, value)
    return [segment_part(segment_id, copy, index) for index in range(num_parts)]


def segment_copy(segment_id: str, value: bytes) -> tuple[int, bytes]:
    """Number of parts and name of the copy in what the header's key holds.

    Raises:
        CorruptError: It is damaged, or another segment's.
    """
    num_parts, copy = _PARTS.unpack_from(_checked(segment_id, value))
    return num_parts, copy


def stored_header(segment_id: str, value: bytes) -> bytes:
    """The header in what its key holds.

    Raises:
        CorruptError: It is damaged, or another segment's.
    """
    return _checked(segment_id, value)[_PARTS.size :]


def worker(worker_id: str) -> str:
    """String: JSON of a living worker."""
    return f"{_VERSION}:{{workers}}:{_quoted(worker_id)}"


def worker_index() -> str:
    """Set of the ids of workers that may live."""
    return f"{_VERSION}:{{workers}}"


def _checked(segment_id: str, value: bytes) -> bytes:
    """Return what lies behind the checksum."""
    checked = value[_CHECKSUM.size :]
    expected = _CHECKSUM.pack(_checksum(segment_id, checked))
    if len(value) < RECORD_SIZE or not value.startswith(expected):
        raise CorruptError(
            f"segment {segment_id}: the {len(value)} bytes of its header key do not match their"
            " checksum",
            resource=("segment", segment_id),
        )
    return checked


def _checksum(segment_id: str, checked: bytes) -> int:
    return zlib.crc32(checked, zlib.crc32(segment_id.encode()))


def _session_tag(tenant: str, session_id: str) -> str:
    return f"{{{owner(tenant, session_id)}}}"


def _segment_tag(segment_id: str) -> str:
    return f"{{{_quoted(segment_id)}}}"


def _quoted(name: str) -> str:
    # Neither a brace nor a slash nor a colon in a caller's name can reach another one's key.
    return quote(name, safe="")
