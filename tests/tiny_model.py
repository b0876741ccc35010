"""A tiny random Llama with a tokenizer of bytes: a real decoder that needs no download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import chunkkv
from services.decode.geometry import KVGeometry, LayerGeometry
from services.models.loader import LoadedModel

EOS_TOKEN_ID = 0
MAX_MODEL_LEN = 256
# Of the tiny Llama's KV.
GEOMETRY = KVGeometry((LayerGeometry(num_kv_heads=2, key_dim=8, value_dim=8),) * 2, "float32")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte (1 to 256) and one special token (0)."""
    pieces = ["<end>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def tiny_llama(
    *, seed: int = 0, max_model_len: int = MAX_MODEL_LEN, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return a Llama of 2 layers with 4 query and 2 KV heads, whose answers do not repeat much."""
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_model_len,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=EOS_TOKEN_ID,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def load_tiny(
    *, seed: int = 0, max_model_len: int = MAX_MODEL_LEN, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Return what ``load_model`` returns, of a tiny Llama."""
    model = tiny_llama(seed=seed, max_model_len=max_model_len, dtype=dtype)
    return LoadedModel(
        name="tiny",
        model=model,
        tokenizer=byte_tokenizer(),
        fingerprint=chunkkv.model_fingerprint(model),
        max_model_len=max_model_len,
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
    )


def generate(loaded: LoadedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Return transformers' own greedy answer, without an end."""
    with torch.inference_mode():
        output = loaded.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS_TOKEN_ID,
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer
