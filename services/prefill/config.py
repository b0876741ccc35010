"""Settings of a prefill worker."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, InstanceOf, field_validator, model_validator
from pydantic_settings import NoDecode

import chunkkv
from chunkkv.policy import Precision, Scope, Scorer, Spread, Unit
from chunkserve.v1 import types_pb2
from services.compress import policy as policies
from services.models.weights import WeightsDtype
from services.runtime.config import ServiceSettings
from services.runtime.errors import InvalidRequestError


def _read_policy(path: Any) -> Any:
    """Return the policy of a file; ``None`` and the empty path: there is none."""
    if not isinstance(path, str):
        return path
    try:
        return chunkkv.policy_from_file(path) if path else None
    except chunkkv.InvalidPolicyError as error:
        raise ValueError(str(error)) from error


_PolicyOfFile = Annotated[
    InstanceOf[chunkkv.CompressionPolicy] | None, NoDecode, BeforeValidator(_read_policy)
]


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
        default_preset: Default policy: a named one (``chunkkv.PRESETS``), which the fields below
            change.
        policy_file: Default policy instead: a JSON file of ``CompressionPolicy`` fields, as
            ``chunkkv tune`` writes it.
        prefix_preset: Default policy of prefixes that end with a ``cache_breakpoint``: a named
            one, for questions that are yet to come. Of ``policy_file`` they take budget and
            precision; the fields below, but ``scorer``, change it too.
        prefix_scorer: Default policy of prefixes: another scorer than their preset's.
        keep_ratio: Default policy: fraction of tokens to keep; 0.3 if no budget is given.
        max_kept_tokens: Default policy: number of tokens to keep at most, instead.
        scorer: Default policy: how importance is measured.
        unit: Default policy: what is kept or dropped together.
        scope: Default policy: who shares a list of positions.
        spread: Default policy: how the budget is shared out between lists.
        chunk_size: Default policy: tokens in a chunk.
        window_size: Default policy: observation window.
        sink_tokens: Default policy: leading tokens that are always kept.
        reuse_interval: Default policy: layers that share a list with scope ``group``.
        vote_power: Default policy: what window attention is raised to before it is averaged.
        pool_size: Default policy: tokens that window scores are averaged over, odd.
        head_floor: Default policy: fraction of an equal share that every list is given.
        gating: Default policy: of how little entropy a unit's scores keep its best tokens only.
        merge_layers: Default policy: whether neighbouring layers are stored as one.
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
    default_preset: str = "fast"
    policy_file: _PolicyOfFile = None
    prefix_preset: str = "durable"
    prefix_scorer: Scorer | None = None
    keep_ratio: float | None = Field(default=None, gt=0, le=1)
    max_kept_tokens: int | None = Field(default=None, ge=1)
    scorer: Scorer | None = None
    unit: Unit | None = None
    scope: Scope | None = None
    spread: Spread | None = None
    chunk_size: int | None = Field(default=None, ge=1)
    window_size: int | None = Field(default=None, ge=1)
    sink_tokens: int | None = Field(default=None, ge=0)
    reuse_interval: int | None = Field(default=None, ge=1)
    vote_power: int | None = Field(default=None, ge=1, le=8)
    pool_size: int | None = Field(default=None, ge=1)
    head_floor: float | None = Field(default=None, ge=0, le=1)
    gating: float | None = Field(default=None, ge=0, le=1)
    merge_layers: bool | None = None
    precision: Precision | None = None

    @field_validator("default_preset", "prefix_preset")
    @classmethod
    def _check_preset(cls, name: str) -> str:
        if name not in chunkkv.PRESETS:
            raise ValueError(f"there is no such preset; give one of {', '.join(chunkkv.PRESETS)}")
        return name

    @model_validator(mode="after")
    def _check_policies(self) -> Self:
        if self.keep_ratio is not None and self.max_kept_tokens is not None:
            raise ValueError("set CHUNKSERVE_KEEP_RATIO or CHUNKSERVE_MAX_KEPT_TOKENS, not both")
        try:
            policies.from_wire(self.compression)
            policies.from_wire(self.prefix_compression)
        except InvalidRequestError as error:
            raise ValueError(f"CHUNKSERVE_* give no policy: {error.message}") from error
        return self

    @property
    def compression(self) -> types_pb2.CompressionPolicy:
        """What applies to a prompt where neither request nor session says anything."""
        if self.policy_file is None:
            base = types_pb2.CompressionPolicy(preset=self.default_preset)
        else:
            base = policies.to_wire(self.policy_file)
        return policies.overlaid(base, policies.message_of(self._policy_fields))

    @property
    def prefix_compression(self) -> types_pb2.CompressionPolicy:
        """The same, to a prefix."""
        base = types_pb2.CompressionPolicy(preset=self.prefix_preset)
        if self.policy_file is not None:
            shared = ("keep_ratio", "max_kept_tokens", "precision")
            fields = {name: getattr(self.policy_file, name) for name in shared}
            base.MergeFrom(policies.message_of(fields))
        own = policies.message_of({**self._policy_fields, "scorer": self.prefix_scorer})
        return policies.overlaid(base, own)

    @property
    def default_compression(self) -> types_pb2.CompressionPolicy:
        """Both, with every field set, as callers are shown them."""
        prefix = policies.from_wire(self.prefix_compression)
        shown = policies.to_wire(policies.from_wire(self.compression), prefix_scorer=prefix.scorer)
        shown.prefix_preset = self.prefix_preset
        if self.policy_file is None:
            shown.preset = self.default_preset
        return shown

    @property
    def _policy_fields(self) -> dict[str, Any]:
        names = (field.name for field in dataclasses.fields(chunkkv.CompressionPolicy))
        return {name: getattr(self, name) for name in names}
