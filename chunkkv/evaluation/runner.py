"""Runs a model over samples x methods x ratios, with and without the question, from one prefill.

Each context is prefilled once. All methods and ratios compress that cache, and every question is
put to all of them in batches: a decoding step reads the weights once for many rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chunkkv.compressed import CompressedKV
from chunkkv.compressor import compress
from chunkkv.evaluation.answering import DEFAULT_BATCH_BYTES, Answering, Row
from chunkkv.evaluation.contexts import Context, prefill_context
from chunkkv.evaluation.methods import FULL, Method
from chunkkv.evaluation.metrics import score
from chunkkv.evaluation.prompts import Prompt, render
from chunkkv.evaluation.records import Key, Record, Results
from chunkkv.evaluation.storing import stored
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.fingerprint import model_fingerprint
from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled
from chunkkv.sentence_ends import sentence_ending_tokens


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one ratio.

    Attributes:
        method: ``None``: the full cache.
        keep_ratio: Fraction of tokens kept.
        is_question_visible: Whether the question is there when the prompt is compressed.
    """

    method: Method | None
    keep_ratio: float
    is_question_visible: bool

    @property
    def name(self) -> str:
        """Of its method."""
        return FULL if self.method is None else self.method.name

    def key(self, sample: Sample) -> Key:
        """Return under which key the record of a sample is kept."""
        return (sample.sample_id, self.name, self.keep_ratio, self.is_question_visible)

    def policy(self, num_tokens: int) -> CompressionPolicy:
        """Return the policy for a text of so many tokens."""
        if self.method is None:
            return CompressionPolicy(keep_ratio=1.0, scorer="recency")
        return self.method.policy(self.keep_ratio, num_tokens)


def grid(
    methods: Sequence[Method], keep_ratios: Sequence[float], *, visible: Sequence[bool]
) -> list[Cell]:
    """Return all cells, the full cache first, cells of one ratio together."""
    return [
        Cell(None, 1.0, False),
        *(
            Cell(method, ratio, is_visible)
            for is_visible in visible
            for ratio in keep_ratios
            for method in methods
        ),
    ]


def run(
    model: Any,
    tokenizer: Any,
    samples: Iterable[Sample],
    cells: Sequence[Cell],
    results: Results,
    *,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
    on_record: Callable[[Record], None] = lambda record: None,
) -> None:
    """Answer every question of every sample in every cell, but for what ``results`` has.

    Args:
        model: A transformers decoder, in evaluation mode.
        tokenizer: Its tokenizer.
        samples: What is asked.
        cells: What is compared.
        results: Where records go, one by one as they are complete.
        batch_bytes: About what the KV of the rows of one batch may take.
        on_record: Called with each record after it was written.
    """
    answering = Answering(model, batch_bytes)
    fingerprint = model_fingerprint(model)
    # A second for a large vocabulary, and few methods ask.
    at_sentences = any(cell.policy(1).unit == "sentence" for cell in cells)
    ends = sentence_ending_tokens(tokenizer) if at_sentences else None
    for sample in samples:
        missing = [cell for cell in cells if cell.key(sample) not in results.records]
        for pair in _answers(model, tokenizer, sample, missing, answering, fingerprint, ends):
            _take(*pair, tokenizer, results, on_record)
    for pair in answering.finish():
        _take(*pair, tokenizer, results, on_record)


@dataclass(slots=True)
class _Part:
    """What is known so far of one cell of one sample."""

    sample: Sample
    cell: Cell
    full_bytes: int
    num_tokens: dict[int, int] = field(default_factory=dict)
    stored_bytes: dict[int, int] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.answers) == len(self.sample.questions)

    def record(self) -> Record:
        questions = self.sample.questions
        answers = [self.answers[i] for i in range(len(questions))]
        scores = [score(*pair) for pair in zip(questions, answers, strict=True)]
        return Record(
            sample_id=self.sample.sample_id,
            task=self.sample.task,
            method=self.cell.name,
            keep_ratio=self.cell.keep_ratio,
            is_question_visible=self.cell.is_question_visible,
            num_tokens=_mean(self.num_tokens),
            stored_bytes=_mean(self.stored_bytes),
            full_bytes=self.full_bytes,
            answers=tuple(answers),
            exact=tuple(each["exact"] for each in scores),
            graded=tuple(each["graded"] for each in scores),
            extras=tuple(dict(question.extra) for question in questions),
        )


