"""What goes into and comes out of a call: frozen, without protobuf in sight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``, as the model's chat template names them.
        content: What is said.
        cache_breakpoint: Ends a prefix that other sessions share: whoever begins with the same
            messages up to here finds their KV cache in the store.
    """

    role: str
    content: str
    cache_breakpoint: bool = False


@dataclass(frozen=True, slots=True)
class Compression:
    """How much of a KV cache is kept, and how it is chosen. ``None`` takes the server's value.

    Attributes:
        keep_ratio: Fraction of tokens that are kept, in ``(0, 1]``; 1 keeps the whole cache.
        max_kept_tokens: Number of tokens that are kept at most. Not together with ``keep_ratio``.
        scorer: How importance is measured: ``window``, ``reconstruction``, ``key_diff``,
            ``heavy_hitter``, ``recency``, ``expected_attention``, ``key_norm``, ``recall``.
        unit: What is kept or dropped as one: ``chunk``, ``token`` or ``sentence``.
        scope: Who shares one list of kept positions: ``head``, ``layer``, ``group``, ``global``.
        spread: How the budget is shared out between lists: ``uniform``, ``pyramid``, ``adaptive``;
            the latter two need scope ``head`` or ``layer``.
        chunk_size: Tokens in a chunk, and in a unit of a sentence at most, at least 1.
        window_size: Trailing tokens that ask (and are always kept), at least 1.
        sink_tokens: Leading tokens that are always kept, at least 0.
        reuse_interval: Neighbouring layers that share one list with scope ``group``.
        vote_power: What the attention of ``window`` is raised to before it is averaged, 1 to 8.
        pool_size: Tokens that the scores of ``window`` are averaged over, odd; 1: none.
        head_floor: With spread ``adaptive``: fraction of an equal share that every list is given
            before the ranking, in ``[0, 1]``.
        gating: With chunks and sentences: of how little entropy, as a fraction of its maximum, a
            unit's scores must be for its best tokens alone to be kept, in ``[0, 1]``; 0: never.
        merge_layers: Store neighbouring layers of the deeper half as one.
        max_kv_tokens: KV tokens kept at most while an answer is generated, those of the
            conversation before it included.
        precision: How the kept keys and values are stored: ``native``, ``fp8``, ``int8``, ``int4``.
        prefix_scorer: How importance is measured in a prefix that ends with a
            ``cache_breakpoint``.
        preset: A named method, which takes the place of what the session or the server says of
            how tokens are chosen, and which the other fields change: ``fast``, ``durable``,
            ``chunkkv``, ``chunkkv_reuse``, ``snapkv``, ``pyramidkv``, ``h2o``, ``streamingllm``,
            ``kvzip``, ``expected_attention``, ``keydiff``, ``minicache``.
        prefix_preset: The same, for prefixes that end with a ``cache_breakpoint``.
    """

    keep_ratio: float | None = None
    max_kept_tokens: int | None = None
    scorer: str | None = None
    unit: str | None = None
    scope: str | None = None
    spread: str | None = None
    chunk_size: int | None = None
    window_size: int | None = None
    sink_tokens: int | None = None
    reuse_interval: int | None = None
    vote_power: int | None = None
    pool_size: int | None = None
    head_floor: float | None = None
    gating: float | None = None
    merge_layers: bool | None = None
    max_kv_tokens: int | None = None
    precision: str | None = None
    prefix_scorer: str | None = None
    preset: str | None = None
    prefix_preset: str | None = None


