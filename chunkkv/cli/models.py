"""Models, texts and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from chunkkv.errors import InvalidInputError

CONSOLE: Final = Console()
NOTES: Final = Console(stderr=True)
"""Where progress goes, so that a table can be piped."""

ModelId = Annotated[str, typer.Argument(help="Folder of a transformers model, or its hub id.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights; auto: as they are stored.")]
Device = Annotated[str, typer.Option(help="Where the model runs, for example cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads that torch uses.")]
Text = Annotated[Path, typer.Option(help="UTF-8 text to measure on.")]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        help="Method: a preset, or preset:field=value,... May be given again; all if not given.",
    ),
]
KeepRatios = Annotated[
    list[float] | None, typer.Option("--keep-ratio", help="Fraction kept; may be given again.")
]


def load_model(
    name: str, *, dtype: str = "auto", device: str = "cpu", threads: int | None = None
) -> tuple[Any, Any]:
    """Return a model in evaluation mode and its tokenizer.

    Raises:
        InvalidInputError: There is no such type.
        OSError: There is no such model.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InvalidInputError(f"no type {dtype!r}; give auto, float32, bfloat16 or float16")
    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return model, AutoTokenizer.from_pretrained(name)


def read_tokens(tokenizer: Any, path: Path) -> list[int]:
    """Return the token ids of a text file.

    Raises:
        InvalidInputError: It is no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path} is no UTF-8 text: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
