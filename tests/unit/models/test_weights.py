"""Linear layers in the forms that decoding reads fast."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from services.models.weights import Int8Linear, OneDnnLinear, pack_weights
from tests.models import FAMILIES, VOCAB_SIZE, prompts, tiny_model

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)

PACKED = ("float32", "bfloat16", "int8")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=ids).logits
    return out


def packed_linear(form: str, *, bias: bool = True, seed: int = 0) -> tuple[nn.Linear, nn.Module]:
    """Return a layer of 96 to 33 features, and the same packed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(96, 33, bias=bias)
    if form == "int8":
        return linear, Int8Linear(linear)
    return linear, OneDnnLinear([linear], getattr(torch, form))


def weight_bytes(model: nn.Module) -> int:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_float32_gives_the_same_logits(family: str):
    model = tiny_model(family)
    ids, _ = prompts(40, 40)
    before = logits(model, ids)

    assert pack_weights(model, "float32") == "float32"

    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "tolerance"), [("bfloat16", 0.03), ("int8", 0.1)])
def test_narrow_forms_stay_close(family: str, form: str, tolerance: float):
    """Within a share of the logits' spread; random weights are a harder case than trained ones."""
    model = tiny_model(family)
    ids, _ = prompts(40, 40)
    before = logits(model, ids)

    pack_weights(model, form)

    after = logits(model, ids)
    assert after.dtype == torch.float32
    error = (after - before).square().mean().sqrt() / before.std()
    assert 0 < error < tolerance


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_is_the_product_of_its_rounded_parts(form: str, bias: bool):
    linear, packed = packed_linear(form, bias=bias)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))

    y = packed(x)

    # Each weight is off by half a step at most: of bfloat16, or of 1/127 of its row's largest.
    step = {"float32": 1e-6, "bfloat16": 2**-8, "int8": 2**-7}[form]
    largest = linear.weight.abs().amax(dim=1)
    bound = step * (x.abs().sum(dim=1, keepdim=True) * largest + linear(x).abs())
    assert ((y - linear(x)).abs() <= bound).all()


