"""Tiny random decoders of every family that the library knows: built from a config, no download."""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE: Final = 97
NUM_LAYERS: Final = 4
SLIDING_WINDOW: Final = 16

_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough that attention is far from uniform and answers do not repeat one token.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED_LAYERS: Final = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)

_FAMILIES: Final[dict[str, tuple[Any, Any, dict[str, Any]]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral_sliding": (MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _MIXED_LAYERS,
            # Tied, random weights only repeat the last token.
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
}

FAMILIES: Final = tuple(_FAMILIES)
FULL_ATTENTION_FAMILIES: Final = ("llama", "qwen2", "qwen3", "mistral", "phi3")


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **config: Any,
) -> Any:
    """Return a model of four layers, with four query and two KV heads unless ``config`` differs."""
    config_class, model_class, extra = _FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = config_class(**{**_SHAPE, **extra, **config}, attn_implementation=attention)
        return model_class(made).to(dtype).eval()


def prompts(*lengths: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask ``(len(lengths), max(lengths))``, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, VOCAB_SIZE, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()
