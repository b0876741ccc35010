"""Settings of the gateway process."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from services.runtime.config import ServiceSettings


def _seconds(default: float) -> float:
    value: float = Field(default=default, gt=0, allow_inf_nan=False)
    return value


class GatewaySettings(ServiceSettings):
    """What the gateway needs to know beside the common settings.

    Attributes:
        listen: ``host:port`` of its gRPC server.
        default_model: The model of requests that name none. Empty: the only model that lives.
        tenant: Owner of all sessions, until tokens name one.
        session_ttl_s: How long a session lives after each use, if its creator does not say.
        max_session_ttl_s: The most that a creator may say.
        ephemeral_ttl_s: After how long the segments of a one-off request are gone, should the
            gateway die before it deletes them.
        lease_ttl_s: After how long another turn may begin, should the gateway die during one.
            Renewed every third of it.
        worker_refresh_s: Age at which the list of living workers is read again.
        max_concurrent_requests: Generate and CountTokens calls at once; more are refused.
        default_deadline_s: Time for a call that brings no deadline.
        failover_wait_s: How long an answer whose decode worker died waits for another one.
        quota_sessions: Sessions that the tenant may have; 0: any number.
        quota_stored_bytes: Bytes of segments from which on its sessions take no more turns; 0: any.
        quota_concurrent_turns: Generate calls of the tenant at once, on all gateways; 0: any.
    """

    listen: str = "127.0.0.1:50051"
    default_model: str = ""
    tenant: str = "default"
    session_ttl_s: float = _seconds(86_400)
    max_session_ttl_s: float = _seconds(7 * 86_400)
    ephemeral_ttl_s: float = _seconds(900)
    lease_ttl_s: float = _seconds(15)
    worker_refresh_s: float = _seconds(0.5)
    max_concurrent_requests: int = Field(default=256, ge=1)
    default_deadline_s: float = _seconds(600)
    failover_wait_s: float = Field(default=20.0, ge=0, allow_inf_nan=False)
    quota_sessions: int = Field(default=0, ge=0)
    quota_stored_bytes: int = Field(default=0, ge=0)
    quota_concurrent_turns: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_session_ttl(self) -> Self:
        if self.session_ttl_s > self.max_session_ttl_s:
            raise ValueError(
                f"CHUNKSERVE_SESSION_TTL_S={self.session_ttl_s} is more than "
                f"CHUNKSERVE_MAX_SESSION_TTL_S={self.max_session_ttl_s}"
            )
        return self
