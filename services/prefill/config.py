"""Settings of a prefill worker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

import chunkkv
from chunkkv.policy import Scorer
from services.models.weights import WeightsDtype
from services.runtime.config import ServiceSettings


class PrefillSettings(ServiceSettings):
    """What a prefill worker needs to know.

    Attributes:
        listen: ``host:port`` of the gRPC server; port 0 lets the system choose.
        advertise_host: Host that the gateway reaches this worker by; empty: this machine's address.
        model: Local folder in the Hugging Face layout, or a hub id.
        model_name: Name that requests give; the last part of ``model`` if empty.
        device: A torch device.
        dtype: Of the weights; ``auto``: as stored.
        weights_dtype: Of the linear layers while they work (``services.models.weights``).
        torch_threads: Threads of one forward pass; 0: torch's default.
        prefill_chunk_tokens: Tokens in one forward pass at most. A cancelled request ends at the
            next one.
        min_compress_tokens: A turn with fewer new tokens gets no segment of its own: the decode
            worker consumes it and stores it whole with the answer.
        queue_size: Prefills that wait for the model at most.
        ephemeral_ttl_s: Seconds that the segments of one-off requests live if nobody deletes them.
        segment_lease_s: Seconds after the death of a worker until another one computes the segment
            that it was computing.
        prefix_scorer: Default policy: scorer of prefixes that end with a ``cache_breakpoint``. One
            that knows no question: those are yet to come.
        keep_ratio: Default policy: fraction of tokens to keep.
        scope: Default policy: who shares a list of positions.
        chunk_size: Default policy: tokens in a chunk.
        window_size: Default policy: observation window.
        sink_tokens: Default policy: leading tokens that are always kept.
        precision: Default policy: how kept keys and values are stored.
    """

    listen: str = "127.0.0.1:50052"
    advertise_host: str = "127.0.0.1"
    model: str = Field(min_length=1)
    model_name: str = ""
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    weights_dtype: WeightsDtype = "auto"
    torch_threads: int = Field(default=0, ge=0)
    prefill_chunk_tokens: int = Field(default=1024, ge=1)
    min_compress_tokens: int = Field(default=128, ge=2)
    queue_size: int = Field(default=16, ge=0)
    ephemeral_ttl_s: float = Field(default=600, gt=0, allow_inf_nan=False)
    segment_lease_s: float = Field(default=10, gt=0, allow_inf_nan=False)
    prefix_scorer: Scorer = "key_diff"
    keep_ratio: float = Field(default=0.3, gt=0, le=1)
    scope: Literal["head", "layer", "group", "global"] = "layer"
    chunk_size: int = Field(default=20, ge=1)
    window_size: int = Field(default=16, ge=1)
    sink_tokens: int = Field(default=4, ge=0)
    precision: Literal["native", "fp8", "int8", "int4"] = "native"

    @property
    def default_policy(self) -> chunkkv.CompressionPolicy:
        """What applies where neither request nor session says anything."""
        return chunkkv.CompressionPolicy(
            keep_ratio=self.keep_ratio,
            scope=self.scope,
            chunk_size=self.chunk_size,
            window_size=self.window_size,
            sink_tokens=self.sink_tokens,
            precision=self.precision,
        )
