"""The Node example against a real gRPC server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from services.runtime.errors import CorruptError, InvalidRequestError
from tests.integration.client_stand_in import WAIT_S, StandIn, Status

FOLDER = Path(__file__).parents[2] / "clients" / "node"
NODE = shutil.which("node")


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    if NODE is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node_modules").is_dir():
        pytest.skip("clients/node/node_modules is missing: make node-deps")
    with StandIn.serve() as stand_in:
        yield stand_in


def start(*args: str) -> subprocess.Popen[str]:
    assert NODE is not None
    return subprocess.Popen(
        [NODE, str(FOLDER / "generate.mjs"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(gateway: StandIn, *args: str) -> tuple[int, str, str]:
    with start(*args, "--address", gateway.address) as process:
        stdout, stderr = process.communicate(timeout=3 * WAIT_S)
    return process.returncode, stdout, stderr


def test_two_turns_stream_on_one_session(gateway: StandIn, tmp_path: Path):
    document = tmp_path / "doc.txt"
    document.write_text("a document", encoding="utf-8")

    code, stdout, stderr = run(
        gateway, "one?", "two?", "--file", str(document), "--max-tokens", "5", "--keep-ratio", "0.5"
    )

    assert (code, stderr) == (0, "")
    assert stdout.count("Paris is big.\n") == 2
    assert "FINISH_REASON_STOP" in stdout
    create, first, second, delete = (call.request for call in gateway.calls)
    assert create.compression.keep_ratio == 0.5
    assert first.chat.messages[0].content == "a document\n\none?"
    assert second.chat.messages[0].content == "two?"
    assert first.session_id == second.session_id == delete.session_id == "s-0"
    assert first.sampling.max_tokens == 5
    assert not first.sampling.HasField("temperature")


def test_error_shows_its_reason(gateway: StandIn):
    gateway.failures.append(InvalidRequestError("keep_ratio=9; send a value in (0, 1]"))

    code, _, stderr = run(gateway, "one?", "two?", "--keep-ratio", "9")

    assert code == 1
    assert stderr == (
        "error: keep_ratio=9; send a value in (0, 1] [INVALID_ARGUMENT, INVALID_REQUEST]\n"
    )


def test_error_in_the_stream_comes_after_the_text(gateway: StandIn):
    gateway.fail_at = (1, CorruptError("segment damaged"))

    code, stdout, stderr = run(gateway, "one?", "two?")

    assert (code, stdout) == (1, "Par\n")
    assert "segment damaged [DATA_LOSS, SEGMENT_CORRUPT]" in stderr


def test_status_with_damaged_details_is_shown(gateway: StandIn):
    details = (("grpc-status-details-bin", b"\xff\xff"),)
    gateway.failures.append(Status(grpc.StatusCode.UNAVAILABLE, "proxy", details))

    code, _, stderr = run(gateway, "one?", "two?")

    assert (code, stderr) == (1, "error: proxy [UNAVAILABLE]\n")


def test_stream_without_an_end_is_an_error(gateway: StandIn):
    gateway.is_cut = True

    code, _, stderr = run(gateway, "one?", "two?")

    assert (code, stderr) == (1, "error: the answer ended without its last event\n")


def test_deadline_is_an_error(gateway: StandIn):
    gateway.hang_at = 1

    code, _, stderr = run(gateway, "one?", "two?", "--timeout", "3")

    assert code == 1
    assert "[DEADLINE_EXCEEDED]" in stderr
    assert gateway.cancelled.wait(WAIT_S)


def test_interrupt_cancels_the_answer(gateway: StandIn):
    gateway.hang_at = 1
    with start("one?", "two?", "--address", gateway.address) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "Par"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_S)

    assert (process.returncode, stderr) == (130, "")
    assert gateway.cancelled.wait(WAIT_S)


@pytest.mark.parametrize(
    "args",
    [
        ["one?"],
        ["one?", "two?", "--colour", "red"],
        ["one?", "two?", "--max-tokens", "many"],
        ["one?", "two?", "--file", "/does/not/exist"],
    ],
    ids=["one_question", "option", "number", "file"],
)
def test_wrong_usage_exits_2(gateway: StandIn, args: list[str]):
    code, _, stderr = run(gateway, *args)

    assert code == 2
    assert "usage: node generate.mjs" in stderr
    assert gateway.calls == []


def test_lock_file_names_no_registry_and_exact_versions():
    lock = json.loads((FOLDER / "package-lock.json").read_text())
    package = json.loads((FOLDER / "package.json").read_text())

    assert not any("resolved" in entry for entry in lock["packages"].values())
    assert all(version[0].isdigit() for version in package["dependencies"].values())
    assert lock["packages"][""]["dependencies"] == package["dependencies"]
