"""The shape of a model's KV, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import chunkkv


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One layer's KV.

    Attributes:
        num_kv_heads: Key/value heads.
        key_dim: Width of a key.
        value_dim: Width of a value.
        window: Tokens that a query sees, itself included; ``None``: all.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """A model's KV.

    Attributes:
        layers: One for each layer.
        dtype: Of keys and values as the model makes them, for example ``float32``.
    """

    layers: tuple[LayerGeometry, ...]
    dtype: str

    def span_shape(
        self,
        lengths: Sequence[int],
        *,
        has_own_lists: bool = False,
        first_token: int = 0,
        num_tokens: int = 0,
        fingerprint: str = "",
        policy: str = "",
    ) -> chunkkv.SpanShape:
        """Return the shape of a span without scores.

        Args:
            lengths: For each layer, tokens that each of its KV heads holds.
            has_own_lists: Each KV head of each layer has positions of its own; else the heads of a
                layer share a list, and so do layers of equal length.
            first_token: Position of the span's first token.
            num_tokens: Tokens of the span, held or not.
            fingerprint: Of the model.
            policy: What the tokens were chosen by.
        """
        if has_own_lists:
            index_lengths = [
                length * layer.num_kv_heads
                for length, layer in zip(lengths, self.layers, strict=True)
            ]
            lists = list(range(len(lengths)))
        else:
            index_lengths = sorted(set(lengths))
            lists = [index_lengths.index(length) for length in lengths]
        return chunkkv.SpanShape(
            fingerprint=fingerprint,
            policy=policy,
            first_token=first_token,
            num_tokens=num_tokens,
            dtype=self.dtype,
            layers=tuple(
                chunkkv.LayerShape(
                    lengths=(length,) * layer.num_kv_heads,
                    key_dim=layer.key_dim,
                    value_dim=layer.value_dim,
                    index_list=which,
                    is_sliding=layer.window is not None,
                )
                for layer, length, which in zip(self.layers, lengths, lists, strict=True)
            ),
            index_lengths=tuple(index_lengths),
            has_scores=False,
        )
