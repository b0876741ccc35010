"""The synchronous client, from plain threads."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from chunkserve_client import (
    Cancelled,
    Compression,
    DeadlineExceeded,
    SessionNotFound,
    SyncClient,
    TokenDelta,
)
from tests.integration.client_stand_in import WAIT_S, StandIn, exported


@pytest.fixture
def gateway() -> Iterator[StandIn]:
    with StandIn.serve() as stand_in:
        yield stand_in


@pytest.fixture
def client(gateway: StandIn) -> Iterator[SyncClient]:
    with SyncClient(gateway.address, max_retries=0) as opened:
        yield opened


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "chunkserve"]


def test_answer_streams(client: SyncClient):
    answer = client.generate("hi", request_id="r-1")

    assert list(answer) == ["Par", "is", " is big."]
    assert (answer.text, answer.token_ids) == ("Paris is big.", (100, 101, 102, 103))
    assert answer.request_id == "r-1"
    assert answer.prompt_info is not None
    assert answer.finish is not None


def test_events_and_result(client: SyncClient):
    deltas = [e.text for e in client.generate("hi").events() if isinstance(e, TokenDelta)]

    assert "".join(deltas) == client.generate("hi").result().text


def test_logprobs_stand_beside_the_tokens(client: SyncClient):
    answer = client.generate("hi", logprobs=1)

    result = answer.result()

    assert tuple(each.token_id for each in answer.logprobs) == result.token_ids
    assert answer.logprobs == result.logprobs


def test_session_from_creation_to_deletion(client: SyncClient):
    session = client.create_session("s-1")
    session.generate("one").result()
    client.generate("two", session=session).result()
    client.generate("three", session="s-1").result()

    assert session.refresh().num_turns == 3
    assert client.get_session("s-1").info == session.info
    assert [listed.session_id for listed in client.list_sessions()] == ["s-1"]
    assert client.count_tokens("a b c").num_tokens == 3
    assert [model.name for model in client.list_models()] == ["tiny"]

    session.delete()
    with pytest.raises(SessionNotFound):
        client.delete_session("s-1")


def test_leaving_the_loop_cancels_the_answer(client: SyncClient, gateway: StandIn):
    gateway.hang_at = 2

    for text in client.generate("hi"):
        assert text == "Par"
        break

    assert gateway.cancelled.wait(WAIT_S)


def test_leaving_the_block_cancels_the_answer(client: SyncClient, gateway: StandIn):
    gateway.hang_at = 2

    with client.generate("hi") as answer:
        texts = iter(answer)
        assert next(texts) == "Par"

    assert gateway.cancelled.wait(WAIT_S)


def test_errors_arrive(client: SyncClient, gateway: StandIn):
    gateway.hang_at = 1

    with pytest.raises(DeadlineExceeded):
        list(client.generate("hi", timeout_s=0.3))


def test_threads_share_a_client(client: SyncClient):
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: client.generate("hi").result().text, range(32)))

    assert texts == ["Paris is big."] * 32


def test_closing_ends_waiting_threads_and_its_own(gateway: StandIn):
    gateway.hang_at = 0
    client = SyncClient(gateway.address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate("hi").result)
        assert gateway.hanging.wait(WAIT_S)

        client.close()

        with pytest.raises(Cancelled):
            waiting.result(WAIT_S)
    assert own_threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        client.list_models()
    client.close()


def test_client_that_did_nothing_has_no_thread():
    with SyncClient("127.0.0.1:1"):
        assert own_threads() == []


def test_answer_outlives_its_client_quietly(gateway: StandIn):
    gateway.hang_at = 1
    with SyncClient(gateway.address) as client:
        answer = client.generate("hi")
        texts = iter(answer)
        next(texts)

    answer.close()
    del texts
    gc.collect()  # a generator that fails while it is dropped would fail the test


def test_forgotten_client_does_not_hold_up_the_exit(gateway: StandIn):
    script = (
        "import sys; from chunkserve_client import SyncClient\n"
        "client = SyncClient(sys.argv[1]); print(next(iter(client.generate('hi'))))\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, gateway.address],
        capture_output=True,
        text=True,
        timeout=3 * WAIT_S,
    )

    assert (done.returncode, done.stdout) == (0, "Par\n")
    assert "Traceback" not in done.stderr


def test_interrupt_while_waiting_cancels_the_answer(gateway: StandIn):
    gateway.hang_at = 1
    script = (
        "import sys; from chunkserve_client import SyncClient\n"
        "with SyncClient(sys.argv[1]) as client:\n"
        "    try:\n"
        "        for text in client.generate('hi'): print(text, flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', client.list_models()[0].name, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, gateway.address], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Par\n"

        process.send_signal(signal.SIGINT)

        assert process.communicate(timeout=WAIT_S)[0] == "interrupted tiny\n"
        assert process.returncode == 0
    assert gateway.cancelled.wait(WAIT_S)


def test_session_is_forked_compressed_exported_and_imported(client: SyncClient, gateway: StandIn):
    session = client.create_session("s-1")
    session.generate("hi").result()

    assert session.fork("s-2").session_id == "s-2"
    assert client.fork_session("s-1", "s-3").session_id == "s-3"
    assert session.compress(Compression(keep_ratio=0.5)).original_kept_tokens == 104
    assert client.compress_session("s-1", Compression(precision="int8")).info.num_kept_tokens == 26
    data = list(session.export())
    assert list(client.export_session("s-1")) == data
    assert client.import_session(data, "copy").session_id == "copy"
    assert client.import_session(data).session_id == "s-1"
    assert gateway.imported == exported(gateway.sessions["s-1"])
