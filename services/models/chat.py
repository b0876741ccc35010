"""Inputs to token ids: chat templates, raw text, and the turns that follow an earlier one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from chunkserve.v1 import types_pb2
from services.models.loader import LoadedModel
from services.runtime.errors import InvalidRequestError


class HasInput(Protocol):
    """A request whose ``input`` is a chat, a text or token ids."""

    chat: types_pb2.ChatInput
    text: str
    token_ids: types_pb2.TokenIds

    def WhichOneof(self, name: str) -> str | None:  # protobuf's name
        """Return which of them is set."""


def tokenize(loaded: LoadedModel, request: HasInput, *, before: Sequence[int] = ()) -> list[int]:
    """Return the tokens that an input adds to a conversation.

    Args:
        loaded: Whose tokenizer and template.
        request: The input.
        before: Tokens of the conversation so far; empty on the first turn.

    Returns:
        At least one id, each in ``[0, vocab_size)``. On a later turn of a chat, the tokens that
        close the answer before it come first, unless the model produced them itself.

    Raises:
        InvalidRequestError: The input is empty, names unknown tokens or roles, or needs a chat
            template that the model does not have.
    """
    kind = request.WhichOneof("input")
    if kind == "token_ids":
        ids = _checked_ids(loaded, request.token_ids.ids)
    elif kind == "text":
        # Only a text's beginning gets the model's start token.
        encoded = loaded.tokenizer(request.text, add_special_tokens=not before)
        ids = list(encoded["input_ids"])
    elif kind == "chat":
        ids = _chat_ids(loaded, request.chat, before)
    else:
        raise InvalidRequestError(
            "no input; set chat, text or token_ids", reason="EMPTY_PROMPT", field="input"
        )
    if not ids:
        raise InvalidRequestError(
            "prompt is empty; send at least one token", reason="EMPTY_PROMPT", field="input"
        )
    return ids


def _checked_ids(loaded: LoadedModel, ids: Sequence[int]) -> list[int]:
    vocab_size = int(loaded.model.config.get_text_config().vocab_size)
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"token_ids.ids[{index}] is {token}; {loaded.name} has tokens 0 to "
                f"{vocab_size - 1}",
                field=f"token_ids.ids[{index}]",
            )
    return list(ids)


def _chat_ids(loaded: LoadedModel, chat: types_pb2.ChatInput, before: Sequence[int]) -> list[int]:
    if loaded.tokenizer.chat_template is None:
        raise InvalidRequestError(
            f"{loaded.name} has no chat template; send text or token_ids", field="chat"
        )
    messages = [{"role": m.role, "content": m.content} for m in chat.messages]
    if not messages or messages[-1]["role"] == "assistant":
        raise InvalidRequestError(
            "a chat must end with a message that the model can answer; "
            f"it ends with {messages[-1]['role'] if messages else 'nothing'}",
            field="chat.messages",
        )
    if not before:
        return _encode(loaded, _render(loaded, messages))
    ids = _encode(loaded, _render_next_turn(loaded, messages))
    # An answer that ended by itself holds its closing token already.
    closed = before[-1] in loaded.eos_token_ids and ids[:1] == [before[-1]]
    return ids[1:] if closed else ids


def _render_next_turn(loaded: LoadedModel, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the template's text behind an assistant's answer, whatever stood before it.

    The model's tokens of earlier turns stay as they were generated: they are not decoded and
    rendered again, which could change them and would cost the stored KV cache.
    """
    answer = secrets.token_hex(16)
    earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": answer}]
    rendered = _render(loaded, [*earlier, *messages])
    _, found, behind = rendered.rpartition(answer)
    if not found:
        raise InvalidRequestError(
            f"the chat template of {loaded.name} leaves out earlier answers; send text",
            field="chat",
        )
    return behind


def _render(loaded: LoadedModel, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        rendered: Any = loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError) as error:
        raise InvalidRequestError(
            f"the chat template of {loaded.name} refuses these messages: {error}",
            field="chat.messages",
        ) from error
    return str(rendered)


def _encode(loaded: LoadedModel, rendered: str) -> list[int]:
    # The template has written the special tokens.
    return list(loaded.tokenizer(rendered, add_special_tokens=False)["input_ids"])
