"""The weights of a model's linear layers, in the form that decoding reads fastest.

A decode step reads every weight once for a handful of tokens, so it is as fast as the bytes of
the weights come in. Knows linear layers; knows nothing of attention, embeddings or norms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from services.runtime.telemetry import get_logger

WeightsDtype = Literal["auto", "model", "float32", "bfloat16", "int8"]

# The number of rows that oneDNN chooses its layout for: the fastest one for 1 to 32 rows.
_ROWS_HINT: Final = 8
# torch's int8 kernel reads weights in such steps, past their end if there is a rest.
_INT8_STEP: Final = 16

# Layers of one parent that multiply the same input.
_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Of a float16 model, none: few CPUs multiply it.
_AUTO: Final[dict[torch.dtype, WeightsDtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}

_log = get_logger()


def pack_weights(model: Any, weights_dtype: WeightsDtype = "auto") -> WeightsDtype:
    """Bring the linear layers of a model into one form, in place.

    Each ``nn.Linear`` gives way to a module that holds its weight in that form only, and takes
    and returns what it did: ``(..., in_features)`` to ``(..., out_features)`` in the activations'
    dtype. An embedding that shares its weight with the head stays as it is. Left alone are
    subclasses of ``nn.Linear``, layers with hooks or a ``forward`` of their own (LoRA wrappers,
    offloading), and with ``int8`` those whose ``in_features`` is no multiple of 16. Projections
    of one input (queries, keys and values; gate and up) are multiplied at once, except in int8.
    A packed model can neither be trained, saved nor moved.

    In all forms but ``model``, a row's result does not depend on the rows beside it.

    Args:
        model: A transformers model on one device. Its fingerprint must be computed before.
        weights_dtype: One of

            - ``model``: as loaded;
            - ``float32``, ``bfloat16``: laid out by oneDNN; the activations are cast;
            - ``int8``: symmetric, one scale for each output feature; activations in bfloat16;
            - ``auto``: on a CPU the dtype of the model, laid out by oneDNN; else ``model``.

            The head of a float32 model is float32 in all of them: the kernels of the others
            return bfloat16, in which the best logits are often equal.

    Returns:
        The form that was chosen: ``model`` where torch was built without oneDNN, else what was
        asked for.

    Raises:
        ValueError: There is no such form, or not on the model's device.
    """
    form = _choose(model, weights_dtype)
    if form == "model":
        return form
    groups = _groups(model, form)
    _log.info("models.weights_packed", weights_dtype=form, num_products=len(groups))
    # One group after the other, so that old weights are free before the next are packed.
    while groups:
        for path, packed in _pack(*groups.pop()).items():
            model.set_submodule(path, packed)
    # What is left may lie in the mapped file of the whole model: copied, it lets go of the file.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return form


class OneDnnLinear(nn.Module):
    """Linear layers of one input, whose weights oneDNN has laid out for few rows.

    Takes ``(batch, ..., in_features)``, returns ``(batch, ..., sum of out_features)``.

    Args:
        linears: The layers, all with a bias or all without; not changed.
        dtype: Of the weights and of the product, float32 or bfloat16.
    """

    weight: torch.Tensor  # opaque: oneDNN's layout
    bias: torch.Tensor | None

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight = torch.cat([linear.weight.detach().to(dtype) for linear in linears])
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self.register_buffer("weight", weight, persistent=False)
        biases = [linear.bias.detach().float() for linear in linears if linear.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)
        self._dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.to(self._dtype)
        if x.numel() != self.in_features:
            return self._product(rows).to(x.dtype)
        # One row alone takes another kernel, which adds in another order.
        return self._product(torch.cat((rows, rows)))[:1].to(x.dtype)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, "none", [], ""
        )
        return y


class FusedLinears(nn.Module):
    """Linear layers of one input, multiplied at once when the first of them is called.

    Nobody may change the input in place until the last of them was called.

    Args:
        linears: The layers, all with a bias or all without; not changed.
        dtype: Of the weights and of the product, float32 or bfloat16.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        super().__init__()
        self.product = OneDnnLinear(linears, dtype)
        self._sizes = [linear.out_features for linear in linears]
        # The last input and the layers' results that nobody has taken. One tuple, read and
        # written at once: a thread that finds another's input multiplies again.
        self._held: tuple[torch.Tensor | None, dict[int, torch.Tensor]] = (None, {})

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer ``index`` makes of ``x``."""
        source, results = self._held
        if source is not x or index not in results:
            results = dict(enumerate(self.product(x).split(self._sizes, dim=-1)))
        y = results.pop(index)
        self._held = (x, results) if results else (None, {})
        return y


class LinearPart(nn.Module):
    """Stands where one of the layers of ``FusedLinears`` stood."""

    def __init__(self, fused: FusedLinears, index: int) -> None:
        super().__init__()
        self.fused = fused
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.take(self._index, x)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits, one scale for each output feature.

    Args:
        linear: The layer; not changed.
    """

    weight: torch.Tensor  # (out_features, in_features), int8
    scale: torch.Tensor  # (out_features,), bfloat16
    bias: torch.Tensor | None

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


def _choose(model: Any, weights_dtype: WeightsDtype) -> WeightsDtype:
    if weights_dtype not in get_args(WeightsDtype):
        raise ValueError(
            f"weights_dtype is {weights_dtype!r}; use one of {', '.join(get_args(WeightsDtype))}"
        )
    is_auto, on_cpu = weights_dtype == "auto", model.device.type == "cpu"
    if weights_dtype == "model" or (is_auto and not on_cpu):
        return "model"
    if not on_cpu:
        raise ValueError(
            f"weights_dtype is {weights_dtype!r}, which needs a CPU, and the model is on "
            f"{model.device}; use auto or model"
        )
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        _log.warning("models.weights_not_packed", reason="torch was built without oneDNN")
        return "model"
    return _AUTO.get(model.dtype, "model") if is_auto else weights_dtype


def _groups(model: Any, form: WeightsDtype) -> list[tuple[WeightsDtype, dict[str, nn.Linear]]]:
    """Return the layers to pack, by path; together those that are multiplied at once."""
    places: defaultdict[nn.Linear, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_packable(module, form):
            places[module].append(path)
    groups: defaultdict[Hashable, dict[str, nn.Linear]] = defaultdict(dict)
    for linear, paths in places.items():
        parent, _, name = paths[0].rpartition(".")
        together: Hashable = name
        if form != "int8" and len(paths) == 1:
            together = next((names for names in _FUSED if name in names), name)
        key = (parent, together, linear.in_features, linear.bias is None)
        groups[key].update(dict.fromkeys(paths, linear))
    head = model.get_output_embeddings()
    head_form: WeightsDtype = form if model.dtype == torch.bfloat16 else "float32"
    return [(head_form if head in each.values() else form, each) for each in groups.values()]


def _is_packable(module: nn.Module, form: WeightsDtype) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return form != "int8" or module.in_features % _INT8_STEP == 0


def _pack(form: WeightsDtype, group: Mapping[str, nn.Linear]) -> dict[str, nn.Module]:
    """Return what takes the place of the layers, by path."""
    linears = list(dict.fromkeys(group.values()))
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    packed: list[nn.Module]
    if form == "int8":
        packed = [Int8Linear(linear) for linear in linears]
    elif len(linears) == 1:
        packed = [OneDnnLinear(linears, dtype)]
    else:
        fused = FusedLinears(linears, dtype)
        packed = [LinearPart(fused, index) for index in range(len(linears))]
    by_linear = dict(zip(linears, packed, strict=True))
    return {path: by_linear[linear] for path, linear in group.items()}
