"""``chunkserve models`` and ``chunkserve count``."""

from __future__ import annotations

from typing import Annotated

import typer

from chunkserve_client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from services.cli import options
from services.cli.generate import input_text
from services.cli.output import policy_text, print_json, print_table


def models(
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """List the models that can be asked now."""
    with options.connect(address, timeout) as client:
        found = client.list_models()
    if json:
        print_json(found)
        return
    columns = ("model", "max tokens", "prefill workers", "decode workers", "default compression")
    print_table(
        columns,
        [
            (
                model.name,
                str(model.max_model_len),
                str(model.num_prefill_workers),
                str(model.num_decode_workers),
                policy_text(model.default_compression),
            )
            for model in found
        ],
    )


def count(
    prompt: Annotated[
        str | None, typer.Argument(help="The text. Left out: --file, then stdin.")
    ] = None,
    file: options.File = None,
    raw: Annotated[bool, typer.Option("--raw", help="Count without a chat template.")] = False,
    model: options.ModelName = None,
    json: options.Json = False,
    address: options.Address = DEFAULT_ADDRESS,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Count the tokens of a text as the model would read them."""
    text = input_text(prompt, file)
    with options.connect(address, timeout) as client:
        if raw:
            counted = client.count_tokens(text=text, model=model)
        else:
            counted = client.count_tokens(text, model=model)
    if json:
        print_json(counted)
    else:
        typer.echo(counted.num_tokens)
