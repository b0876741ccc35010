"""Settings that all processes share, and how a process reads its own.

Settings come from ``CHUNKSERVE_*`` environment variables, are read once and never change.
"""

from __future__ import annotations

from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_ENV_PREFIX = "CHUNKSERVE_"


class ServiceSettings(BaseSettings):
    """What every process needs to know.

    Attributes:
        redis_url: The store: ``redis://``, ``rediss://`` (TLS) or ``unix://``, password included.
        log_level: The least level that is logged.
        heartbeat_s: Seconds between two announcements of a worker.
        heartbeat_ttl_s: Seconds after its last announcement until a worker counts as dead.
        stop_grace_s: Seconds that running requests get to finish once a stop is asked for.
        metrics_listen: ``host:port`` where ``GET /metrics`` is answered in Prometheus' format.
            Empty: nowhere.
    """

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, frozen=True, extra="ignore")

    redis_url: str = "redis://127.0.0.1:6379/0"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    heartbeat_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    heartbeat_ttl_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    stop_grace_s: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    metrics_listen: str = Field(default="", pattern=r"^(.+:\d{1,5})?$")

    @model_validator(mode="after")
    def _check_heartbeat(self) -> Self:
        if self.heartbeat_ttl_s <= self.heartbeat_s:
            raise ValueError(
                f"{_ENV_PREFIX}HEARTBEAT_TTL_S={self.heartbeat_ttl_s} must be more than "
                f"{_ENV_PREFIX}HEARTBEAT_S={self.heartbeat_s}, or workers seem to die"
            )
        return self


Settings = TypeVar("Settings", bound=ServiceSettings)


def load(settings_class: type[Settings]) -> Settings:
    """Read the settings from the environment.

    Raises:
        SystemExit: A value is malformed; the message names each variable.
    """
    try:
        return settings_class()
    except ValidationError as error:
        raise SystemExit("\n".join(_explain(settings_class, error))) from None


def _explain(settings_class: type[Settings], error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        if problem["loc"]:
            name = f"{_ENV_PREFIX}{str(problem['loc'][0]).upper()}"
            lines.append(f"{name}={problem['input']!r}: {problem['msg']}")
        else:
            lines.append(problem["msg"].removeprefix("Value error, "))
    return lines
