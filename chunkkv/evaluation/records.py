"""The folder of a run: settings, and one line for each sample and method that is done.

A run that is cut off leaves whole lines behind; the next one goes on where it stopped. A folder
takes more methods, ratios and samples, but refuses a run whose answers could not stand beside the
ones that it has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from chunkkv.errors import ChunkKVError

SETTINGS_FILE: Final = "settings.json"
RECORDS_FILE: Final = "records.jsonl"

Key = tuple[str, str, float, bool]


class ResultsError(ChunkKVError):
    """A folder holds results of other settings, or none that can be read."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one method made of one sample.

    Attributes:
        sample_id: Of the sample.
        task: Of the sample.
        method: Name of the method.
        keep_ratio: Fraction of tokens kept.
        is_question_visible: Whether the question was there when the prompt was compressed.
        num_tokens: Of the compressed text, averaged over questions.
        stored_bytes: Of the compressed KV as it is stored, averaged over questions.
        full_bytes: The same of the full cache, without scores or compression.
        answers: One for each question.
        exact: Of each answer, 0 or 1.
        graded: Of each answer, in ``[0, 1]``.
        extras: What the task says of each question.
    """

    sample_id: str
    task: str
    method: str
    keep_ratio: float
    is_question_visible: bool
    num_tokens: int
    stored_bytes: int
    full_bytes: int
    answers: tuple[str, ...]
    exact: tuple[float, ...]
    graded: tuple[float, ...]
    extras: tuple[Mapping[str, Any], ...]

    @property
    def key(self) -> Key:
        """What a folder holds at most once."""
        return (self.sample_id, self.method, self.keep_ratio, self.is_question_visible)


@dataclass(frozen=True, slots=True)
class Results:
    """An opened folder.

    Attributes:
        folder: Where it is.
        records: What is done, by key.
    """

    folder: Path
    records: dict[Key, Record]

    def append(self, record: Record) -> None:
        """Add one record, on disk when this returns."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with (self.folder / RECORDS_FILE).open("a", encoding="utf-8") as file:
            file.write(line)
        self.records[record.key] = record


def open_results(folder: Path, settings: Mapping[str, Any], methods: Mapping[str, str]) -> Results:
    """Open a folder for a run; make it if it is not there.

    Args:
        folder: Where results go.
        settings: What must be the same for results to stand in one table; JSON values.
        methods: What each method chooses, by its name. Others than those of the last run may join.

    Raises:
        ResultsError: The folder was made with other settings, or by other methods of these names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_FILE
    before = _read_settings(path) if path.exists() else {"settings": settings, "methods": {}}
    changed = _changes(before["settings"], settings) + _changes(
        {name: before["methods"].get(name, choice) for name, choice in methods.items()}, methods
    )
    if changed:
        raise ResultsError(
            f"{folder} holds results of other settings ({'; '.join(changed)}); "
            "choose another folder, or delete this one"
        )
    merged = {"settings": settings, "methods": {**before["methods"], **methods}}
    _replace(path, json.dumps(merged, indent=2, sort_keys=True) + "\n")
    _drop_cut_line(folder / RECORDS_FILE)
    return Results(folder, _read_records(folder / RECORDS_FILE))


def read_results(folder: Path) -> Results:
    """Open a folder to read.

    Raises:
        ResultsError: There are no results.
    """
    if not (folder / SETTINGS_FILE).exists():
        raise ResultsError(f"{folder} holds no results: no {SETTINGS_FILE}")
    return Results(folder, _read_records(folder / RECORDS_FILE))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is damaged: {error}") from error
    return read


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    now = json.loads(json.dumps(now))
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _replace(path: Path, text: str) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def _drop_cut_line(path: Path) -> None:
    """Cut off what follows the last line break: a line that was being written."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _read_records(path: Path) -> dict[Key, Record]:
    if not path.exists():
        return {}
    names = [field.name for field in fields(Record)]
    records = {}
    # Not ``splitlines``: answers may hold other line breaks, which JSON leaves as they are.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            read = json.loads(line)
            values: dict[str, Any] = {
                name: tuple(read[name]) if isinstance(read[name], list) else read[name]
                for name in names
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path}, line {number}, is damaged: {error}") from error
        record = Record(**values)
        records[record.key] = record
    return records
