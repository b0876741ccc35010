"""Attention of a batch of sequences that share nothing but a forward pass.

Enters a transformers model through its attention interface. All sequences' new tokens lie in one
row of tokens; each sequence attends to its own KV, in its own memory. No padding, no mask, and no
row of a batch can influence another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import chunkkv
from services.decode.geometry import KVGeometry, LayerGeometry
from services.decode.sequence_kv import SequenceKV

_NAME: Final = "chunkserve_sequences"


class Reader(Protocol):
    """Who takes a layer's new queries, keys and values, and answers with what was read."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`SequenceKV.attend`; ``new`` is the number of tokens of all sequences."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """The sequences of one forward pass.

    Attributes:
        sequences: Each with the number of its new tokens, in the order of the tokens.
    """

    sequences: Sequence[tuple[SequenceKV, int]]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`Reader.attend`."""
        read, start = [], 0
        for kv, new in self.sequences:
            own = slice(start, start + new)
            start += new
            read.append(
                kv.attend(
                    layer, query[own], key[:, own], value[:, own], softcap=softcap, sinks=sinks
                )
            )
        return torch.cat(read)


def use_sequences(model: Any) -> None:
    """Let a model attend to the :class:`SequenceKV` that come with a call, from now on."""
    model.set_attn_implementation(_NAME)


def forward(
    model: Any, token_ids: Sequence[int], position_ids: Sequence[int], reader: Reader, last: Any
) -> torch.Tensor:
    """Run the model once.

    Args:
        model: See :func:`use_sequences`.
        token_ids: New tokens of all sequences, one sequence after another.
        position_ids: Of each token in its sequence.
        reader: Gets each layer's attention.
        last: Indices of the tokens whose logits are wanted.

    Returns:
        ``(len(last), vocab_size)`` logits.
    """
    device = model.device
    output = model(
        input_ids=torch.tensor([token_ids], device=device),
        position_ids=torch.tensor([position_ids], device=device),
        use_cache=False,
        logits_to_keep=torch.tensor(last, device=device),
        chunkserve_reader=reader,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


@torch.inference_mode()
def kv_geometry(model: Any) -> KVGeometry:
    """Return the shape of a model's KV, by running one token through it.

    Args:
        model: See :func:`use_sequences`.

    Raises:
        InvalidInputError: A layer is neither full nor sliding-window attention.
    """
    windows = [
        getattr(layer, "sliding_window", None) if layer.is_sliding else None
        for layer in chunkkv.KVCache(model.config).layers
    ]
    seen = _Shapes()
    forward(model, [0], [0], seen, [0])
    layers = [
        LayerGeometry(*seen.shapes[index], window=window) for index, window in enumerate(windows)
    ]
    return KVGeometry(tuple(layers), dtype=str(seen.dtype).removeprefix("torch."))


class _Shapes:
    """Sees the shapes of a model's KV, and reads zeros."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self.dtype = torch.float32

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        self.shapes[layer] = (key.shape[0], key.shape[2], value.shape[2])
        self.dtype = key.dtype
        return query.new_zeros(*query.shape[:-1], value.shape[2])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    chunkserve_reader: Reader,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return ``(1, tokens, num_heads, value_dim)``.

    Args:
        query: ``(1, num_heads, tokens, key_dim)``.
        key: ``(1, num_kv_heads, tokens, key_dim)``.
        value: ``(1, num_kv_heads, tokens, value_dim)``.
    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    layer: int = module.layer_idx  # type: ignore[assignment]
    read = chunkserve_reader.attend(
        layer,
        query[0].view(num_kv_heads, -1, *query.shape[2:]).permute(2, 0, 1, 3),
        key[0],
        value[0],
        softcap=softcap,
        sinks=None if s_aux is None else s_aux.view(num_kv_heads, -1),
    )  # (tokens, num_kv_heads, group, value_dim)
    return read.reshape(1, -1, num_heads, value.shape[-1]), None


AttentionInterface.register(_NAME, _attention)
# Each sequence knows what its tokens may see, so no mask is made.
AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
