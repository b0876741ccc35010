"""The client commands against a real gRPC server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from chunkserve.v1 import types_pb2
from services.cli.app import app
from services.runtime import errors
from tests.integration.client_stand_in import WAIT_S, StandIn, Status, exported


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn.serve() as stand_in:
        yield stand_in


def run(gateway: StandIn, *args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, args, input=stdin, env={"CHUNKSERVE_ADDRESS": gateway.address})


@contextlib.contextmanager
def start(
    gateway: StandIn,
    *args: str,
    stdin: int = subprocess.PIPE,
    stdout: int = subprocess.PIPE,
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "services.cli", *args, "--address", gateway.address],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # harmless after its end


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Our end and the program's end of a terminal."""
    ours, theirs = os.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def read_until(terminal: int, end: str, *, again: Callable[[], None] | None = None) -> None:
    """Read up to ``end``; every second without output, do ``again``."""
    seen = ""
    deadline = time.monotonic() + WAIT_S
    while not seen.endswith(end):
        assert time.monotonic() < deadline, f"{seen!r} lacks {end!r}"
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 4096).decode()
        elif again is not None:
            again()


def only_request(gateway: StandIn) -> Any:
    (call,) = gateway.calls
    return call.request


def one_error_line(result: Result) -> str:
    assert isinstance(result.exception, SystemExit)  # not a traceback
    (line,) = result.stderr.splitlines()
    return line


def test_generate_prints_the_answer(gateway: StandIn):
    result = run(gateway, "generate", "Capital of France?")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris is big.\n", "")
    assert only_request(gateway).chat.messages[0].content == "Capital of France?"


def test_generate_sends_every_option(gateway: StandIn):
    args = """--max-tokens 5 --temperature 0.5 --seed 9 --stop END --stop . --model tiny
        --repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5
        --keep-ratio 0.2 --scorer window --unit chunk --scope group --chunk-size 20
        --window-size 8 --sink-tokens 4 --reuse-interval 2 --preset chunkkv --spread uniform
        --vote-power 2 --pool-size 5 --head-floor 0.5 --gating 0.25 --merge-layers --precision int8
        --max-kv-tokens 900 --request-id mine"""

    assert run(gateway, "generate", "hi", *args.split()).exit_code == 0

    request = only_request(gateway)
    assert (request.model, request.request_id) == ("tiny", "mine")
    assert request.sampling == types_pb2.SamplingParams(
        max_tokens=5,
        temperature=0.5,
        seed=9,
        stop=["END", "."],
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
    )
    assert request.compression == types_pb2.CompressionPolicy(
        keep_ratio=0.2,
        scorer=types_pb2.SCORER_WINDOW,
        unit=types_pb2.UNIT_CHUNK,
        scope=types_pb2.SCOPE_GROUP,
        chunk_size=20,
        window_size=8,
        sink_tokens=4,
        reuse_interval=2,
        preset="chunkkv",
        spread=types_pb2.BUDGET_SPREAD_UNIFORM,
        vote_power=2,
        pool_size=5,
        head_floor=0.5,
        gating=0.25,
        merge_layers=True,
        precision=types_pb2.PRECISION_INT8,
        max_kv_tokens=900,
    )


def test_generate_reads_stdin_without_a_prompt(gateway: StandIn):
    assert run(gateway, "generate", stdin="from stdin").exit_code == 0

    assert only_request(gateway).chat.messages[0].content == "from stdin"


def test_generate_puts_the_file_before_the_question(gateway: StandIn, tmp_path: Path):
    document = tmp_path / "doc.txt"
    document.write_text("a document", encoding="utf-8")

    run(gateway, "generate", "a question", "--file", str(document))
    run(gateway, "generate", "a question", "--file", "-", stdin="piped")

    contents = [call.request.chat.messages[0].content for call in gateway.calls]
    assert contents == ["a document\n\na question", "piped\n\na question"]


