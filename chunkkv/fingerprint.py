"""Which model made a KV cache: one string for architecture and weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import torch

# Config entries that change nothing in a KV cache.
_VOLATILE: Final = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_attn_implementation",
        "attn_implementation",
        "transformers_version",
        "use_cache",
        "dtype",
        "torch_dtype",
        "architectures",
    }
)

_SAMPLES_PER_TENSOR: Final = 256


def model_fingerprint(model: Any) -> str:
    """Return an identity of a transformers model: 32 hexadecimal characters.

    Hashes the class, the configuration, and of every parameter its name, shape, dtype and evenly
    spaced values: a fine-tune, another precision or another rope setting is another model. Reads
    a few kilobytes whatever the model's size. A changed weight between the samples is not seen.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)
        stride = max(1, values.numel() // _SAMPLES_PER_TENSOR)
        sample = values[::stride].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]
