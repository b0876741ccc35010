"""Sessions contain what they must, whatever happens to them and to the workers meanwhile.

Random steps are done on a gateway with real workers and a real store, and on a model in memory;
after every step the session that it was about must equal the model's, and after every few all
sessions, and all keys in the store. ``CHUNKSERVE_TEST_STEPS`` and ``CHUNKSERVE_TEST_SEED`` choose
a longer run or another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis
import structlog

from tests.integration.session_cluster import SessionCluster, load_chatty
from tests.integration.session_model import Keys
from tests.integration.session_steps import Steps

NUM_STEPS = int(os.environ.get("CHUNKSERVE_TEST_STEPS", "1000"))
SEED = int(os.environ.get("CHUNKSERVE_TEST_SEED", "1"))
CHECK_EVERY = 20
SHOWN_STEPS = 40


@pytest.fixture
def logged_errors() -> Iterator[list[structlog.typing.EventDict]]:
    """What the services log as errors. The rest is thousands of lines, and is dropped."""
    errors: list[structlog.typing.EventDict] = []

    def collect(_: object, level: str, event: structlog.typing.EventDict) -> str:
        if level == "error":
            errors.append(event)
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.processors.format_exc_info, collect])
    yield errors
    structlog.reset_defaults()


@pytest.mark.slow
@pytest.mark.timeout(max(300, NUM_STEPS))
async def test_random_steps_leave_what_sessions_name_and_nothing_else(
    valkey_url: str, logged_errors: list[structlog.typing.EventDict]
):
    with redis.Redis.from_url(valkey_url) as client:
        async with SessionCluster(valkey_url) as cluster:
            steps = Steps(cluster, Keys(client), load_chatty(), seed=SEED)
            try:
                for number in range(NUM_STEPS):
                    await steps.run(number)
                    if number % CHECK_EVERY == 0:
                        await steps.check_all()
                await steps.end()
                assert logged_errors == []
            except BaseException as error:
                latest = "\n".join(steps.log[-SHOWN_STEPS:])
                error.add_note(f"seed {SEED}; the latest steps:\n{latest}")
                raise
