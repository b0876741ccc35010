"""A run answers as the model does, row by row, and goes on where it was cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from chunkkv import CompressionPolicy, prefill
from chunkkv.evaluation.answering import Row, answer
from chunkkv.evaluation.methods import Method, method
from chunkkv.evaluation.prompts import render
from chunkkv.evaluation.records import (
    RECORDS_FILE,
    Record,
    Results,
    ResultsError,
    open_results,
    read_results,
)
from chunkkv.evaluation.runner import completeness, grid, run
from chunkkv.evaluation.tasks import Question
from tests.tiny_model import byte_tokenizer, generate, load_tiny
from tests.unit.evaluation.documents import sample

METHODS = [method(name) for name in ("fast", "snapkv", "h2o", "keydiff", "chunkkv:precision=int8")]
CELLS = grid(METHODS, [0.2, 0.5], visible=[False, True])
SETTINGS = {"model": "tiny"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_tiny(seed=3)


def opened(folder: Path, methods: list[Method] = METHODS) -> Results:
    return open_results(folder, SETTINGS, {each.name: each.settings for each in methods})


def run_into(folder: Path, loaded: Any, **options: Any) -> Results:
    samples = [sample(0), sample(1)]
    results = opened(folder)
    run(loaded.model, byte_tokenizer(), samples, CELLS, results, **options)
    return results


def test_every_sample_has_a_record_in_every_cell(loaded: Any, tmp_path: Path) -> None:
    results = run_into(tmp_path, loaded)

    assert set(results.records) == {cell.key(s) for cell in CELLS for s in (sample(0), sample(1))}
    assert read_results(tmp_path).records == results.records


def test_full_cache_answers_as_generate_does(loaded: Any, tmp_path: Path) -> None:
    results = run_into(tmp_path, loaded)

    record = results.records["tiny/0", "full", 1.0, False]
    tokenizer = byte_tokenizer()
    prompt = render(tokenizer, sample(0))
    for index, question in enumerate(sample(0).questions):
        expected = generate(loaded, list(prompt.whole(index)), question.max_new_tokens)
        if 0 in expected:  # the end of an answer
            expected = expected[: expected.index(0)]
        assert record.answers[index] == tokenizer.decode(expected)


def test_all_kept_answers_as_the_full_cache_does_whether_the_question_is_seen_or_not(
    loaded: Any, tmp_path: Path
) -> None:
    cells = grid([method("fast"), method("h2o")], [1.0], visible=[False, True])
    results = opened(tmp_path, [method("fast"), method("h2o")])
    run(loaded.model, byte_tokenizer(), [sample(0)], cells, results)

    assert len(results.records) == 5
    assert len({record.answers for record in results.records.values()}) == 1


def test_batches_answer_as_rows_alone_do(loaded: Any, tmp_path: Path) -> None:
    together = run_into(tmp_path / "together", loaded)
    alone = run_into(tmp_path / "alone", loaded, batch_bytes=1)

    assert alone.records == together.records


def test_rows_that_end_early_leave_the_batch_and_change_nothing(loaded: Any) -> None:
    ids = tuple(range(40, 90))
    [span] = prefill(loaded.model, torch.tensor([ids[:-1]]), CompressionPolicy(keep_ratio=0.5))
    lengths = [1, 9, 4, 9]
    rows = [
        Row(tag=n, span=span, token_ids=ids, max_new_tokens=length)
        for n, length in enumerate(lengths)
    ]

    answers = answer(loaded.model, rows)

    assert [len(tokens) for tokens in answers] == [min(n, len(answers[1])) for n in lengths]
    assert all(tokens == answers[1][: len(tokens)] for tokens in answers)


def test_second_run_has_nothing_to_do(loaded: Any, tmp_path: Path) -> None:
    run_into(tmp_path, loaded)
    again: list[Record] = []

    run_into(tmp_path, loaded, on_record=again.append)

    assert again == []


def test_interrupted_run_goes_on_where_it_stopped(loaded: Any, tmp_path: Path) -> None:
    whole = run_into(tmp_path / "whole", loaded)
    done: list[Record] = []

    def stop_after_five(record: Record) -> None:
        done.append(record)
        if len(done) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_into(tmp_path / "cut", loaded, on_record=stop_after_five)
    with (tmp_path / "cut" / RECORDS_FILE).open("a") as file:
        file.write('{"sample_id": "tiny/1", "meth')  # a line that was being written
    rest: list[Record] = []
    results = run_into(tmp_path / "cut", loaded, on_record=rest.append)

    assert results.records == whole.records
    assert not {record.key for record in done} & {record.key for record in rest}
    assert read_results(tmp_path / "cut").records == whole.records


def test_folder_takes_more_methods(loaded: Any, tmp_path: Path) -> None:
    run_into(tmp_path, loaded)

    results = opened(tmp_path, [method("streamingllm")])

    assert ("tiny/0", "fast", 0.2, True) in results.records


@pytest.mark.parametrize(
    ("settings", "methods", "named"),
    [
        ({"model": "another"}, {}, "model was 'tiny' and is 'another'"),
        ({"model": "tiny", "more": 1}, {}, "more was None and is 1"),
        ({"model": "tiny"}, {"fast": "other choices"}, "fast was .* and is 'other choices'"),
    ],
)
def test_changed_settings_are_refused_by_name(
    settings: dict[str, Any], methods: dict[str, str], named: str, tmp_path: Path
) -> None:
    opened(tmp_path)

    with pytest.raises(ResultsError, match=named):
        open_results(tmp_path, settings, methods)


def test_damaged_record_is_named(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / RECORDS_FILE).write_text('{"sample_id": 1}\n')

    with pytest.raises(ResultsError, match="line 1"):
        opened(tmp_path)


def test_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds no results"):
        read_results(tmp_path)


def test_answer_is_complete_once_its_number_is(loaded: Any) -> None:
    tokenizer = byte_tokenizer()
    question = Question("?", ("12",), max_new_tokens=9, metric="digits")
    is_complete = completeness(question, tokenizer)

    assert not is_complete(tokenizer("It is 1,2")["input_ids"])
    assert is_complete(tokenizer("It is 12.")["input_ids"])
