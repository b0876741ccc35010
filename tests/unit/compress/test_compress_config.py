"""Settings of a compression worker: when it begins to make room, and when it ends."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.compress.config import CompressionSettings
from services.compress.pressure import Marks


def test_pressure_is_off_by_default():
    settings = CompressionSettings()

    assert settings.tenants == ("default",)
    assert settings.total_marks == settings.tenant_marks == Marks(0, 0)


def test_low_mark_is_nine_tenths_unless_it_is_given():
    settings = CompressionSettings(
        pressure_high_bytes=1001, tenant_pressure_high_bytes=100, tenant_pressure_low_bytes=50
    )

    assert settings.total_marks == Marks(1001, 900)
    assert settings.tenant_marks == Marks(100, 50)


def test_tenants_are_a_json_list(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHUNKSERVE_TENANTS", '["one", "two"]')

    assert CompressionSettings().tenants == ("one", "two")


@pytest.mark.parametrize("name", ["pressure", "tenant_pressure"])
@pytest.mark.parametrize("low", [10, 11])
def test_low_mark_must_be_below_the_high_one(name: str, low: int):
    with pytest.raises(ValidationError, match="must be less than"):
        CompressionSettings(**{f"{name}_high_bytes": 10, f"{name}_low_bytes": low})
