"""Settings of a compression worker."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from services.compress.pressure import Marks
from services.runtime.config import ServiceSettings


class CompressionSettings(ServiceSettings):
    """What a compression worker needs to know.

    Attributes:
        listen: ``host:port`` of the gRPC server; port 0 lets the system choose.
        advertise_host: Host that the gateway reaches this worker by; empty: this machine's address.
        lease_ttl_s: After how long a turn of the session may begin, should this worker die while
            it compresses it. Renewed every third of it.
        max_concurrent_requests: Sessions that are compressed at once; one more is refused.
        tenants: Whose sessions the pressure policy sees, a JSON list.
        pressure_high_bytes: Stored bytes of all these tenants past which their sessions are made
            smaller, the coldest first. 0: never. Less than the store's memory, so that there is
            room for what they become.
        pressure_low_bytes: Where that ends, below the former. 0: nine tenths of it.
        tenant_pressure_high_bytes: The same of each tenant by itself.
        tenant_pressure_low_bytes: Where that ends.
        pressure_floor_ratio: Fraction of a segment's tokens that it keeps however short memory is.
        pressure_interval_s: Seconds between two looks at the stored bytes.
    """

    listen: str = "127.0.0.1:50054"
    advertise_host: str = "127.0.0.1"
    lease_ttl_s: float = Field(default=15, gt=0, allow_inf_nan=False)
    max_concurrent_requests: int = Field(default=4, ge=1)
    tenants: tuple[str, ...] = ("default",)
    pressure_high_bytes: int = Field(default=0, ge=0)
    pressure_low_bytes: int = Field(default=0, ge=0)
    tenant_pressure_high_bytes: int = Field(default=0, ge=0)
    tenant_pressure_low_bytes: int = Field(default=0, ge=0)
    pressure_floor_ratio: float = Field(default=0.05, gt=0, le=1)
    pressure_interval_s: float = Field(default=10, gt=0, allow_inf_nan=False)

    @property
    def total_marks(self) -> Marks:
        """Of all tenants together."""
        return _marks(self.pressure_high_bytes, self.pressure_low_bytes)

    @property
    def tenant_marks(self) -> Marks:
        """Of each tenant."""
        return _marks(self.tenant_pressure_high_bytes, self.tenant_pressure_low_bytes)

    @model_validator(mode="after")
    def _check_marks(self) -> Self:
        for name in ("pressure", "tenant_pressure"):
            high, low = getattr(self, f"{name}_high_bytes"), getattr(self, f"{name}_low_bytes")
            if low and low >= high:
                raise ValueError(
                    f"CHUNKSERVE_{name.upper()}_LOW_BYTES={low} must be less than "
                    f"CHUNKSERVE_{name.upper()}_HIGH_BYTES={high}"
                )
        return self


def _marks(high: int, low: int) -> Marks:
    return Marks(high_bytes=high, low_bytes=low or high * 9 // 10)
