"""Loads a model and its tokenizer, and knows what the services need to know of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkkv
from services.models.weights import WeightsDtype, pack_weights

# A damaged file; a device that is not there (torch built without it fails an assertion).
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, AssertionError, SafetensorError)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model, ready to run.

    Attributes:
        name: The name that requests give.
        model: A transformers decoder in evaluation mode.
        tokenizer: Its tokenizer.
        fingerprint: Identity of architecture and weights (``chunkkv.model_fingerprint``).
        max_model_len: Tokens of prompt and answer together.
        eos_token_ids: Tokens that end an answer.
    """

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    max_model_len: int
    eos_token_ids: frozenset[int]

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = self.model.device
        return device


def load_model(
    path: str,
    *,
    name: str = "",
    device: str = "cpu",
    dtype: str = "auto",
    weights_dtype: WeightsDtype = "model",
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        path: Local folder in the Hugging Face layout, or a hub id.
        name: The name that requests give; the last part of ``path`` if empty.
        device: A torch device, for example ``cpu`` or ``cuda:0``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        weights_dtype: Of the linear layers while they work (:func:`pack_weights`). Whatever it
            is, the model's identity is that of the weights as loaded.

    Raises:
        SystemExit: There is no such model, it cannot be read, or its weights cannot be had in
            that form; the message says which.
    """
    torch_dtype = dtype if dtype == "auto" else DTYPES[dtype]
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except _LOAD_ERRORS as error:
        raise SystemExit(f"cannot load the model {path!r}: {error}") from error
    fingerprint = chunkkv.model_fingerprint(model)
    try:
        pack_weights(model, weights_dtype)
    except ValueError as error:
        raise SystemExit(f"cannot load the model {path!r}: {error}") from error
    return LoadedModel(
        name=name or os.path.basename(os.path.normpath(path)),
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        max_model_len=int(model.config.get_text_config().max_position_embeddings),
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
