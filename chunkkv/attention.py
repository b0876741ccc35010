"""Catches queries and keys on their way through a model's attention.

Uses the attention interface of transformers: an implementation of our own name hands them to
a probe, if one came with the call, and then runs the implementation that the model had before.
No model code is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from chunkkv.errors import InvalidInputError

_PREFIX: Final = "chunkkv_"

# Keyword that carries the probe from the model's call to its attention.
PROBE_ARGUMENT: Final = "chunkkv_probe"

# Keyword that carries an attention that some layers use instead of the model's own.
ATTENTION_ARGUMENT: Final = "chunkkv_attention"


class AttentionProbe(Protocol):
    """Sees the queries and keys of each layer, right before they meet."""

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Take what one layer computed in one forward pass, after position encoding.

        Args:
            layer: Its index.
            queries: ``(batch, num_heads, q_len, head_dim)``.
            scaling: Factor on the dot products; ``head_dim ** -0.5`` if ``None``.
            softcap: Bound of the logits, or ``None``.
            keys: ``(batch, num_kv_heads, kv_len, head_dim)``: all that the queries may see, their
                own last.
            hidden: ``(batch, num_kv_heads)`` int64: of each head, so many leading keys hold
                nothing, and no query sees them; ``None``: all hold something.
        """


class LayerAttention(Protocol):
    """Attention that takes the place of the model's own in some layers of one forward pass.

    Attributes:
        layers: Their indices.
    """

    layers: frozenset[int]

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return ``(batch, q_len, num_heads, value_dim)``.

        Args:
            layer: Its index.
            queries: ``(batch, num_heads, q_len, head_dim)``, after position encoding.
            keys: ``(batch, num_kv_heads, kv_len, head_dim)``, those of the queries last.
            values: ``(batch, num_kv_heads, kv_len, value_dim)``.
            scaling: Factor on the dot products; ``head_dim ** -0.5`` if ``None``.
            softcap: Bound of the logits, or ``None``.
        """


@dataclass(frozen=True, slots=True)
class Probes:
    """Several probes, where a model takes one."""

    probes: tuple[AttentionProbe, ...]

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Show each probe what one layer computed in one forward pass."""
        for probe in self.probes:
            probe.observe(layer, queries, scaling, softcap, keys=keys, hidden=hidden)


@dataclass(slots=True)
class QueryProbe:
    """Keeps the queries of the last tokens that a model saw, layer by layer.

    Attributes:
        window_size: Tokens to keep.
        queries: By layer index: ``(batch, num_heads, <= window_size, head_dim)``, after position
            encoding.
        scaling: By layer index: factor on the dot products.
        softcap: By layer index: bound of the logits, or ``None``.
    """

    window_size: int
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    softcap: dict[int, float | None] = field(default_factory=dict)

    def observe(
        self,
        layer: int,
        queries: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        *,
        keys: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> None:
        """Take the queries of one forward pass ``(batch, num_heads, q_len, head_dim)``."""
        recent = queries[:, :, -self.window_size :]
        if layer in self.queries and recent.shape[2] < self.window_size:
            recent = torch.cat([self.queries[layer], recent], dim=2)[:, :, -self.window_size :]
        # A copy, so that the whole prompt's queries are not kept alive by a view.
        self.queries[layer] = recent.clone()
        self.scaling[layer] = scaling_of(queries, scaling)
        self.softcap[layer] = softcap


def scaling_of(queries: torch.Tensor, scaling: float | None) -> float:
    """Return the factor on the dot products of a layer that names ``scaling``, or none."""
    return float(queries.shape[-1] ** -0.5) if scaling is None else scaling


class RaggedKeys:
    """Keys of a layer whose heads hold different numbers of tokens, on their way to attention.

    Model code hands on what its cache returns, and knows of no heads of different lengths. The
    attention of :func:`make_observable` opens this; to any other, which would take columns that
    hold nothing for keys, whatever it does with it is an error.

    Attributes:
        keys: ``(batch, num_kv_heads, kv_len, head_dim)``, each head right-aligned.
        hidden: ``(batch, num_kv_heads)`` int64: leading columns of each head that hold nothing.
    """

    __slots__ = ("hidden", "keys")

    def __init__(self, keys: torch.Tensor, hidden: torch.Tensor) -> None:
        self.keys = keys
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InvalidInputError(_NOT_OURS)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise InvalidInputError(_NOT_OURS)


_NOT_OURS: Final = (
    "the cache keeps different numbers of tokens in different heads or layers, which the model's "
    "attention cannot read; call chunkkv.make_observable(model) first"
)


@contextmanager
def observable(model: Any) -> Iterator[None]:
    """Let a transformers model's attention be probed inside the block.

    Not for use from two threads at once on one model. A service that probes for a lifetime calls
    :func:`make_observable` once.
    """
    before = model.config._attn_implementation
    make_observable(model)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def make_observable(model: Any) -> None:
    """Let a transformers model's attention be probed from now on. Idempotent.

    It also reads caches whose heads or layers keep different numbers of tokens.
    """
    base = model.config._attn_implementation or "eager"
    if base.startswith(_PREFIX):
        return
    name = _PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _probed(base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)


def _probed(base: str) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | RaggedKeys,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        probe: AttentionProbe | None = kwargs.pop(PROBE_ARGUMENT, None)
        instead: LayerAttention | None = kwargs.pop(ATTENTION_ARGUMENT, None)
        scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        if instead is not None and module.layer_idx in instead.layers:
            layer: int = module.layer_idx  # type: ignore[assignment]
            assert not isinstance(key, RaggedKeys)
            if kwargs.get("s_aux") is not None:
                raise InvalidInputError(
                    f"{type(module).__name__} has learned attention sinks, which recall does not "
                    "know; use another scorer, reconstruction for one"
                )
            return instead.attend(layer, query, key, value, scaling, softcap), None
        hidden: torch.Tensor | None = None
        if isinstance(key, RaggedKeys):
            # The model's mask speaks of columns that all heads and layers share.
            attention_mask = _ragged_mask(base, query, key)
            hidden, key = key.hidden, key.keys
        if probe is not None:
            layer = module.layer_idx  # type: ignore[assignment]
            probe.observe(layer, query, scaling, softcap, keys=key, hidden=hidden)
        run = _eager_of(module) if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
        return run(module, query, key, value, attention_mask, **kwargs)

    return attention


def _ragged_mask(base: str, query: torch.Tensor, key: RaggedKeys) -> torch.Tensor:
    """Return ``(batch, num_heads, q_len, kv_len)``: who sees whom, as ``base`` takes it.

    A query sees what its KV head holds, up to its own key; the queries' keys are the last ones.
    """
    if base not in ("sdpa", "eager"):
        raise InvalidInputError(
            f"{base} attention reads no cache that keeps different numbers of tokens in different "
            "heads or layers; load the model with sdpa or eager attention"
        )
    num_heads, q_len = query.shape[1:3]
    num_kv_heads, kv_len = key.keys.shape[1:3]
    columns = torch.arange(kv_len, device=query.device)
    visible = columns <= columns[kv_len - q_len :, None]  # (q_len, kv_len)
    visible = visible & (columns >= key.hidden[:, :, None, None])
    visible = visible.repeat_interleave(num_heads // num_kv_heads, dim=1)
    if base == "sdpa":
        return visible
    mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    return mask.masked_fill_(~visible, torch.finfo(query.dtype).min)


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    # Eager attention is not registered by name: each model file has its own.
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager
