"""Feeds: what a message carries, and how a feed ends."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from chunkserve.v1 import decode_pb2, types_pb2
from services.decode.feeds import TokenFeed, TokenFeeds
from services.decode.generation import Generation
from services.runtime.errors import AlreadyExistsError, UnavailableError

WAIT_S = 10


class FakeGeneration:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.holds: list[bool] = []
        self.is_cancelled = False

    def hold(self, is_held: bool) -> None:
        self.holds.append(is_held)

    def cancel(self) -> None:
        self.is_cancelled = True


def generation() -> Any:
    return cast(Generation, FakeGeneration())


def delta(token_id: int) -> types_pb2.TokenDelta:
    return types_pb2.TokenDelta(text=chr(token_id), token_ids=[token_id])


async def read(messages: Any) -> list[tuple[int, int]]:
    """Return the calls' keys and tokens of the next message."""
    message: decode_pb2.FeedTokensResponse = await asyncio.wait_for(anext(messages), WAIT_S)
    return [(fed.feed_key, fed.delta.token_ids[0]) for fed in message.tokens]


async def test_one_message_carries_what_waits_for_all_calls() -> None:
    feed = TokenFeed()
    messages = aiter(feed.messages())

    assert await read(messages) == []  # it is open
    with feed.carrying(1, generation()), feed.carrying(2, generation()):
        feed.put(1, delta(65))()
        feed.put(2, delta(66))()
        feed.put(1, delta(67))()
        assert await read(messages) == [(1, 65), (2, 66), (1, 67)]
        feed.put(2, delta(68))()
        assert await read(messages) == [(2, 68)]


async def test_calls_of_a_feed_are_sent_by_one_wake_up() -> None:
    feed, other = TokenFeed(), TokenFeed()
    messages = aiter(feed.messages())
    await read(messages)
    with feed.carrying(1, generation()), feed.carrying(2, generation()):
        woken = {feed.put(1, delta(65)), feed.put(2, delta(66)), other.put(1, delta(67))}
        assert len(woken) == 2
        for wake_up in woken:
            wake_up()
        assert await read(messages) == [(1, 65), (2, 66)]


async def test_nothing_is_lost_that_another_thread_puts_while_messages_are_sent() -> None:
    feed = TokenFeed()
    loop = asyncio.get_running_loop()
    messages = aiter(feed.messages())
    await read(messages)

    def put_all() -> None:
        for number in range(2000):
            loop.call_soon_threadsafe(feed.put(number % 3, delta(number)))

    tokens: list[tuple[int, int]] = []
    with feed.carrying(0, generation()):
        putting = asyncio.create_task(asyncio.to_thread(put_all))
        while len(tokens) < 2000:
            tokens += await read(messages)
        await putting

    assert tokens == [(number % 3, number) for number in range(2000)]


async def test_a_draining_feed_ends_behind_the_last_token_of_its_last_call() -> None:
    feed = TokenFeed()
    messages = aiter(feed.messages())
    await read(messages)
    with feed.carrying(1, generation()):
        feed.drain()
        feed.put(1, delta(65))()

    assert await read(messages) == [(1, 65)]
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(messages), WAIT_S)


async def test_calls_of_a_feed_that_ends_fail() -> None:
    feeds = TokenFeeds()
    running = generation()

    def carry() -> None:
        with feeds.open("f") as feed, feed.carrying(1, running):
            feed.close()

    with pytest.raises(UnavailableError) as caught:
        carry()
    assert caught.value.error_reason == "FEED_CLOSED"
    assert running.is_cancelled


async def test_a_call_is_held_by_its_key() -> None:
    feed = TokenFeed()
    one, other = generation(), generation()
    with feed.carrying(1, one), feed.carrying(2, other):
        feed.hold(1, True)
        feed.hold(1, False)
        feed.hold(3, True)  # has ended

    assert (one.holds, other.holds) == ([True, False], [])


async def test_keys_and_ids_are_used_once_at_a_time() -> None:
    feeds = TokenFeeds()
    with feeds.open("f") as feed, feed.carrying(1, generation()):
        with pytest.raises(AlreadyExistsError), feed.carrying(1, generation()):
            ...
        with pytest.raises(AlreadyExistsError), feeds.open("f"):
            ...
        assert feeds.get("f") is feed
    with feeds.open("f") as again, again.carrying(1, generation()):
        ...


async def test_a_feed_that_is_not_open_is_unavailable() -> None:
    with pytest.raises(UnavailableError) as caught:
        TokenFeeds().get("f")
    assert caught.value.error_reason == "FEED_CLOSED"


async def test_a_worker_that_stops_opens_no_feed() -> None:
    feeds = TokenFeeds()
    with feeds.open("f") as feed:
        messages = aiter(feed.messages())
        await read(messages)
        feeds.drain()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(messages), WAIT_S)
        with pytest.raises(UnavailableError), feeds.open("g"):
            ...
