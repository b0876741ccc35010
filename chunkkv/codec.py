"""Compressed spans to bytes and back: a header, and parts of about 1 MiB.

The header names everything (format version, identity, model, policy, shapes) and carries a
checksum of itself and of every part; the parts are the span's memory, cut. Decoding opens views
into memory that the caller received the parts into: nothing is copied, nothing is unpickled, and
nothing is used before its checksum matched. Keys and values that are stored in fewer bits
(``SpanShape.precision``), or of two layers in one (``SpanShape.merge_layers``), are made native
again when the span is opened.

Header: ``magic (4) | version (u16) | length of body (u32) | XXH3-64 of body (u64) | body (JSON)``,
little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, get_args

import torch
import xxhash

from chunkkv.compressed import CompressedKV, LayerShape, SpanShape, size_bytes
from chunkkv.errors import CorruptError, FormatError, InvalidInputError, MismatchError
from chunkkv.policy import Precision
from chunkkv.quantization import (
    dequantize,
    merged_rows,
    quantize,
    retained_counts,
    stored_size_bytes,
)

MAGIC: Final = b"CKV\x01"
# Version 1 knew one precision, the model's own; version 2 no merged layers; versions 2 and 3 had
# int4 in groups of another size. A span is written as the earliest version that says all of it, so
# that workers of then read it.
READABLE_VERSIONS: Final = (1, 2, 3, 4)
_NATIVE_VERSION: Final = 1
_UNMERGED_VERSION: Final = 2
_MERGED_VERSION: Final = 3
_INT4_VERSION: Final = 4
PART_BYTES: Final = 1 << 20

_PREFIX: Final = struct.Struct("<4sHIQ")

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class EncodedKV:
    """A span as bytes.

    Attributes:
        header: To be stored last: it makes the parts an object.
        parts: Views into the span's memory; valid while the span is.
    """

    header: bytes
    parts: Sequence[memoryview]

    @property
    def size_bytes(self) -> int:
        """Bytes of header and parts."""
        return len(self.header) + sum(len(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read and found intact.

    Attributes:
        identity: Name of the object, given when it was encoded.
        shape: What the span is.
        part_sizes: Bytes of each part.
        part_checksums: XXH3-64 of each part.
        retained: ``quantization.retained_counts`` of the span.
    """

    identity: str
    shape: SpanShape
    part_sizes: tuple[int, ...]
    part_checksums: tuple[int, ...]
    retained: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(self.part_sizes)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the span once it is opened; as many as are stored if it is stored native."""
        return size_bytes(self.shape)

    def check_part(self, index: int, part: Buffer) -> None:
        """Check one part.

        Raises:
            CorruptError: Its size or checksum is another.
        """
        if len(part) != self.part_sizes[index]:
            raise CorruptError(
                f"part {index} of {self.identity} has {len(part)} bytes; "
                f"its header says {self.part_sizes[index]}"
            )
        if xxhash.xxh3_64_intdigest(part) != self.part_checksums[index]:
            raise CorruptError(f"part {index} of {self.identity} does not match its checksum")

    def expect(self, *, identity: str | None = None, fingerprint: str | None = None) -> None:
        """Check whose object this is.

        Raises:
            MismatchError: It is another object's, or another model's.
        """
        if identity is not None and identity != self.identity:
            raise MismatchError(f"asked for object {identity}, found {self.identity}")
        if fingerprint is not None and fingerprint != self.shape.fingerprint:
            raise MismatchError(
                f"object {self.identity} was made by model {self.shape.fingerprint}, "
                f"not by {fingerprint}"
            )

    def open(
        self, memory: bytearray | memoryview, *, out: bytearray | memoryview | None = None
    ) -> CompressedKV:
        """Return the span in memory that holds its parts, checked before, end to end.

        Args:
            memory: Writable; at least ``size_bytes`` long. The tensors of a span that is stored
                native are views into it.
            out: Writable; at least ``kv_bytes`` long. Where the tensors of any other span go; new
                memory if it is not given.

        Raises:
            InvalidInputError: The memory is too short.
            FormatError: The parts contradict the header.
        """
        stored = self._flat(memory, self.size_bytes)
        if self.shape.is_stored_native:
            return CompressedKV(self.shape, stored)
        memory = bytearray(self.kv_bytes) if out is None else out
        return dequantize(self.shape, stored, self._flat(memory, self.kv_bytes), self.retained)

    def _flat(self, memory: bytearray | memoryview, count: int) -> torch.Tensor:
        if len(memory) < count:
            raise InvalidInputError(
                f"memory has {len(memory)} bytes; {self.identity} takes {count}"
            )
        return torch.frombuffer(memory, dtype=torch.uint8, count=count)


def encode(kv: CompressedKV, *, identity: str, part_bytes: int = PART_BYTES) -> EncodedKV:
    """Return header and parts of a span.

    Args:
        kv: On any device; the parts view its memory if that is the CPU's and the span is stored
            native.
        identity: Name of the object; a reader that asks for another one refuses it.
        part_bytes: Size of the parts; the last one may be shorter.

    Raises:
        InvalidInputError: Keys or values cannot be stored in this precision, or merged: they are
            not finite.
    """
    kv = kv.to("cpu")
    retained = retained_counts(kv)
    flat = memoryview(quantize(kv, retained).numpy().data)
    parts = [flat[start : start + part_bytes] for start in range(0, len(flat), part_bytes)]
    fields: dict[str, Any] = {
        "identity": identity,
        "part_sizes": [len(part) for part in parts],
        "part_checksums": [f"{xxhash.xxh3_64_intdigest(part):016x}" for part in parts],
        "shape": asdict(kv.shape),
    }
    version = _version(kv.shape)
    if version >= _MERGED_VERSION:
        fields["retained"] = retained
    else:
        del fields["shape"]["merge_layers"]
    body = json.dumps(fields, separators=(",", ":")).encode()
    prefix = _PREFIX.pack(MAGIC, version, len(body), xxhash.xxh3_64_intdigest(body))
    return EncodedKV(prefix + body, parts)


def read_header(data: Buffer) -> Header:
    """Read a header.

    Raises:
        FormatError: Not a header, or of a version that this library does not read.
        CorruptError: Cut short, or damaged.
    """
    if len(data) < _PREFIX.size:
        raise CorruptError(f"header has {len(data)} bytes, fewer than {_PREFIX.size}")
    magic, version, length, checksum = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise FormatError(f"not a header of a KV object: it starts with {magic!r}, not {MAGIC!r}")
    if version not in READABLE_VERSIONS:
        versions = ", ".join(map(str, READABLE_VERSIONS))
        raise FormatError(f"object of format version {version}; this library reads {versions}")
    body = memoryview(data)[_PREFIX.size :]
    if len(body) != length:
        raise CorruptError(f"header body has {len(body)} bytes; its prefix says {length}")
    if xxhash.xxh3_64_intdigest(body) != checksum:
        raise CorruptError("header does not match its checksum")
    return _header(bytes(body), version)


def decode(
    header: Buffer,
    memory: bytearray | memoryview,
    *,
    identity: str | None = None,
    fingerprint: str | None = None,
) -> CompressedKV:
    """Check and open a span whose parts lie in ``memory``, end to end.

    The short way for callers that hold everything already; who receives part by part calls
    ``read_header``, ``Header.check_part`` and ``Header.open``.

    Args:
        header: As ``encode`` made it.
        memory: Writable. The tensors of a span that is stored native are views into it.
        identity: The object that was asked for, if any.
        fingerprint: The model that must have made it, if any.

    Raises:
        FormatError: Not a header, or of another version.
        CorruptError: Header or a part is damaged or cut short.
        MismatchError: Another object's or another model's.
    """
    found = read_header(header)
    found.expect(identity=identity, fingerprint=fingerprint)
    view = memoryview(memory)
    if len(view) < found.size_bytes:
        raise CorruptError(f"memory has {len(view)} bytes; the header says {found.size_bytes}")
    for index, (start, stop) in enumerate(pairwise(accumulate(found.part_sizes, initial=0))):
        found.check_part(index, view[start:stop])
    return found.open(memory)


def _version(shape: SpanShape) -> int:
    if shape.precision == "int4":
        return _INT4_VERSION
    return _MERGED_VERSION if shape.merge_layers else _UNMERGED_VERSION


def _header(data: bytes, version: int) -> Header:
    # The checksum matched, so whatever is wrong with the fields was written so.
    try:
        body: dict[str, Any] = json.loads(data)
        fields = dict(body["shape"])
        layers = tuple(
            LayerShape(**{**layer, "lengths": tuple(layer["lengths"])})
            for layer in fields.pop("layers")
        )
        index_lengths = tuple(fields.pop("index_lengths"))
        header = Header(
            identity=body["identity"],
            shape=SpanShape(**fields, layers=layers, index_lengths=index_lengths),
            part_sizes=tuple(body["part_sizes"]),
            part_checksums=tuple(int(checksum, 16) for checksum in body["part_checksums"]),
            retained=tuple(body.get("retained", ())),
        )
        # No checksum covers the version: it must be one that these fields are written as.
        if header.shape.precision == "int4" and version < _INT4_VERSION:
            raise FormatError(
                f"int4 as format version {version} stored it is not read any more; "
                "compress the text again"
            )
        says_merged = version >= _MERGED_VERSION
        names = ("retained" in body, "merge_layers" in body["shape"])
        if names != (says_merged,) * 2 or version not in (_version(header.shape), _NATIVE_VERSION):
            raise FormatError(f"the header says what version {version} does not")
        if not _has_types(header):
            raise FormatError("a field of the header is of another type, or out of range")
        if header.shape.precision not in get_args(Precision):
            raise FormatError(f"keys and values are stored as {header.shape.precision!r}")
        if not _are_parts(header.retained, merged_rows(header.shape)):
            raise FormatError(f"of merged layers, {header.retained} rows are retained")
        expected = stored_size_bytes(header.shape, header.retained)
        fits = all(_has_positions(layer, index_lengths) for layer in layers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"header lacks or misnames a field: {error}") from error
    if expected != header.size_bytes:
        raise FormatError(f"parts have {header.size_bytes} bytes; the shapes take {expected}")
    if not fits or len(header.part_sizes) != len(header.part_checksums):
        raise FormatError("header contradicts itself: lists do not fit heads, or checksums parts")
    return header


def _has_types(header: Header) -> bool:
    """Whether fields whose values are used as they are, are what they should be."""
    shape = header.shape
    counts = (shape.first_token, shape.num_tokens, *shape.index_lengths, *header.part_sizes)
    slides = (layer.is_sliding for layer in shape.layers)
    flags = (shape.has_scores, shape.merge_layers, *slides)
    dtype = getattr(torch, shape.dtype)
    return (
        all(type(text) is str for text in (header.identity, shape.fingerprint, shape.policy))
        and all(type(count) is int and 0 <= count < 1 << 48 for count in counts)
        and all(type(flag) is bool for flag in flags)
        and isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
    )


def _are_parts(counts: Sequence[object], rows: Sequence[int]) -> bool:
    """Whether there is a count for each number of rows, and none is larger."""
    return len(counts) == len(rows) and all(
        type(count) is int and 0 <= count <= most for count, most in zip(counts, rows, strict=True)
    )


def _has_positions(layer: LayerShape, index_lengths: Sequence[int]) -> bool:
    """Whether the layer's index list is there, and names every kept token."""
    counts = (*layer.lengths, layer.key_dim, layer.value_dim)
    if not layer.lengths or not all(type(count) is int and count >= 0 for count in counts):
        return False
    if not 0 <= layer.index_list < len(index_lengths):
        return False
    entries = index_lengths[layer.index_list]
    return entries == sum(layer.lengths) or set(layer.lengths) == {entries}
