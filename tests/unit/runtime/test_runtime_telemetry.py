"""Logs are JSON lines on stdout."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from services.runtime.telemetry import configure_logging, get_logger


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Logging as it was before, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_an_event_is_a_json_line_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")

    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        get_logger().info("prefill.done", num_prompt_tokens=3)
    get_logger().debug("unheard")

    [line] = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "prefill.done",
        "num_prompt_tokens": 3,
        "request_id": "r-1",
        "level": "info",
    }


def test_an_exception_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")

    try:
        raise ValueError("what happened")
    except ValueError:
        get_logger().exception("request.failed")

    [line] = capsys.readouterr().out.splitlines()
    assert "ValueError: what happened" in json.loads(line)["exception"]


def test_other_packages_are_heard_from_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info")

    logging.getLogger("grpc").info("unheard")
    logging.getLogger("grpc").warning("heard")

    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["event"] == "heard"
    assert json.loads(line)["level"] == "warning"
