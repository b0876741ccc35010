"""Models and tokenizers from a folder."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_model import EOS_TOKEN_ID, MAX_MODEL_LEN, byte_tokenizer, tiny_llama
from torch import nn

import chunkkv
from services.decode.config import DecodeSettings
from services.models.loader import load_model
from services.models.weights import WeightsDtype
from services.prefill.config import PrefillSettings
from services.runtime import config
from services.runtime.config import ServiceSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_loaded_model_knows_what_the_services_need(folder: Path):
    loaded = load_model(str(folder))

    assert loaded.name == "tiny"
    assert loaded.fingerprint == chunkkv.model_fingerprint(tiny_llama())
    assert loaded.max_model_len == MAX_MODEL_LEN
    assert loaded.eos_token_ids == {EOS_TOKEN_ID}
    assert loaded.device == torch.device("cpu")
    assert not loaded.model.training


def test_name_is_the_folders_unless_given(folder: Path):
    assert load_model(f"{folder}/").name == "tiny"
    assert load_model(str(folder), name="chosen").name == "chosen"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_as_asked_and_makes_another_model(folder: Path, dtype: str):
    loaded = load_model(str(folder), dtype=dtype)

    assert loaded.model.dtype == getattr(torch, dtype)
    same = loaded.fingerprint == chunkkv.model_fingerprint(tiny_llama())
    assert same == (dtype == "float32")


@pytest.mark.parametrize("weights_dtype", get_args(WeightsDtype))
def test_form_of_the_weights_makes_no_other_model(folder: Path, weights_dtype: WeightsDtype):
    loaded = load_model(str(folder), weights_dtype=weights_dtype)

    assert loaded.fingerprint == chunkkv.model_fingerprint(tiny_llama())
    assert loaded.model.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert (type(loaded.model.lm_head) is nn.Linear) == (weights_dtype == "model")


def test_packed_model_lets_go_of_the_file_that_it_was_mapped_from(tmp_path: Path):
    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    as_loaded = load_model(str(tmp_path))
    assert is_mapped()
    del as_loaded
    gc.collect()
    packed = load_model(str(tmp_path), weights_dtype="float32")

    assert not is_mapped()
    assert packed.model.num_parameters() > 0


def test_unknown_form_of_the_weights_is_refused(folder: Path):
    with pytest.raises(SystemExit, match=r"cannot load the model .* weights_dtype is 'int3'; use"):
        load_model(str(folder), weights_dtype="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [DecodeSettings, PrefillSettings])
def test_unknown_form_in_the_environment_names_the_variable(
    settings: type[ServiceSettings], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CHUNKSERVE_MODEL", "any")
    monkeypatch.setenv("CHUNKSERVE_WEIGHTS_DTYPE", "int3")

    with pytest.raises(SystemExit, match=r"CHUNKSERVE_WEIGHTS_DTYPE='int3': .*'auto', 'model'"):
        config.load(settings)


def test_every_token_that_ends_an_answer_is_known(tmp_path: Path):
    model = tiny_llama()
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    assert load_model(str(tmp_path)).eos_token_ids == {EOS_TOKEN_ID, 5, 6}


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    tiny_llama().save_pretrained(tmp_path)

    with pytest.raises(SystemExit, match="cannot load the model"):
        load_model(str(tmp_path))


def test_folder_with_half_of_a_model_is_refused(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:200] if file.suffix == ".safetensors" else data)

    with pytest.raises(SystemExit, match="cannot load the model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_device_that_is_not_there_is_refused(folder: Path, device: str):
    with pytest.raises(SystemExit, match="cannot load the model"):
        load_model(str(folder), device=device)
