"""Time to first token of a second turn: resident, fetched, and computed again by transformers."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from chunkserve_client import Client, Compression, Session
from tests.benchmarks.documents import Documents
from tests.benchmarks.figures import Figure, tell
from tests.benchmarks.service_stack import Heard, ServiceStack, listen

TURN_TOKENS = 30
ANSWER_TOKENS = 8
SHORT = 4  # the other document has so many times fewer tokens
NUM_RECOMPUTED = 3

# The bars, of medians.
MOST_OF_RECOMPUTING = 1 / 20
MOST_OF_SHORT = 1.3

# Of SmolLM2 in float32 a token takes 46,080 bytes, and its positions.
KV_BYTES_PER_TOKEN = 50_000


@dataclass(frozen=True, slots=True)
class Conversation:
    """A session that waits for its second turn, twice.

    Attributes:
        num_tokens: Tokens of its document.
        session: For the worker that has it.
        fork: For the one that has not.
        worker_id: The one that has it.
        prompt: All tokens before the second turn's answer.
        question: Of these, the second turn's.
    """

    num_tokens: int
    session: Session
    fork: Session
    worker_id: str
    prompt: list[int]
    question: list[int]


@dataclass(frozen=True, slots=True)
class Turns:
    """The second turns of one conversation."""

    conversation: Conversation
    resident: Heard
    cold: Heard


def measure_turns(
    model: str,
    documents: Documents,
    *,
    num_tokens: int,
    num_sessions: int,
    max_kept_tokens: int,
) -> list[Figure]:
    """Return the figures of this part.

    Args:
        model: Folder of the model.
        documents: Where prompts come from.
        num_tokens: Tokens of the long documents.
        num_sessions: Sessions of each length.
        max_kept_tokens: Budget of each.
    """
    lengths = (num_tokens // SHORT, num_tokens)
    per_session = (min(max_kept_tokens, num_tokens) + 4 * TURN_TOKENS) * KV_BYTES_PER_TOKEN
    # One more of each length, and a fork of each.
    kv_bytes = 4 * (num_sessions + 1) * per_session
    compression = Compression(max_kept_tokens=max_kept_tokens)
    with (
        ServiceStack(model, store_bytes=2 * kv_bytes) as stack,
        stack.worker(kv_bytes=kv_bytes),
        stack.worker(kv_bytes=kv_bytes),
    ):
        turns = asyncio.run(_turns(stack, documents, lengths, num_sessions, compression))
    recomputed_ms = _recomputed_ms(
        model, [t.conversation.prompt for t in turns if t.conversation.num_tokens == num_tokens]
    )
    return _figures(turns, lengths, recomputed_ms)


async def _turns(
    stack: ServiceStack,
    documents: Documents,
    lengths: Sequence[int],
    num_sessions: int,
    compression: Compression,
) -> list[Turns]:
    async with stack.client() as client:
        # The first of each length is not counted: workers do some things for the first time.
        conversations = []
        for number in range(num_sessions + 1):
            for length in lengths:
                tell(f"{length:,} tokens: prefilling {number + 1} of {num_sessions + 1}")
                conversations.append(await _conversation(client, documents, length, compression))
        tell("second turns\n")
        turns = [await _second_turns(conversation) for conversation in conversations]
    return turns[len(lengths) :]


async def _conversation(
    client: Client, documents: Documents, num_tokens: int, compression: Compression
) -> Conversation:
    document, question = documents.next(num_tokens), documents.next(TURN_TOKENS)
    session = await client.create_session(compression=compression)
    first = await listen(session, document, max_tokens=1)
    assert first.prompt_info is not None
    return Conversation(
        num_tokens=num_tokens,
        session=session,
        fork=await session.fork(),
        worker_id=first.prompt_info.decode_worker,
        prompt=document + first.token_ids + question,
        question=question,
    )


async def _second_turns(conversation: Conversation) -> Turns:
    """Take the second turn on both workers, one after the other."""
    resident = await listen(
        conversation.session, conversation.question, max_tokens=ANSWER_TOKENS, ignore_eos=True
    )
    cold = await listen(
        conversation.fork,
        conversation.question,
        max_tokens=ANSWER_TOKENS,
        ignore_eos=True,
        avoid_worker=conversation.worker_id,
    )
    assert resident.prompt_info is not None
    assert not resident.prompt_info.fetched_bytes, "the worker had given the session up"
    assert cold.prompt_info is not None
    assert cold.prompt_info.fetched_bytes == cold.prompt_info.stored_bytes, "not all was fetched"
    return Turns(conversation, resident, cold)


def _recomputed_ms(model: str, prompts: Sequence[list[int]]) -> float:
    """Return the median of transformers' milliseconds to the first token of a prompt."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    _first_token(loaded, prompts[0][:TURN_TOKENS])  # which does some things for the first time
    taken_ms = []
    for number, prompt in enumerate(prompts[:NUM_RECOMPUTED]):
        tell(f"transformers: {number + 1} of {len(prompts[:NUM_RECOMPUTED])}")
        started = time.monotonic()
        _first_token(loaded, prompt)
        taken_ms.append(1000 * (time.monotonic() - started))
    tell("\n")
    return statistics.median(taken_ms)