def test_generate_raw_and_system(gateway: StandIn):
    run(gateway, "generate", "once upon", "--raw")
    run(gateway, "generate", "hi", "--system", "be brief")

    raw, chat = (call.request for call in gateway.calls)
    assert raw.text == "once upon"
    assert [message.role for message in chat.chat.messages] == ["system", "user"]


def test_generate_json_prints_an_event_a_line(gateway: StandIn):
    result = run(gateway, "generate", "hi", "--json")

    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["prompt_info", *["delta"] * 4, "finish"]
    assert events[1] == {
        "event": "delta",
        "text": "Par",
        "token_ids": [100],
        "first_token_index": 0,
        "logprobs": [],
    }
    assert events[-1]["reason"] == "stop"


def test_generate_json_has_the_logprobs(gateway: StandIn):
    result = run(gateway, "generate", "hi", "--json", "--logprobs", "1")

    delta = json.loads(result.stdout.splitlines()[1])
    assert delta["logprobs"] == [
        {
            "token_id": 100,
            "logprob": -0.5,
            "top_logprobs": [{"token_id": 100, "logprob": -0.5}],
        }
    ]


def test_generate_stats_go_to_stderr(gateway: StandIn):
    result = run(gateway, "generate", "hi", "--stats")

    assert result.stdout == "Paris is big.\n"
    assert "100 tokens (10%)" in result.stderr
    assert "30.0 MiB full, 3.0 MiB stored" in result.stderr
    assert "100.0 tokens/s" in result.stderr


