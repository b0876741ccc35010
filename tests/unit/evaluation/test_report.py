"""The same records give the same tables and pictures, whatever their order."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from chunkkv.evaluation.plots import write_plots
from chunkkv.evaluation.records import Record, open_results
from chunkkv.evaluation.report import markdown, summarize, write_report


def record(
    method: str, ratio: float, graded: tuple[float, ...], *, visible: bool = False, sample: int = 0
) -> Record:
    return Record(
        sample_id=f"needle/{sample}",
        task="needle",
        method=method,
        keep_ratio=ratio,
        is_question_visible=visible,
        num_tokens=1000,
        stored_bytes=round(1000 * ratio),
        full_bytes=1000,
        answers=tuple("x" for _ in graded),
        exact=tuple(float(grade == 1) for grade in graded),
        graded=graded,
        extras=tuple(
            {"length": 1000, "depth": place / len(graded)} for place in range(len(graded))
        ),
    )


RECORDS = [
    record("full", 1.0, (1.0, 1.0)),
    record("snapkv", 0.1, (0.0, 0.5)),
    record("snapkv", 0.3, (1.0, 0.5)),
    record("fast", 0.1, (1.0, 0.5)),
    record("fast", 0.1, (1.0, 0.0), sample=1),
    record("fast", 0.1, (1.0, 1.0), visible=True),
]


def test_summary_is_the_mean_over_questions() -> None:
    [found] = [s for s in summarize(RECORDS) if s.method == "fast" and not s.is_question_visible]

    assert (found.num_questions, found.exact, found.graded) == (4, 0.5, 0.625)
    assert (found.length, found.stored_share) == (1000, 0.1)


def test_run_that_was_cut_off_before_the_full_cache_has_a_table() -> None:
    table = markdown(summarize([record("fast", 0.1, (1.0,), visible=True)]))

    assert table.startswith("### needle, 1000 tokens: question seen at compression, 1 questions\n")


@pytest.mark.parametrize("answer", ["a\u2028b\x85c\r\nd", ""])
def test_answers_come_back_whatever_they_hold(answer: str, tmp_path: Path) -> None:
    written = dataclasses.replace(record("fast", 0.1, (1.0,)), answers=(answer,))
    results = open_results(tmp_path, {}, {})
    results.append(written)
    results.append(record("fast", 0.3, (1.0,)))

    found = open_results(tmp_path, {}, {}).records

    assert len(found) == 2
    assert found[written.key].answers == (answer,)


def test_table_has_a_row_for_each_method_the_best_first() -> None:
    lines = markdown(summarize(RECORDS)).splitlines()

    assert lines == [
        "### needle, 1000 tokens: question not seen at compression, 4 questions",
        "",
        "| method | 0.1 kept | 0.3 kept |",
        "|---|---|---|",
        "| full cache | 100% (1.00) | 100% (1.00) |",
        "| snapkv | 0% (0.25) | 50% (0.75) |",
        "| fast | 50% (0.62) |  |",
        "",
        "### needle, 1000 tokens: question seen at compression, 2 questions",
        "",
        "| method | 0.1 kept |",
        "|---|---|",
        "| full cache | 100% (1.00) |",
        "| fast | 100% (1.00) |",
    ]


def test_report_and_pictures_do_not_depend_on_the_order(tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "other"
    for folder, records in zip(folders, (RECORDS, RECORDS[::-1]), strict=True):
        folder.mkdir()
        write_report(folder, records)
        write_plots(folder, records)

    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert sorted(files[0]) == [
        "needle-bytes.png",
        "needle-depth-seen.png",
        "needle-depth-unseen.png",
        "needle-quality.png",
        "results.json",
        "table.md",
    ]
    assert len(json.loads(files[0]["results.json"])) == 5


def test_task_without_depths_has_no_heat_map(tmp_path: Path) -> None:
    plain = [dataclasses.replace(each, extras=({}, {})) for each in RECORDS]

    written = write_plots(tmp_path, plain)

    assert [path.name for path in written] == ["needle-quality.png", "needle-bytes.png"]
