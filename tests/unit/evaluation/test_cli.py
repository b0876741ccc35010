"""The command line, end to end on a tiny model in a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from chunkkv import cli, policy_from_file
from chunkkv.cli import tables, tuning
from chunkkv.cli.app import app
from tests.tiny_model import byte_tokenizer, tiny_llama
from tests.unit.evaluation.documents import TEXT

GRID = ("--set", "lengths=(200,)", "--set", "depths=(0.0, 1.0)", "--samples", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(seed=3, max_model_len=1024).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 2, encoding="utf-8")
    return str(path)


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return re.sub(r"[\s│]+", " ", result.output)  # errors stand in a frame


def test_run_writes_table_json_and_pictures(model: str, tmp_path: Path) -> None:
    methods = ("--preset", "fast", "--preset", "snapkv:window_size=8", "--keep-ratio", "0.2")
    run = ("eval", "run", "needle-grid", model, "--out", str(tmp_path / "out"), *GRID, *methods)

    output = invoke(*run)

    assert "question not seen at compression, 2 questions" in output
    assert "| snapkv:window_size=8 |" in output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "table.md", "records.jsonl", "needle-grid-quality.png"} <= names
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    assert invoke(*run) == output
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before
    assert "| fast |" in invoke("eval", "report", str(tmp_path / "out"))


def test_what_is_wrong_is_said_in_a_line(model: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))

    assert "no task 'nope'" in invoke("eval", "run", "nope", model, *out, code=1)
    assert "no preset 'nope'" in invoke(
        "eval", "run", "needle", model, *out, "--preset", "nope", code=1
    )
    assert "holds no results" in invoke("eval", "report", str(tmp_path), code=1)


@pytest.mark.parametrize(
    ("task", "setting", "said"),
    [
        ("needle", "size=1", "no setting 'size'"),
        ("needle", "num_digits=x", "num_digits is 'x'; give an integer"),
        ("needle", "num_digits=7.5", "num_digits is '7.5'; give an integer"),
        ("needle", "num_digits=True", "give an integer"),
        ("needle", "num_digits", "num_digits is ''; give an integer"),
        ("needle", "num_needles=0", "num_needles=0 is not in"),
        ("needle-grid", "lengths=(200, 'x')", "give an integer, or several like (a, b)"),
        ("needle-grid", "depths=x", "give a number, or several like (a, b)"),
        ("needle-grid", "depths=(2,)", "depths are in [0, 1]"),
        ("longbench", "dataset=", "dataset is ''; give a text"),
        ("longbench", "max_prompt_tokens=x", "give an integer"),
        ("jailbreakv", "max_new_tokens=x", "give an integer"),
        ("gsm8k", "test_file=", "test_file is ''; give a text"),
        ("gsm8k", "num_shots=2", "test_file"),
        ("gsm8k", "as_chat=1", "give true or false"),
    ],
)
def test_setting_that_does_not_fit_is_wrong_usage(
    task: str, setting: str, said: str, tmp_path: Path
) -> None:
    run = ("eval", "run", task, "no-model", "--out", str(tmp_path / "out"))

    assert said in invoke(*run, "--set", setting, code=2)


def test_length_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    run = ("eval", "run", "needle", "no-model", "--out", str(tmp_path / "out"), "--tokens")

    assert "--tokens" in invoke(*run, "0", code=2)
    assert "not both" in invoke(*run, "500", "--set", "num_tokens=500", code=2)


def test_settings_are_read_as_their_types() -> None:
    [grid] = tables.made_tasks("needle-grid", ["lengths=200", "depths=[0, 1]"], [])
    assert (grid.lengths, grid.depths) == ((200,), (0, 1))
    [shots] = tables.made_tasks("gsm8k", ["test_file=1", "train_file=None", "as_chat=false"], [])
    assert (shots.test_file, shots.train_file, shots.as_chat) == (Path("1"), None, False)
    assert [t.num_tokens for t in tables.made_tasks("needle", [], [500, 900])] == [500, 900]


def test_sentences_are_cut_whether_the_question_is_seen_or_not(
    model: str, text: str, tmp_path: Path
) -> None:
    preset = ("--preset", "chunkkv:unit=sentence", "--keep-ratio", "0.4")
    size = ("--text", text, "--context-tokens", "100")

    output = invoke(
        "eval", "run", "needle-grid", model, "--out", str(tmp_path / "out"), *GRID, *preset
    )

    assert output.count("| chunkkv:unit=sentence |") == 2
    invoke("eval", "fidelity", model, *size, "--continuation-tokens", "8", *preset)
    invoke("eval", "cost", model, *size, *preset[:2], "--repeats", "1")


def test_names_are_listed() -> None:
    output = invoke("eval", "list")

    assert "needle-grid" in output
    assert "pyramidkv" in output


def test_fidelity_reuse_and_cost_print_tables(model: str, text: str, tmp_path: Path) -> None:
    size = ("--text", text, "--context-tokens", "100")
    read = (*size, "--continuation-tokens", "8", "--num-texts", "1")
    out = ("--out", str(tmp_path / "rows.json"))

    assert "agreement" in invoke("eval", "fidelity", model, *read, "--preset", "fast", *out)
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    assert "N = 8" in invoke("eval", "reuse", model, *read, *out)
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 5
    assert "int4" in invoke("eval", "cost", model, *size, "--preset", "fast", "--repeats", "1")


def test_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.load("package_that_is_not_there")

    assert "pip install 'chunkserve[eval]'" in capsys.readouterr().err


def test_tune_writes_a_policy_that_services_read(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tuning, "STAGES", {"scorer": ({"scorer": "window"}, {"scorer": "key_diff"})}
    )
    policy, plot = tmp_path / "policy.json", tmp_path / "curve.png"

    output = invoke(
        "tune", model, "--text", text, "--target", "0.9", "--out", str(policy), "--plot", str(plot),
        "--context-tokens", "100", "--continuation-tokens", "8", "--num-texts", "1",
        "--keep-ratio", "0.3", "--keep-ratio", "1",
    )  # fmt: skip

    assert "◀ chosen" in output
    assert policy_from_file(policy).keep_ratio in (0.3, 1.0)
    assert plot.read_bytes().startswith(b"\x89PNG")