class GenerateOptions(TypedDict, total=False):
    """Options of ``generate``, beside the prompt. What is left out takes the server's default.

    Attributes:
        messages: Instead of a prompt: several messages, rendered with the chat template.
        text: Instead of a prompt: raw text, no template.
        token_ids: Instead of a prompt: token ids as they are.
        max_tokens: Most tokens to generate.
        min_tokens: Tokens before the answer may end.
        temperature: In ``[0, 2]``; 0 is greedy, and the default.
        top_p: Nucleus sampling, in ``(0, 1]``.
        top_k: Only the k most likely tokens.
        min_p: Only tokens this likely relative to the likeliest, in ``[0, 1]``.
        seed: Repeats a sampled answer; ``Finish.seed`` tells the one that was used.
        stop: The answer ends before any of these strings.
        stop_token_ids: The answer ends at any of these tokens.
        ignore_eos: Goes on after the model's end-of-sequence tokens.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that the
            conversation or the answer has already, in ``[0.1, 10]``; 1 is none.
        presence_penalty: Subtracted from the logits of tokens that the answer has already, in
            ``[-2, 2]``.
        frequency_penalty: The same, for each time that the answer has the token.
        logit_bias: Added to logits, by token id, each in ``[-100, 100]``.
        logprobs: Ask for log-probabilities (``TokenDelta.logprobs``), and for this many
            alternatives to each token, in ``[0, 20]``.
        compression: How this prompt's KV cache is compressed.
        model: The model to ask.
        timeout_s: Deadline of the whole answer; the client's if left out.
        request_id: Names the request; made up if left out. Sent again to the same session, it
            returns the stored result of the turn instead of running it twice.
        wait_if_busy: Waits for another turn of the session, up to the deadline, instead of
            raising ``SessionBusy``.
        avoid_worker: Id of a decode worker that must not answer if another one can, to see that
            any of them does.
    """

    messages: Sequence[Message | Mapping[str, Any]] | None
    text: str | None
    token_ids: Sequence[int] | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    compression: Compression | None
    model: str | None
    timeout_s: float | None
    request_id: str | None
    wait_if_busy: bool | None
    avoid_worker: str | None


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """What was done with the prompt: the first event of an answer.

    Attributes:
        request_id: Names the request in the server's logs.
        num_prompt_tokens: Tokens of the conversation up to the first generated token.
        num_reused_tokens: Of these, tokens whose KV was in the store already.
        num_prefilled_tokens: Of these, tokens that the model computed for this request.
        num_kept_tokens: KV tokens that every generated token attends to, all layers averaged.
        full_kv_bytes: Bytes that the full KV cache of the prompt would take.
        stored_bytes: Bytes of the compressed KV cache, all segments.
        fetched_bytes: Bytes that the decode worker fetched; 0 if it still held the session.
        tokenize_ms: Milliseconds to render and tokenize.
        prefill_ms: Milliseconds of the model's forward passes over new tokens.
        compression_ms: Milliseconds to score, select, gather and encode.
        store_ms: Milliseconds to write the segments to the store.
        fetch_ms: Milliseconds to fetch and verify the segments.
        prefill_worker: Id of the prefill worker.
        decode_worker: Id of the decode worker.
        rebuilt: Whether stored KV was missing or damaged and had to be computed again.
        num_rebuilt_tokens: Of the prompt tokens, those computed again for that.
        num_shared_tokens: Of the reused tokens, those of this input whose KV another session, or
            an earlier try, had computed.
        replayed: Whether this is the stored result of an earlier request of the same id.
    """

    request_id: str
    num_prompt_tokens: int
    num_reused_tokens: int
    num_prefilled_tokens: int
    num_kept_tokens: int
    full_kv_bytes: int
    stored_bytes: int
    fetched_bytes: int
    tokenize_ms: float
    prefill_ms: float
    compression_ms: float
    store_ms: float
    fetch_ms: float
    prefill_worker: str
    decode_worker: str
    rebuilt: bool = False
    num_rebuilt_tokens: int = 0
    num_shared_tokens: int = 0
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """A token that could have been generated.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a generated token, before penalties, bias and temperature.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top_logprobs: The likeliest tokens at its place, likeliest first.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of an answer.

    Attributes:
        text: Text that became certain with them; empty while a character is incomplete.
        token_ids: The tokens.
        first_token_index: Place of the first of them among the generated tokens, from 0.
        logprobs: One for each token, if they were asked for; else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    first_token_index: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer: its last event. The turn is stored when it arrives.

    Attributes:
        reason: ``eos``, ``stop`` (a stop string) or ``length``.
        matched_stop: The stop string, with reason ``stop``.
        num_generated_tokens: Generated tokens, end-of-sequence token included.
        num_total_tokens: Tokens of the whole conversation, this answer included.
        seed: The same seed repeats the answer.
        session_version: The session's version after this turn; 0 for a one-off request.
        first_token_ms: Milliseconds from the decode worker's start to its first token.
        decode_ms: Milliseconds from the first token to the last.
        commit_ms: Milliseconds to store the answer's KV and commit the turn.
    """

    reason: str
    matched_stop: str
    num_generated_tokens: int
    num_total_tokens: int
    seed: int
    session_version: int
    first_token_ms: float
    decode_ms: float
    commit_ms: float