@pytest.mark.parametrize("form", PACKED)
def test_rows_do_not_depend_on_the_rows_beside_them(form: str):
    _, packed = packed_linear(form)
    x = torch.randn(33, 96, generator=torch.Generator().manual_seed(1))

    whole = packed(x)

    for num_rows in range(1, 34):
        assert torch.equal(packed(x[:num_rows]), whole[:num_rows])
        assert torch.equal(packed(x[-num_rows:]), whole[-num_rows:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", PACKED)
def test_in_no_layer_of_a_model_do_rows_depend_on_the_batch(family: str, form: str):
    model = tiny_model(family)
    pack_weights(model, form)
    layers = [m for m in model.modules() if isinstance(m, OneDnnLinear | Int8Linear)]

    for layer in layers:
        x = torch.randn(33, layer.in_features, generator=torch.Generator().manual_seed(2))
        whole = layer(x)
        assert all(torch.equal(layer(x[:n]), whole[:n]) for n in range(1, 34))


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_of_the_activations_are_kept(form: str, dtype: torch.dtype):
    _, packed = packed_linear(form)
    x = torch.randn(2, 3, 96).to(dtype)

    assert packed(x).dtype == dtype
    assert packed(x).shape == (2, 3, 33)
    assert packed(x[:, :0]).shape == (2, 0, 33)
    # What a transposed or sliced activation looks like.
    strided = torch.randn(3, 2, 96).to(dtype).transpose(0, 1)
    assert torch.equal(packed(strided), packed(strided.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", PACKED)
def test_a_model_of_16_bits_returns_its_dtype(dtype: torch.dtype, form: str):
    model = tiny_model(dtype=dtype)
    ids, _ = prompts(20)
    before = logits(model, ids)

    pack_weights(model, form)

    after = logits(model, ids)
    assert after.dtype == model.dtype == dtype
    assert (after - before).float().square().mean().sqrt() < 0.1 * before.float().std()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("form", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_the_packed_weights_replace_the_others(tied: bool, form: str, width: int):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    linear = [m for m in model.modules() if type(m) is nn.Linear]
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    head = VOCAB_SIZE * model.config.hidden_size
    body = sum(m.weight.numel() for m in linear) - head
    num_features = sum(m.out_features for m in linear)

    pack_weights(model, form)

    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    rest = weight_bytes(model) - width * body - 4 * head - 4 * head  # head and embedding
    assert 0 <= rest < 16 * num_features  # norms, biases, scales, oneDNN's alignment
    gone = {id(m.weight) for m in linear}
    assert not gone & {id(p) for p in model.parameters() if p is not embedding}


def test_old_weights_are_freed_while_others_are_packed():
    """In a process of its own, whose peak of memory is its own."""
    script = """
import json, resource, torch
from tests.models import tiny_model
from services.models.weights import pack_weights

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

model = tiny_model(hidden_size=512, intermediate_size=4096, num_hidden_layers=24)
size = sum(p.numel() * p.element_size() for p in model.parameters())
pack_weights(tiny_model(), "float32")
before = peak()
pack_weights(model, "float32")
print(json.dumps({"size": size, "grown": peak() - before}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    seen = json.loads(done.stdout.splitlines()[-1])

    assert seen["size"] > 600e6
    assert seen["grown"] < 0.6 * seen["size"]


def test_a_layer_in_two_places_stays_one():
    model = tiny_model()
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj

    pack_weights(model, "float32")

    assert isinstance(layers[0].mlp.up_proj, OneDnnLinear)
    assert layers[1].mlp.up_proj is layers[0].mlp.up_proj


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_projections_of_one_input_are_multiplied_at_once(family: str):
    model = tiny_model(family)
    attention = model.model.layers[0].self_attn
    names = ("q_proj", "k_proj", "v_proj")
    x, other = torch.randn(2, 1, 5, 64)
    before = [getattr(attention, name)(x) for name in names]
    keys_of_other = attention.k_proj(other)

    pack_weights(model, "float32")

    parts = [getattr(attention, name) for name in names]
    assert len({part.fused for part in parts}) == 1
    for _ in range(2):
        after = [part(x) for part in parts]
        torch.testing.assert_close(after, before)
    # In any order, for another input, twice for one: never another's result.
    torch.testing.assert_close([part(x) for part in reversed(parts)], before[::-1])
    torch.testing.assert_close(parts[0](x), before[0])
    torch.testing.assert_close(parts[1](other), keys_of_other)
    torch.testing.assert_close(parts[1](other), keys_of_other)
    torch.testing.assert_close(parts[2](x), before[2])


def test_fused_layers_hold_nothing_once_all_results_are_taken():
    model = tiny_model()
    pack_weights(model, "float32")
    inputs = weakref.WeakSet()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: inputs.add(args[0]))

    logits(model, prompts(5)[0])

    gc.collect()
    assert len(inputs) == 0


def test_the_head_of_a_float32_model_is_not_rounded():
    wide, narrow = tiny_model(), tiny_model(dtype=torch.bfloat16)

    for model in (wide, narrow):
        pack_weights(model, "bfloat16")

    assert wide.lm_head.weight.dtype == torch.float32
    assert wide.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert narrow.lm_head.weight.dtype == torch.bfloat16


class Adapter(nn.Linear):
    """A layer with a forward of its own, as adapters have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def test_layers_that_do_more_than_multiply_are_left_alone():
    model = tiny_model()
    first, second, third = (model.model.layers[i].mlp for i in range(3))
    first.up_proj = Adapter(64, 96, bias=False)
    hooked, patched = second.up_proj, third.up_proj
    hooked.register_forward_hook(lambda module, args, output: output)
    patched.forward = patched.forward
    left_alone = [first.up_proj, hooked, patched]

    pack_weights(model, "float32")

    assert [first.up_proj, second.up_proj, third.up_proj] == left_alone
    assert isinstance(first.down_proj, OneDnnLinear)


def test_int8_leaves_layers_alone_that_its_kernel_would_read_past():
    model = tiny_model(intermediate_size=90)
    ids, _ = prompts(20)

    pack_weights(model, "int8")

    mlp = model.model.layers[0].mlp
    assert type(mlp.down_proj) is nn.Linear
    assert isinstance(mlp.up_proj, Int8Linear)
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "model")],
)
def test_auto_on_a_cpu_keeps_the_models_precision(dtype: torch.dtype, chosen: str):
    model = tiny_model(dtype=dtype)

    assert pack_weights(model) == chosen
    assert (type(model.lm_head) is nn.Linear) == (chosen == "model")


def test_model_is_as_loaded():
    model = tiny_model()
    weight = model.lm_head.weight

    assert pack_weights(model, "model") == "model"
    assert model.lm_head.weight is weight


def test_without_onednn_the_model_stays_as_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = tiny_model()

    assert pack_weights(model, "float32") == "model"
    assert type(model.lm_head) is nn.Linear


def test_on_another_device_auto_is_as_loaded_and_the_others_are_refused():
    model = tiny_model().to("meta")

    assert pack_weights(model, "auto") == "model"
    with pytest.raises(ValueError, match=r"weights_dtype is 'int8'.*on meta; use auto or model"):
        pack_weights(model, "int8")


def test_an_unknown_form_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="weights_dtype is 'int3'; use one of auto, model, float"):
        pack_weights(tiny_model(), "int3")  # type: ignore[arg-type]