def _mean(values: dict[int, int]) -> int:
    return round(sum(values.values()) / len(values))


def _answers(
    model: Any,
    tokenizer: Any,
    sample: Sample,
    cells: Sequence[Cell],
    answering: Answering,
    fingerprint: str,
    sentence_ends: torch.Tensor | None,
) -> Iterator[tuple[Row, list[int]]]:
    """Hand all rows of a sample to ``answering``, and yield those that it answers meanwhile."""
    if not cells:
        return
    prompt = render(tokenizer, sample)
    policies = [cell.policy(len(prompt.context)) for cell in cells]
    context = prefill_context(
        model, prompt.context, policies, fingerprint=fingerprint, sentence_ends=sentence_ends
    )
    full_bytes = _full_bytes(context.prefilled)
    parts = [_Part(sample, cell, full_bytes) for cell in cells]
    for prefilled, asked, visible in _prefills(context, prompt, parts):
        for part in visible:
            policy = part.cell.policy(prefilled.longest)
            kept = stored(compress(prefilled, policy)[0], policy)
            span = kept.span
            like = (part.cell.keep_ratio, len(prompt.context) // 256, _is_ragged(span))
            for index in asked:
                part.num_tokens[index] = span.num_tokens
                part.stored_bytes[index] = kept.size_bytes
                question = sample.questions[index]
                row = Row(
                    tag=(part, index),
                    span=span,
                    token_ids=prompt.whole(index),
                    max_new_tokens=question.max_new_tokens,
                    is_complete=completeness(question, tokenizer),
                )
                yield from answering.add(row, like=like)


def _prefills(
    context: Context, prompt: Prompt, parts: Sequence[_Part]
) -> Iterator[tuple[Prefilled, Sequence[int], Sequence[_Part]]]:
    """Yield what is compressed, the questions put to it, and the cells that compress it."""
    everything = range(len(prompt.questions))
    hidden = [part for part in parts if not part.cell.is_question_visible]
    if hidden:
        yield context.prefilled, everything, hidden
    visible = [part for part in parts if part.cell.is_question_visible]
    for index in everything if visible else ():
        # The last token is left to run.
        yield context.followed_by(prompt.questions[index][:-1]), [index], visible


def _full_bytes(prefilled: Prefilled) -> int:
    """Bytes of keys and values, all tokens kept."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in prefilled.cache.layers
        for tensor in (layer.keys, layer.values)
    )


def _is_ragged(span: CompressedKV) -> bool:
    kept = {n for layer in span.layers if not layer.is_sliding for n in layer.lengths}
    return len(kept) > 1


def _take(
    row: Row,
    generated: list[int],
    tokenizer: Any,
    results: Results,
    on_record: Callable[[Record], None],
) -> None:
    part, index = row.tag
    part.answers[index] = tokenizer.decode(generated, skip_special_tokens=True)
    if part.is_complete:
        record = part.record()
        results.append(record)
        on_record(record)


def completeness(question: Question, tokenizer: Any) -> Callable[[list[int]], bool]:
    """Return what says that nothing after the tokens so far would change an answer's score."""
    if question.metric == "digits":
        # The first number counts; what follows it no longer does.
        pattern = r"\d[\d,]*[^\d,]"
    elif question.extra.get("first_line"):
        pattern = r"[^\n]\n"
    else:
        return lambda generated: False
    return lambda generated: bool(
        re.search(pattern, tokenizer.decode(generated, skip_special_tokens=True))
    )
