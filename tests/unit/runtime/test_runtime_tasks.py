"""Background tasks that must end."""

from __future__ import annotations

import asyncio

from services.runtime.tasks import end_task


async def test_a_task_that_missed_its_cancellation_is_asked_again():
    num_asked = 0
    is_running = asyncio.Event()

    async def stubborn() -> None:
        nonlocal num_asked
        while True:
            try:
                is_running.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                num_asked += 1
                if num_asked == 2:
                    raise

    task = asyncio.create_task(stubborn())
    await is_running.wait()

    async with asyncio.timeout(10):
        await end_task(task)

    assert task.cancelled()
    assert num_asked == 2


async def test_a_task_that_has_ended_is_left_alone():
    task = asyncio.create_task(asyncio.sleep(0))
    await task

    await end_task(task)

    assert not task.cancelled()
