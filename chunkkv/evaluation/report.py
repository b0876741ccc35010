"""Records to tables: quality of each method at each ratio, as numbers, Markdown and JSON.

The same records give the same bytes, in whatever order they were made.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from chunkkv.evaluation.methods import FULL
from chunkkv.evaluation.records import Record

RESULTS_FILE: Final = "results.json"
TABLE_FILE: Final = "table.md"


@dataclass(frozen=True, slots=True)
class Summary:
    """One method at one ratio in one task.

    Attributes:
        task: Name of the task.
        length: Tokens of the documents, where the task says so.
        method: Name of the method.
        keep_ratio: Fraction of tokens kept.
        is_question_visible: Whether the question was there when the prompt was compressed.
        num_questions: Questions that were answered.
        exact: Share of them answered exactly.
        graded: Mean grade, in ``[0, 1]``.
        stored_share: Stored bytes per byte of the full cache.
    """

    task: str
    length: int | None
    method: str
    keep_ratio: float
    is_question_visible: bool
    num_questions: int
    exact: float
    graded: float
    stored_share: float


def summarize(records: Iterable[Record], *, by_length: bool = True) -> list[Summary]:
    """Return a summary for each task, length, method, ratio and visibility, sorted.

    Args:
        records: Of any samples.
        by_length: Whether documents of different lengths are kept apart.
    """
    groups: defaultdict[tuple[str, int, bool, str, float], list[Record]] = defaultdict(list)
    for record in records:
        length = int(record.extras[0].get("length") or 0) if by_length else 0
        groups[
            record.task, length, record.is_question_visible, record.method, record.keep_ratio
        ].append(record)
    return [
        _summary(task, length, method, ratio, visible, group)
        for (task, length, visible, method, ratio), group in sorted(groups.items())
    ]


def _summary(
    task: str, length: int, method: str, ratio: float, visible: bool, group: Sequence[Record]
) -> Summary:
    num_questions = sum(len(record.exact) for record in group)
    # Whatever the order of the records, the sum is the same.
    exact = sorted(x for record in group for x in record.exact)
    graded = sorted(x for record in group for x in record.graded)
    return Summary(
        task=task,
        length=length or None,
        method=method,
        keep_ratio=ratio,
        is_question_visible=visible,
        num_questions=num_questions,
        exact=sum(exact) / num_questions,
        graded=sum(graded) / num_questions,
        stored_share=sum(r.stored_bytes for r in group) / sum(r.full_bytes for r in group),
    )


def write_report(folder: Path, records: Iterable[Record]) -> str:
    """Write ``results.json`` and ``table.md`` into a folder; return the table."""
    summaries = summarize(records)
    text = json.dumps([asdict(summary) for summary in summaries], indent=2) + "\n"
    (folder / RESULTS_FILE).write_text(text, encoding="utf-8")
    table = markdown(summaries)
    (folder / TABLE_FILE).write_text(table, encoding="utf-8")
    return table


def markdown(summaries: Sequence[Summary]) -> str:
    """Return the tables of all tasks: exact answers, and the mean grade in brackets."""
    blocks = []
    for task, length in sorted({(s.task, s.length or 0) for s in summaries}):
        of_task = [s for s in summaries if s.task == task and (s.length or 0) == length]
        for visible in (False, True):
            # The full cache is the same either way.
            rows = [s for s in of_task if s.is_question_visible == visible or s.method == FULL]
            if any(s.method != FULL for s in rows) or (rows and not visible):
                blocks.append(_block(task, length, visible, rows))
    return "\n".join(blocks)


def _block(task: str, length: int, visible: bool, rows: Sequence[Summary]) -> str:
    ratios = sorted({s.keep_ratio for s in rows if s.method != FULL})
    full = next((s for s in rows if s.method == FULL), None)
    cells = {(s.method, s.keep_ratio): s for s in rows}
    names = sorted({s.method for s in rows} - {FULL}, key=lambda name: (-_best(cells, name), name))
    num_questions = max(s.num_questions for s in rows)
    where = f", {length} tokens" if length else ""
    question = "seen" if visible else "not seen"
    lines = [
        f"### {task}{where}: question {question} at compression, {num_questions} questions",
        "",
        f"| method | {' | '.join(f'{ratio:.3g} kept' for ratio in ratios) or 'all kept'} |",
        f"|---|{'---|' * max(1, len(ratios))}",
    ]
    if full is not None:
        lines.append(f"| full cache |{f' {_cell(full)} |' * max(1, len(ratios))}")
    for name in names:
        found = [cells.get((name, ratio)) for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(_cell(s) if s is not None else '' for s in found)} |")
    return "\n".join([*lines, ""])


def _best(cells: dict[tuple[str, float], Summary], name: str) -> float:
    return sum(s.graded for (method, _), s in cells.items() if method == name)


def _cell(summary: Summary) -> str:
    return f"{summary.exact:.0%} ({summary.graded:.2f})"
