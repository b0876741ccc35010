"""Ends background tasks."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from services.runtime.telemetry import get_logger

_ASK_AGAIN_S: Final = 0.5

_log = get_logger()


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for its end; what it raised is logged.

    Asks again until it ends: on Python 3.11 a cancellation is lost if it comes in the moment in
    which ``asyncio.wait_for`` has its result, and redis-py waits so for every command.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_ASK_AGAIN_S)
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task.failed", exc_info=error)
