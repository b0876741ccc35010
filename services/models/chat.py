"""Inputs to token ids: chat templates, raw text, and the turns that follow an earlier one."""

from __future__ import annotations

import os
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


def prefix_ends(
    loaded: LoadedModel,
    request: HasInput,
    token_ids: Sequence[int],
    *,
    before: Sequence[int] = (),
) -> list[int]:
    """Return where the prefixes end that messages of an input mark with ``cache_breakpoint``.

    A prefix ends behind its message's last token that does not depend on what follows: characters
    that the tokenizer joins with what comes next belong to what comes next.

    Args:
        loaded: Whose tokenizer and template.
        request: The input.
        token_ids: What ``tokenize`` returned for it.
        before: Tokens of the conversation so far.

    Returns:
        For each marked message, how many of ``token_ids`` belong to its prefix.

    Raises:
        InvalidRequestError: The template writes a marked message otherwise when others follow.
    """
    if request.WhichOneof("input") != "chat":
        return []
    marked = [i for i, message in enumerate(request.chat.messages) if message.cache_breakpoint]
    if not marked:
        return []
    messages = _messages(request.chat)
    whole = _render_turn(loaded, messages, before)
    return [
        _num_common(
            token_ids,
            _encode_turn(loaded, _prefix_text(loaded, messages[: i + 1], whole, before), before),
        )
        for i in marked
    ]


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
    messages = _messages(chat)
    if not messages or messages[-1]["role"] == "assistant":
        raise InvalidRequestError(
            "a chat must end with a message that the model can answer; "
            f"it ends with {messages[-1]['role'] if messages else 'nothing'}",
            field="chat.messages",
        )
    return _encode_turn(loaded, _render_turn(loaded, messages, before), before)


def _messages(chat: types_pb2.ChatInput) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in chat.messages]


def _prefix_text(
    loaded: LoadedModel,
    messages: Sequence[Mapping[str, str]],
    whole: str,
    before: Sequence[int],
) -> str:
    """Return the text of a turn's first messages as it stands at the beginning of the whole turn.

    What the template adds behind a last message is left out; the last message itself must be there.
    """
    index = len(messages) - 1
    try:
        alone = _render_turn(loaded, messages, before, add_generation_prompt=False)
    except InvalidRequestError:
        alone = ""
    shared = os.path.commonprefix([alone, whole])  # noqa: RUF071  # text, not paths
    if messages[-1]["content"].strip() not in shared:
        raise InvalidRequestError(
            f"the chat template of {loaded.name} writes messages[{index}] otherwise when others "
            "follow it, so no prefix can end there; mark a later message, or send text",
            field=f"chat.messages[{index}].cache_breakpoint",
        )
    return shared


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _render_turn(
    loaded: LoadedModel,
    messages: Sequence[Mapping[str, str]],
    before: Sequence[int],
    *,
    add_generation_prompt: bool = True,
) -> str:
    render = _render_next_turn if before else _render
    return render(loaded, messages, add_generation_prompt=add_generation_prompt)


def _render_next_turn(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    """Return the template's text behind an assistant's answer, whatever stood before it.

    The model's tokens of earlier turns stay as they were generated: they are not decoded and
    rendered again, which could change them and would cost the stored KV cache.
    """
    answer = secrets.token_hex(16)
    earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": answer}]
    rendered = _render(loaded, [*earlier, *messages], add_generation_prompt=add_generation_prompt)
    _, found, behind = rendered.rpartition(answer)
    if not found:
        raise InvalidRequestError(
            f"the chat template of {loaded.name} leaves out earlier answers; send text",
            field="chat",
        )
    return behind


def _render(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> str:
    try:
        rendered: Any = loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, ValueError) as error:
        raise InvalidRequestError(
            f"the chat template of {loaded.name} refuses these messages: {error}",
            field="chat.messages",
        ) from error
    return str(rendered)


def _encode_turn(loaded: LoadedModel, rendered: str, before: Sequence[int]) -> list[int]:
    # The template has written the special tokens.
    ids = list(loaded.tokenizer(rendered, add_special_tokens=False)["input_ids"])
    # An answer that ended by itself holds its closing token already.
    is_closed = bool(before) and before[-1] in loaded.eos_token_ids and ids[:1] == [before[-1]]
    return ids[1:] if is_closed else ids
