"""What a span takes where it is stored, and what is left of it when it is opened again."""

from __future__ import annotations

from dataclasses import dataclass

from chunkkv.codec import decode, encode
from chunkkv.compressed import CompressedKV
from chunkkv.policy import CompressionPolicy


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A span that was stored and opened.

    Attributes:
        span: As a worker gets it.
        size_bytes: Of its parts; the header is not counted.
    """

    span: CompressedKV
    size_bytes: int


def stored(span: CompressedKV, policy: CompressionPolicy) -> Stored:
    """Store a span that ``policy`` made, and open it: with what storing it loses."""
    encoded = encode(span.to("cpu"), identity="evaluation")
    size = sum(map(len, encoded.parts))
    if policy.precision == "native" and not policy.merge_layers:
        return Stored(span, size)  # what is opened is the same, bit for bit
    opened = decode(encoded.header, bytearray(b"".join(encoded.parts)))
    return Stored(opened.to(span.memory.device), size)
