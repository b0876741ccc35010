"""Logs: events as JSON lines on stdout.

What is logged is the callers' business; prompts never are. ``request_id`` is bound once per
request (see :mod:`services.runtime.interceptors`) and appears in every event of it.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Final

import structlog

_SHARED_PROCESSORS: Final[tuple[structlog.typing.Processor, ...]] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)

_request_fields: ContextVar[dict[str, object] | None] = ContextVar("request_fields", default=None)


def configure_logging(level: str) -> None:
    """Send structlog's events, and the standard library's of other packages, to stdout.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``: the least level that is written.
            Other packages are heard from ``warning`` on.
    """
    structlog.configure(
        processors=[*_SHARED_PROCESSORS, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stdout),
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED_PROCESSORS,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return the logger; events are its methods' first argument (``"prefill.done"``)."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def open_request_fields() -> dict[str, object]:
    """Start collecting the fields of this request's one log line."""
    fields: dict[str, object] = {}
    _request_fields.set(fields)
    return fields


def add_request_fields(**fields: object) -> None:
    """Add to the one line that is logged when this request ends (``generate.done ...``).

    Outside of a request it does nothing.
    """
    collected = _request_fields.get()
    if collected is not None:
        collected.update(fields)
