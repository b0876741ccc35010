"""The weights of a model's linear layers, in the form that decoding reads fastest.

A decode step reads every weight once for a handful of tokens, so it is as fast as the bytes of
the weights come in. Knows linear layers; knows nothing of attention, embeddings or norms.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import nn

from services.runtime.telemetry import get_logger

WeightsDtype = Literal["auto", "model", "float32", "bfloat16", "int8"]

# The number of rows that oneDNN chooses its layout for: the fastest one for 1 to 32 rows.
_ROWS_HINT: Final = 8
# torch's int8 kernel reads weights in such steps, past their end if there is a rest.
_INT8_STEP: Final = 16

_log = get_logger()


def pack_weights(model: nn.Module, weights_dtype: WeightsDtype = "auto") -> WeightsDtype:
    """Bring the linear layers of a model into one form, in place.

    Each ``nn.Linear`` gives way to a module that holds its weight in that form only, and takes
    and returns what it did: ``(..., in_features)`` to ``(..., out_features)`` in the activations'
    dtype. A language model's head is such a layer; an embedding that shares its weight stays.
    Left alone are subclasses of ``nn.Linear``, layers with hooks or a ``forward`` of their own
    (LoRA wrappers, offloading), and with ``int8`` those whose ``in_features`` is no multiple of
    16. A packed model can neither be trained, saved nor moved.

    In all forms but ``model``, a row's result does not depend on the rows beside it.

    Args:
        model: On one device. Its fingerprint must be computed before.
        weights_dtype: One of

            - ``model``: as loaded;
            - ``float32``, ``bfloat16``: laid out by oneDNN; the activations are cast;
            - ``int8``: symmetric, one scale for each output feature; activations in bfloat16;
            - ``auto``: on a CPU the dtype of the model, laid out by oneDNN; else ``model``.

    Returns:
        The form that was chosen: ``model`` where torch was built without oneDNN, else what was
        asked for.

    Raises:
        ValueError: There is no such form, or not on the model's device.
    """
    form = _choose(model, weights_dtype)
    if form == "model":
        return form
    packed: dict[nn.Linear, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_plain(child, form):
                # A layer that stands in two places is packed once.
                if child not in packed:
                    packed[child] = _pack(child, form)
                setattr(parent, name, packed[child])
    _log.info("models.weights_packed", weights_dtype=form, num_layers=len(packed))
    return form


class OneDnnLinear(nn.Module):
    """A linear layer whose weight oneDNN has laid out for few rows.

    Args:
        linear: The layer; not changed.
        dtype: Of the weight and of the product, float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.to(dtype), _ROWS_HINT)
        self.register_buffer("weight", weight, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in_features)
        rows = x.reshape(-1, self.in_features).to(self.weight.dtype)
        num_rows = rows.shape[0]
        if num_rows == 1:
            # One row alone takes another kernel, which adds in another order.
            rows = rows.expand(2, -1)
        y = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return y[:num_rows].to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits, one scale for each output feature.

    Args:
        linear: The layer; not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        # The kernel takes scales in bfloat16: rounded first, their error ends in the weights.
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12).bfloat16()
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in_features)
        rows = x.reshape(-1, self.in_features).bfloat16()
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def _choose(model: nn.Module, weights_dtype: WeightsDtype) -> WeightsDtype:
    if weights_dtype not in get_args(WeightsDtype):
        raise ValueError(
            f"weights_dtype is {weights_dtype!r}; use one of {', '.join(get_args(WeightsDtype))}"
        )
    parameter = next(model.parameters())
    if weights_dtype == "model" or (weights_dtype == "auto" and parameter.device.type != "cpu"):
        return "model"
    if parameter.device.type != "cpu":
        raise ValueError(
            f"weights_dtype is {weights_dtype!r}, which needs a CPU, and the model is on "
            f"{parameter.device}; use auto or model"
        )
    if weights_dtype == "int8":
        return "int8"
    if not torch.backends.mkldnn.is_available():
        _log.warning("models.weights_not_packed", reason="torch was built without oneDNN")
        return "model"
    return _AUTO.get(parameter.dtype, "model") if weights_dtype == "auto" else weights_dtype


_AUTO: Final[dict[torch.dtype, WeightsDtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


def _is_plain(module: nn.Module, form: WeightsDtype) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return form != "int8" or module.in_features % _INT8_STEP == 0


def _pack(linear: nn.Linear, form: WeightsDtype) -> nn.Module:
    if form == "int8":
        return Int8Linear(linear)
    return OneDnnLinear(linear, torch.float32 if form == "float32" else torch.bfloat16)