def test_generate_on_a_session(gateway: StandIn):
    run(gateway, "sessions", "create", "s-1")

    assert run(gateway, "generate", "hi", "--session", "s-1").exit_code == 0
    assert gateway.sessions["s-1"].num_turns == 1


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (["generate", "--file", "/does/not/exist"], None),
        (["generate", "hi", "--raw", "--system", "x"], None),
        (["generate", "--file", "-"], b"\xff\xfe"),
        (["generate", "hi", "--logprobs", "2"], None),
        (["generate", "hi", "--max-tokens", "many"], None),
        (["generate", "hi", "--timeout", "0"], None),
        (["generate", "hi", "--colour"], None),
        (["sessions", "show"], None),
        (["nonsense"], None),
    ],
    ids=[
        "no_file",
        "raw_system",
        "not_utf8",
        "logprobs",
        "no_int",
        "timeout",
        "option",
        "argument",
        "command",
    ],
)
def test_wrong_usage_exits_2(gateway: StandIn, args: list[str], stdin: bytes | None):
    result = run(gateway, *args, stdin=stdin)

    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert gateway.calls == []


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            errors.InvalidRequestError("temperature=9; send 0 to 2", field="sampling.temperature"),
            "temperature=9; send 0 to 2 [INVALID_REQUEST] (request r-1)",
        ),
        (errors.NotFoundError("no model 'x'"), "`chunkserve models` shows"),
        (errors.AlreadyExistsError("taken"), "choose another name"),
        (errors.ConflictError("busy"), "[SESSION_BUSY] - try again when"),
        (errors.MismatchError("other weights"), "create a new session"),
        (errors.CorruptError("damaged"), "[SEGMENT_CORRUPT] - delete the session"),
        (errors.OverloadedError("full", retry_after_s=90000), "try again in 90000 s"),
        (errors.OverloadedError("full"), "try again later"),
        (errors.UnavailableError("no worker"), "[UNAVAILABLE] - try again"),
        (errors.DeadlineError("too slow"), "--timeout"),
        (Status(grpc.StatusCode.INTERNAL, "two\nlines"), "two lines - the server's log"),
        (Status(grpc.StatusCode.UNAVAILABLE, "proxy"), "is a gateway running there?"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_error_of_the_server_is_one_line_and_exit_code_1(
    gateway: StandIn, failure: errors.ServiceError | Status, words: str
):
    gateway.failures.extend([failure] * 3)

    result = run(gateway, "generate", "hi", "--request-id", "r-1")

    assert result.exit_code == 1
    assert words in one_error_line(result)
    assert result.stdout == ""


def test_error_in_the_stream_comes_after_the_text(gateway: StandIn):
    gateway.fail_at = (1, errors.UnavailableError("worker died"))

    result = run(gateway, "generate", "hi")

    assert (result.exit_code, result.stdout) == (1, "Par\n")
    assert "worker died" in one_error_line(result)


def test_argument_that_is_no_text_is_an_error(gateway: StandIn):
    result = run(gateway, "generate", "lone \udcff surrogate")

    assert result.exit_code == 1
    assert "cannot be sent" in one_error_line(result)


def test_no_gateway_is_an_error():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        result = CliRunner().invoke(app, ["models", "--address", address])

    assert result.exit_code == 1
    assert f"no answer from {address}" in one_error_line(result)


def test_sessions_are_created_listed_shown_and_deleted(gateway: StandIn):
    created = run(gateway, "sessions", "create", "s-1", "--ttl", "60", "--keep-ratio", "0.25")
    assert (created.exit_code, created.stdout) == (0, "s-1\n")
    assert only_request(gateway).ttl.seconds == 60
    run(gateway, "generate", "hi", "--session", "s-1")

    listed = run(gateway, "sessions", "list").stdout.splitlines()
    assert listed[0].split()[:6] == ["session", "model", "turns", "tokens", "kept", "stored"]
    assert listed[1].split()[:7] == ["s-1", "tiny", "1", "1004", "104", "3.0", "MiB"]

    shown = run(gateway, "sessions", "show", "s-1").stdout
    assert "policy      keep_ratio=0.25" in shown
    assert "1004, 104 kept" in shown
    assert "seg-1" in shown

    assert run(gateway, "sessions", "delete", "s-1").exit_code == 0
    assert run(gateway, "sessions", "list").stdout.splitlines()[1:] == []
    missing = run(gateway, "sessions", "show", "s-1")
    assert missing.exit_code == 1
    assert "[SESSION_NOT_FOUND] - `chunkserve sessions list`" in one_error_line(missing)


def test_sessions_are_forked_and_compressed(gateway: StandIn):
    run(gateway, "sessions", "create", "s-1")
    run(gateway, "generate", "hi", "--session", "s-1")

    forked = run(gateway, "sessions", "fork", "s-1", "s-2", "--ttl", "60")
    assert (forked.exit_code, forked.stdout) == (0, "s-2\n")
    assert gateway.sessions["s-2"].ttl.seconds == 60
    compress = ["sessions", "compress", "s-2", "--keep-ratio", "0.05", "--precision", "int8"]
    compressed = run(gateway, *compress)
    assert compressed.stdout == "s-2: 104 kept tokens in 3.0 MiB are now 52 in 1.5 MiB\n"
    assert gateway.calls[-1].request.compression == types_pb2.CompressionPolicy(
        keep_ratio=0.05, precision=types_pb2.PRECISION_INT8
    )
    as_json = json.loads(run(gateway, *compress, "--json").stdout)
    assert (as_json["original_kept_tokens"], as_json["info"]["session_id"]) == (52, "s-2")


def test_sessions_are_exported_and_imported(gateway: StandIn, tmp_path: Path):
    run(gateway, "sessions", "create", "s-1")
    path = tmp_path / "s-1.session"

    assert run(gateway, "sessions", "export", "s-1", "--output", str(path)).exit_code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["s-1.session"]
    imported = run(gateway, "sessions", "import", str(path), "--session", "copy")

    assert (imported.exit_code, imported.stdout) == (0, "copy\n")
    assert gateway.imported == exported(gateway.sessions["s-1"])


def test_an_export_that_fails_leaves_no_file(gateway: StandIn, tmp_path: Path):
    run(gateway, "sessions", "create", "s-1")
    gateway.fail_at = (2, errors.CorruptError("damaged"))

    result = run(gateway, "sessions", "export", "s-1", "-o", str(tmp_path / "file"))

    assert "[SEGMENT_CORRUPT]" in one_error_line(result)
    assert list(tmp_path.iterdir()) == []


def test_an_export_into_no_folder_is_refused(gateway: StandIn, tmp_path: Path):
    run(gateway, "sessions", "create", "s-1")

    result = run(gateway, "sessions", "export", "s-1", "-o", str(tmp_path / "none" / "file"))

    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_a_file_that_is_no_export_is_not_imported(gateway: StandIn, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"something else, and longer than the mark")

    result = run(gateway, "sessions", "import", str(path))

    assert "no exported session" in one_error_line(result)
    assert gateway.sessions == {}


def test_sessions_as_json(gateway: StandIn):
    created = json.loads(run(gateway, "sessions", "create", "--json").stdout)
    shown = json.loads(run(gateway, "sessions", "show", "s-0", "--json").stdout)
    listed = json.loads(run(gateway, "sessions", "list", "--json").stdout)

    assert created == shown == listed[0]
    assert created["session_id"] == "s-0"
    assert created["compression"] is None
    assert created["create_time"] == "2026-01-02T03:04:05+00:00"


def test_session_of_the_servers_policy_says_so(gateway: StandIn):
    run(gateway, "sessions", "create", "s-1")

    assert "policy      the server's" in run(gateway, "sessions", "show", "s-1").stdout


def test_models_are_listed(gateway: StandIn):
    header, row = run(gateway, "models").stdout.splitlines()
    (as_json,) = json.loads(run(gateway, "models", "--json").stdout)

    assert header.startswith("model")
    assert row.split() == ["tiny", "8192", "1", "2", "keep_ratio=0.1", "chunk_size=10"]
    assert as_json["default_compression"]["keep_ratio"] == 0.1


def test_tokens_are_counted(gateway: StandIn):
    assert run(gateway, "count", "one two three").stdout == "3\n"
    assert run(gateway, "count", "--raw", stdin="one two").stdout == "2\n"
    counted = json.loads(run(gateway, "count", "one", "--json").stdout)
    assert counted == {"num_tokens": 1, "model": "tiny"}


def test_chat_answers_on_one_new_session(gateway: StandIn):
    result = run(gateway, "chat", "--keep-ratio", "0.5", stdin="first\n\nsecond\n")

    assert result.exit_code == 0
    assert result.stdout == "Paris is big.\n" * 2
    assert "continue with: chunkserve chat --session s-0" in result.stderr
    create, *turns = (call.request for call in gateway.calls)
    assert create.compression.keep_ratio == 0.5
    assert [turn.chat.messages[0].content for turn in turns] == ["first", "second"]
    assert {turn.session_id for turn in turns} == {"s-0"}


def test_chat_penalizes_as_it_is_told(gateway: StandIn):
    args = "--repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5"

    run(gateway, "chat", *args.split(), stdin="hello\n")

    [turn] = [call.request for call in gateway.calls if call.method == "Generate"]
    assert turn.sampling == types_pb2.SamplingParams(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5
    )


def test_chat_sends_system_and_file_until_a_turn_is_answered(gateway: StandIn, tmp_path: Path):
    document = tmp_path / "doc.txt"
    document.write_text("a document")
    run(gateway, "sessions", "create", "s-1")
    gateway.calls.clear()
    args = ["chat", "--session", "s-1", "--system", "be brief", "--file", str(document)]
    gateway.fail_at = (1, errors.DeadlineError("too slow"))

    with start(gateway, *args) as chat:
        assert chat.stdin is not None
        assert chat.stderr is not None
        print("one", file=chat.stdin, flush=True)
        assert "session s-1" in chat.stderr.readline()
        assert "too slow" in chat.stderr.readline()
        gateway.fail_at = None
        stdout, _ = chat.communicate("two\nthree\n", timeout=WAIT_S)

    assert (chat.returncode, stdout) == (0, "Par\nParis is big.\nParis is big.\n")
    turns = [c.request.chat.messages for c in gateway.calls if c.method == "Generate"]
    assert [[message.role for message in turn] for turn in turns] == [
        ["system", "user"],
        ["system", "user"],
        ["user"],
    ]
    assert [turn[-1].content for turn in turns] == [
        "a document\n\none",
        "a document\n\ntwo",
        "three",
    ]


def test_chat_commands(gateway: StandIn):
    lines = "/stats\nhi\n/stats\n/session\n/help\n/what\n/exit\nnot read\n"

    result = run(gateway, "chat", stdin=lines)

    assert result.exit_code == 0
    assert result.stdout == "Paris is big.\n"
    for words in ("nothing was asked yet", "100 tokens (10%)", "1 turns, 1004 tokens", "Ctrl-D"):
        assert words in result.stderr
    assert "/what is no command" in result.stderr


def test_chat_can_print_stats_of_every_turn(gateway: StandIn):
    result = run(gateway, "chat", "--stats", stdin="one\ntwo\n")

    assert result.stderr.count("100 tokens (10%)") == 2


def test_chat_ends_when_its_session_is_gone(gateway: StandIn):
    result = run(gateway, "chat", "--session", "gone", stdin="hi\n")

    assert result.exit_code == 1
    assert "SESSION_NOT_FOUND" in one_error_line(result)


def test_interrupt_in_chat_stops_the_answer_alone(gateway: StandIn):
    gateway.hang_at = 1
    with start(gateway, "chat") as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        print("one", file=chat.stdin, flush=True)
        assert chat.stdout.read(3) == "Par"
        chat.send_signal(signal.SIGINT)
        assert gateway.cancelled.wait(WAIT_S)
        gateway.hang_at = None
        stdout, stderr = chat.communicate("two\n", timeout=WAIT_S)

    assert (chat.returncode, stdout) == (0, "\nParis is big.\n"), stderr
    assert "stopped: the session is as it was" in stderr


def test_interrupt_at_the_prompt_of_a_pipe_ends_the_chat(gateway: StandIn):
    with start(gateway, "chat") as chat:
        assert chat.stderr is not None
        assert "session s-0" in chat.stderr.readline()
        chat.send_signal(signal.SIGINT)
        _, stderr = chat.communicate(timeout=WAIT_S)

    assert chat.returncode == 130
    assert "Traceback" not in stderr


def test_interrupt_of_generate_exits_130_and_cancels(gateway: StandIn):
    gateway.hang_at = 1
    with start(gateway, "generate", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "Par"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_S)

    assert (process.returncode, stdout, stderr) == (130, "\n", "")
    assert gateway.cancelled.wait(WAIT_S)


def test_chat_at_a_terminal(gateway: StandIn):
    with terminal() as (ours, theirs), start(gateway, "chat", stdin=theirs, stdout=theirs) as chat:
        read_until(ours, "> ")
        chat.send_signal(signal.SIGINT)
        # Python does not notice a signal between the prompt and its waiting for a key.
        read_until(ours, "> ", again=lambda: chat.send_signal(signal.SIGINT))
        os.write(ours, b"hi\n")
        read_until(ours, "Paris is big.\r\n> ")
        os.write(ours, b"\x04")
        _, stderr = chat.communicate(timeout=WAIT_S)

    assert chat.returncode == 0
    assert "(Ctrl-D ends)" in stderr
    assert "continue with: chunkserve chat --session s-0" in stderr


def test_generate_at_a_terminal_does_not_wait_for_text(gateway: StandIn):
    with terminal() as (_, theirs), start(gateway, "generate", stdin=theirs) as process:
        _, stderr = process.communicate(timeout=WAIT_S)

    assert process.returncode == 2
    assert "give a prompt" in stderr


def test_reader_that_goes_away_ends_generate_quietly(gateway: StandIn):
    gateway.answer = ["word " * 1000] * 200
    with start(gateway, "generate", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "wor"
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
        assert process.wait(WAIT_S) == 1

    assert stderr == ""


def test_version_and_help(gateway: StandIn):
    assert run(gateway, "--version").stdout.strip()[0].isdigit()
    shown = run(gateway, "--help")
    assert shown.exit_code == 0
    for command in ("generate", "chat", "sessions", "models", "count", "gateway", "prefill"):
        assert command in shown.stdout