def _first_token(loaded: torch.nn.Module, prompt: list[int]) -> None:
    generate = loaded.generate
    assert callable(generate)
    generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=1,
    )


def _figures(turns: Sequence[Turns], lengths: Sequence[int], recomputed_ms: float) -> list[Figure]:
    figures: list[Figure] = []
    cold_ms: dict[int, float] = {}
    for length in lengths:
        own = [turn for turn in turns if turn.conversation.num_tokens == length]
        cold = [turn.cold for turn in own]
        cold_ms[length] = _median(heard.first_token_ms for heard in cold)
        figures += _breakdown(f"{length:,} tokens, resident", [turn.resident for turn in own])
        figures += _breakdown(f"{length:,} tokens, cold", cold)
    short, long = lengths
    differing = sum(turn.resident.token_ids != turn.cold.token_ids for turn in turns)
    return [
        *figures,
        Figure(f"{long:,} tokens, transformers: first token", recomputed_ms, "ms"),
        Figure("  of it, cold", cold_ms[long] / recomputed_ms, "", at_most=MOST_OF_RECOMPUTING),
        Figure("  over cold", recomputed_ms / cold_ms[long], "x"),
        Figure(
            f"cold, {long:,} over {short:,} tokens",
            cold_ms[long] / cold_ms[short],
            "x",
            at_most=MOST_OF_SHORT,
        ),
        Figure("answers of cold workers unlike the resident ones", differing),
    ]


def _breakdown(name: str, answers: Sequence[Heard]) -> list[Figure]:
    """Return the median time to first token, and the medians of what it is made of."""
    parts = [_parts_ms(heard) for heard in answers]
    infos = [heard.prompt_info for heard in answers if heard.prompt_info]
    return [
        Figure(f"{name}: first token", _median(heard.first_token_ms for heard in answers), "ms"),
        *(Figure(f"  {part}", _median(p[part] for p in parts), "ms") for part in parts[0]),
        Figure("  bytes fetched", _median(info.fetched_bytes for info in infos), "B"),
        Figure("  kept tokens", _median(info.num_kept_tokens for info in infos)),
    ]


def _parts_ms(heard: Heard) -> dict[str, float]:
    info, finish = heard.prompt_info, heard.finish
    assert info is not None
    assert finish is not None
    parts = {
        "prefill worker: tokenize": info.tokenize_ms,
        "prefill worker: prefill": info.prefill_ms,
        "prefill worker: compress": info.compression_ms,
        "prefill worker: store": info.store_ms,
        "decode worker: fetch and verify": info.fetch_ms,
        # What the decode worker counts begins before the fetch.
        "decode worker: the rest, to its first token": finish.first_token_ms - info.fetch_ms,
    }
    return parts | {"gateway, leases, gRPC": heard.first_token_ms - sum(parts.values())}


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)
