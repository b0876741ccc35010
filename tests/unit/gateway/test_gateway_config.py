"""Settings of the gateway."""

from __future__ import annotations

import pytest

from services.gateway.config import GatewaySettings
from services.runtime.config import load


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKSERVE_LISTEN", "0.0.0.0:1")
    monkeypatch.setenv("CHUNKSERVE_DEFAULT_MODEL", "m")

    settings = load(GatewaySettings)

    assert (settings.listen, settings.default_model) == ("0.0.0.0:1", "m")
    assert settings.tenant == "default"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon"])
def test_a_wrong_lease_ttl_names_its_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CHUNKSERVE_LEASE_TTL_S", value)

    with pytest.raises(SystemExit, match=f"CHUNKSERVE_LEASE_TTL_S='{value}'"):
        load(GatewaySettings)


def test_a_session_ttl_over_the_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKSERVE_MAX_SESSION_TTL_S", "10")

    with pytest.raises(SystemExit, match=r"CHUNKSERVE_SESSION_TTL_S=86400\.0 is more than"):
        load(GatewaySettings)
