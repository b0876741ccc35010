"""A segment's header as far as the gateway reads it: whose it is, and its parts' checksums.

The format is ``chunkkv.codec``'s, which opens headers into tensors and so needs torch. Here they
are only checked, and given another name.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from services.runtime.errors import CorruptError

_MAGIC: Final = b"CKV\x01"
_PREFIX: Final = struct.Struct("<4sHIQ")  # magic, version, length and XXH3-64 of the body


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a header says.

    Attributes:
        identity: Name of the segment.
        fingerprint: Of the model.
        first_token: Position of the span in its conversation.
        num_tokens: Tokens of the span.
        part_sizes: Bytes of each part.
        part_checksums: XXH3-64 of each part.
    """

    identity: str
    fingerprint: str
    first_token: int
    num_tokens: int
    part_sizes: tuple[int, ...]
    part_checksums: tuple[int, ...]

    def check_part(self, index: int, part: bytes) -> None:
        """Check one part.

        Raises:
            CorruptError: Its size or checksum is another.
        """
        if len(part) != self.part_sizes[index]:
            raise _corrupt(
                f"part {index} of segment {self.identity} has {len(part)} bytes; its header says "
                f"{self.part_sizes[index]}"
            )
        if xxhash.xxh3_64_intdigest(part) != self.part_checksums[index]:
            raise _corrupt(f"part {index} of segment {self.identity} does not match its checksum")


def read_segment_header(data: bytes) -> SegmentHeader:
    """Read a header.

    Raises:
        CorruptError: It is damaged, or no header.
    """
    _, body = _opened(data)
    try:
        shape = body["shape"]
        header = SegmentHeader(
            identity=str(body["identity"]),
            fingerprint=str(shape["fingerprint"]),
            first_token=int(shape["first_token"]),
            num_tokens=int(shape["num_tokens"]),
            part_sizes=tuple(int(size) for size in body["part_sizes"]),
            part_checksums=tuple(int(checksum, 16) for checksum in body["part_checksums"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(f"a segment's header lacks or misnames a field: {error}") from error
    if len(header.part_sizes) != len(header.part_checksums):
        raise _corrupt(f"the header of segment {header.identity} contradicts itself")
    return header


def renamed_segment_header(data: bytes, identity: str) -> bytes:
    """Return the header of the same parts under another name.

    Raises:
        CorruptError: It is damaged, or no header.
    """
    version, body = _opened(data)
    encoded = json.dumps({**body, "identity": identity}, separators=(",", ":")).encode()
    checksum = xxhash.xxh3_64_intdigest(encoded)
    return _PREFIX.pack(_MAGIC, version, len(encoded), checksum) + encoded


def _opened(data: bytes) -> tuple[int, dict[str, Any]]:
    """Return the format version and the body."""
    if len(data) < _PREFIX.size or not data.startswith(_MAGIC):
        raise _corrupt(f"{len(data)} bytes that should be a segment's header are none")
    _, version, length, checksum = _PREFIX.unpack_from(data)
    encoded = data[_PREFIX.size :]
    if len(encoded) != length or xxhash.xxh3_64_intdigest(encoded) != checksum:
        raise _corrupt("a segment's header does not match its checksum")
    try:
        body = json.loads(encoded)
    except ValueError as error:
        raise _corrupt(f"a segment's header is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise _corrupt("a segment's header has no fields")
    return version, body


def _corrupt(message: str) -> CorruptError:
    return CorruptError(message)