Event = PromptInfo | TokenDelta | Finish


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer.

    Attributes:
        text: Its text.
        token_ids: Its tokens.
        prompt_info: What was done with the prompt.
        finish: How it ended.
        logprobs: One for each token, if they were asked for; else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_info: PromptInfo
    finish: Finish
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Recompression:
    """How a stored segment was compressed further, and what it had before.

    Attributes:
        max_kept_tokens: KV tokens that it was cut to at most, in each list; 0: all are there.
        precision: How its keys and values are stored now; ``None``: as before.
        original_kept_tokens: KV tokens that it had before, all layers averaged.
        original_bytes: Bytes that it had before.
        original_segment_id: Name of the segment that it was made of.
        by_pressure: Whether the server did this by itself, because memory was short.
        time: When it was done last.
    """

    max_kept_tokens: int
    precision: str | None
    original_kept_tokens: int
    original_bytes: int
    original_segment_id: str
    by_pressure: bool
    time: datetime


@dataclass(frozen=True, slots=True)
class Segment:
    """Compressed KV of a contiguous span of tokens.

    Attributes:
        segment_id: Content address.
        first_token: Position of its first token in the conversation.
        num_tokens: Tokens of the span.
        num_kept_tokens: KV tokens kept of them, all layers averaged.
        size_bytes: Bytes stored.
        kv_bytes: Bytes that it takes where it is used, in the model's own precision; 0: as many as
            are stored.
        compression: The policy that it was compressed by; ``None``: it was stored whole.
        recompression: What was done to it later, without the model; ``None``: nothing.
        is_prefix: Whether it ends with a ``cache_breakpoint``.
    """

    segment_id: str
    first_token: int
    num_tokens: int
    num_kept_tokens: int
    size_bytes: int
    kv_bytes: int = 0
    compression: Compression | None = None
    recompression: Recompression | None = None
    is_prefix: bool = False


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A stored conversation, as it was when the server answered.

    Attributes:
        session_id: Its id.
        model: The model that it belongs to.
        version: Grows by one with every committed turn.
        num_turns: Turns that were answered.
        num_tokens: Tokens of the conversation.
        num_kept_tokens: KV tokens stored for them, all layers averaged.
        stored_bytes: Bytes of its KV segments.
        compression: Policy of its turns; ``None``: the server's.
        create_time: When it was created.
        update_time: When its last turn was committed.
        expire_time: When it will be gone unless it is used again.
        ttl_s: How long it lives after each use, in seconds.
        segments: Its KV cache, oldest first; empty in lists.
    """

    session_id: str
    model: str
    version: int
    num_turns: int
    num_tokens: int
    num_kept_tokens: int
    stored_bytes: int
    compression: Compression | None
    create_time: datetime
    update_time: datetime
    expire_time: datetime
    ttl_s: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class CompressionResult:
    """What compressing a session further made of it.

    Attributes:
        info: The session as it is now.
        original_bytes: Bytes of its segments before.
        original_kept_tokens: Kept tokens before, all layers averaged.
    """

    info: SessionInfo
    original_bytes: int
    original_kept_tokens: int


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Number of tokens of an input.

    Attributes:
        num_tokens: Template included.
        model: The model whose tokenizer counted.
    """

    num_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked.

    Attributes:
        name: As requests give it.
        max_model_len: Tokens of prompt and answer together at most.
        fingerprint: Identity of architecture and weights.
        num_prefill_workers: Prefill workers alive.
        num_decode_workers: Decode workers alive.
        default_compression: Applies where a request and its session name none.
    """

    name: str
    max_model_len: int
    fingerprint: str
    num_prefill_workers: int
    num_decode_workers: int
    default_compression: Compression | None
