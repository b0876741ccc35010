"""Runs the decode workers: ``python -m services.decode``, configured by ``CHUNKSERVE_*``."""

from __future__ import annotations

import asyncio
import sys

from services.decode.config import DecodeSettings
from services.decode.pool import PoolError, ray_session, run_pool
from services.runtime.config import load
from services.runtime.errors import ServiceError
from services.runtime.telemetry import configure_logging, get_logger


def main() -> None:
    """Run the pool until SIGTERM or SIGINT.

    Raises:
        SystemExit: The settings are malformed, or the workers did not start.
    """
    settings = load(DecodeSettings)
    configure_logging(settings.log_level)
    is_serving = False
    try:
        with ray_session(settings):
            is_serving = True
            asyncio.run(run_pool(settings))
    except (PoolError, ServiceError) as error:
        sys.exit(str(error))
    except (SystemExit, KeyboardInterrupt):
        # While Ray starts, signals reach its own handlers, which raise these.
        if is_serving:
            raise
        get_logger().info("decode.stopped_while_starting")


if __name__ == "__main__":
    main()
