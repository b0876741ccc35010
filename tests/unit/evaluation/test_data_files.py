"""What is wrong with a data file, and in which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkkv.errors import DatasetError
from chunkkv.evaluation.tasks.files import read_csv, read_jsonl

FIELDS = {"input": str, "answers": list}
GOOD = '{"input": "a", "answers": []}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{GOOD}\n\n{{oops", r"x\.jsonl, line 3: not JSON: "),
        (f"{GOOD}\n[1]", r"x\.jsonl, line 2: not a JSON object"),
        (f'{GOOD}\n{{"input": "b"}}', r"x\.jsonl, line 2: field 'answers' is missing"),
        ('{"input": 1, "answers": []}', r"x\.jsonl, line 1: field 'input' is int, not str"),
        ("\n\n", r"x\.jsonl has no records"),
        ("", r"x\.jsonl has no records"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "x.jsonl"
    path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        read_jsonl(path, FIELDS, source="somewhere")


def test_jsonl_of_other_encodings_is_refused_or_read(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"input": "é", "answers": []}'.encode())

    assert read_jsonl(path, FIELDS, source="somewhere") == [{"input": "é", "answers": []}]
    path.write_bytes('{"input": "é", "answers": []}'.encode("latin-1"))
    with pytest.raises(DatasetError, match="is not UTF-8"):
        read_jsonl(path, FIELDS, source="somewhere")


@pytest.mark.parametrize("name", ["no.jsonl", "."])
def test_missing_file_names_its_source(tmp_path: Path, name: str):
    with pytest.raises(DatasetError, match="is not there; it comes from somewhere"):
        read_jsonl(tmp_path / name, FIELDS, source="somewhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"line 1: columns \['a', 'b'\] are missing"),
        ("a,c\n1,2\n", r"line 1: columns \['b'\] are missing"),
        ("a,b\n", "has no rows"),
        ("a,b\n1,2\n3\n", "line 3: not 2 values"),
        ("a,b\n1,2,3\n", "line 2: not 2 values"),
        ('a,b\n1,"2\n', "row from line 2: unexpected end of data"),
    ],
)
def test_bad_csv_is_refused_with_its_line(tmp_path: Path, content: str, message: str):
    path = tmp_path / "x.csv"
    path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        read_csv(path, ["a", "b"], source="somewhere")


def test_csv_with_byte_order_mark_line_breaks_and_quotes_is_read(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n"one\n""two""",3\r\n')

    assert read_csv(path, ["a", "b"], source="somewhere") == [{"a": 'one\n"two"', "b": "3"}]


def test_csv_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,\xff\n")

    with pytest.raises(DatasetError, match="is not UTF-8"):
        read_csv(path, ["a", "b"], source="somewhere")
