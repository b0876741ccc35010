"""Settings that all processes share."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.runtime.config import ServiceSettings, load


def test_defaults_fit_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHUNKSERVE_REDIS_URL", raising=False)

    assert load(ServiceSettings).redis_url == "redis://127.0.0.1:6379/0"


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKSERVE_REDIS_URL", "unix:///tmp/x.sock")
    monkeypatch.setenv("CHUNKSERVE_HEARTBEAT_S", "0.5")

    settings = load(ServiceSettings)

    assert (settings.redis_url, settings.heartbeat_s) == ("unix:///tmp/x.sock", 0.5)


def test_settings_do_not_change() -> None:
    settings = ServiceSettings()

    with pytest.raises(ValidationError, match="frozen"):
        settings.log_level = "debug"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHUNKSERVE_LOG_LEVEL", "loud"),
        ("CHUNKSERVE_HEARTBEAT_S", "0"),
        ("CHUNKSERVE_HEARTBEAT_S", "nan"),
        ("CHUNKSERVE_STOP_GRACE_S", "-1"),
    ],
)
def test_a_malformed_value_ends_the_process_and_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit, match=f"^{name}='{value}': "):
        load(ServiceSettings)


def test_values_that_contradict_each_other_name_both_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CHUNKSERVE_HEARTBEAT_S", "9")

    with pytest.raises(SystemExit, match=r"^CHUNKSERVE_HEARTBEAT_TTL_S=5\.0 must be more than"):
        load(ServiceSettings)
