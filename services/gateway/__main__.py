"""The gateway process: ``python -m services.gateway``, configured by ``CHUNKSERVE_*``."""

from __future__ import annotations

import uvloop

from services.gateway.app import serve
from services.gateway.config import GatewaySettings
from services.runtime.config import load
from services.runtime.metrics import served_metrics
from services.runtime.telemetry import configure_logging


def main() -> None:
    """Run the gateway."""
    settings = load(GatewaySettings)
    configure_logging(settings.log_level)
    with served_metrics(settings.metrics_listen):
        uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
