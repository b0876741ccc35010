"""A model's rotary position encoding, undone and averaged.

Calls the model's own code, so that every layout and scaling is the model's. Knows no scores.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from chunkkv.errors import InvalidInputError


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotation of a model's queries and keys.

    Attributes:
        embedding: The model's rotary embedding, a copy: those that follow the length of the text
            change when they are asked for far positions.
        apply: The function of the model's file that rotates with its cosines and sines.
        is_by_layer_type: Whether layers of different types rotate differently (Gemma 3).
    """

    embedding: Any
    apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    is_by_layer_type: bool

    @classmethod
    def of(cls, model: Any) -> Rotary:
        """Return a transformers model's rotation.

        Raises:
            InvalidInputError: The model does not rotate all of its layers' queries in the way that
                transformers' Llama and its kin do.
        """
        base = model.base_model
        embedding = getattr(base, "rotary_emb", None)
        apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        if embedding is None or apply is None or getattr(base.config, "no_rope_layers", None):
            raise InvalidInputError(
                f"{type(base).__name__} does not rotate the queries of all its layers as Llama "
                "does; choose another scorer than expected_attention"
            )
        is_by_layer_type = "layer_type" in inspect.signature(embedding.forward).parameters
        return cls(copy.deepcopy(embedding), apply, is_by_layer_type)

    def undone(self, queries: torch.Tensor, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Return queries as they were before position encoding.

        Args:
            queries: ``(batch, num_heads, q_len, head_dim)``, after position encoding.
            layer: Index of their layer.
            positions: ``(batch, q_len)`` int64.

        Returns:
            The same shape, float32.
        """
        cosines, sines = self._angles(queries, layer, positions)
        # Turns back by the very numbers that the model used, whatever their rounding and scale.
        squares = cosines.square() + sines.square()
        return self._rotated(queries.float(), cosines / squares, -sines / squares)

    def averaged(self, vectors: torch.Tensor, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """Return the mean of each vector's rotations to all of its row's positions.

        Args:
            vectors: ``(batch, num_heads, n, head_dim)`` float32, before position encoding.
            layer: Index of their layer.
            positions: ``(batch, num_positions)`` int64.
        """
        cosines, sines = self._angles(vectors, layer, positions)
        return self._rotated(
            vectors, cosines.mean(dim=1, keepdim=True), sines.mean(dim=1, keepdim=True)
        )

    def _angles(
        self, like: torch.Tensor, layer: int, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines ``(batch, positions, rotated dims)`` float32."""
        kind = (self.embedding.config.layer_types[layer],) if self.is_by_layer_type else ()
        cosines, sines = self.embedding(like, positions, *kind)
        return cosines.float(), sines.float()

    def _rotated(
        self, vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        # The function rotates queries and keys: here, the keys of no head.
        return self.apply(vectors, vectors[:, :0], cosines, sines)[0]
