"""Records of published data sets from local files; errors say which line of which file is wrong."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chunkkv.errors import DatasetError

Record = Mapping[str, Any]


def read_jsonl(path: Path, fields: Mapping[str, type], *, source: str) -> list[Record]:
    """Return the records of a file with a JSON object on each line; empty lines are skipped.

    Args:
        path: UTF-8.
        fields: Names and types that every record must have.
        source: Where the file comes from, for the error if it is missing.

    Raises:
        DatasetError: If the file is missing or empty, a line is no JSON object or lacks a field.
    """
    with _open(path, source) as lines:
        return check_records(str(path), json_objects(str(path), lines), fields)


def check_records(
    name: str, records: Iterable[tuple[int, Any]], fields: Mapping[str, type]
) -> list[Record]:
    """Return numbered records after checking that each has its fields.

    Raises:
        DatasetError: If one has not, or there are none.
    """
    checked = []
    for number, record in records:
        for field, kind in fields.items():
            if field not in record:
                raise DatasetError(f"{name}, line {number}: field {field!r} is missing")
            if not isinstance(record[field], kind):
                raise DatasetError(
                    f"{name}, line {number}: field {field!r} is "
                    f"{type(record[field]).__name__}, not {kind.__name__}"
                )
        checked.append(record)
    if not checked:
        raise DatasetError(f"{name} has no records")
    return checked


def read_csv(path: Path, columns: Sequence[str], *, source: str) -> list[Record]:
    """Return the rows of a CSV file whose first line names the columns.

    Args:
        path: UTF-8, with or without a byte order mark.
        columns: That there must be.
        source: Where the file comes from, for the error if it is missing.

    Raises:
        DatasetError: If the file is missing or has no rows, a column is missing, or a row has
            another number of values than the first line.
    """
    with _open(path, source, newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        try:
            missing = [name for name in columns if name not in (rows.fieldnames or ())]
            if missing:
                raise DatasetError(f"{path}, line 1: columns {missing} are missing")
            records: list[Record] = []
            for row in rows:
                if None in row or None in row.values():
                    raise DatasetError(
                        f"{path}, line {rows.line_num}: not {len(rows.fieldnames or ())} values"
                    )
                records.append(row)
        except csv.Error as error:
            raise DatasetError(f"{path}, row from line {rows.line_num + 1}: {error}") from error
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path} is not UTF-8: {error}") from error
    if not records:
        raise DatasetError(f"{path} has no rows")
    return records


def drawn(records: Sequence[Record], *, seed: int, count: int) -> list[tuple[int, Record]]:
    """Return the first ``count`` records of a shuffle, with their places in the file from 0."""
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    return [(index, records[index]) for index in order[:count]]


def json_objects(name: str, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Yield the objects of JSON lines with their line numbers, from 1.

    Raises:
        DatasetError: If a line is no JSON object.
    """
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise DatasetError(f"{name}, line {number}: not a JSON object")
            yield number, record
    except json.JSONDecodeError as error:
        raise DatasetError(f"{name}, line {number}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is not UTF-8: {error}") from error


def _open(path: Path, source: str, newline: str | None = None) -> Any:
    if not path.is_file():
        raise DatasetError(f"{path} is not there; it comes from {source}")
    return path.open(encoding="utf-8-sig", newline=newline)
