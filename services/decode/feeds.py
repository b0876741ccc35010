"""Feeds: the tokens of many calls of one caller, several in one message.

A message costs the sender and the receiver about a tenth of a millisecond whatever is in it. With
one for each call, the last of sixteen streams would wait for the messages of the other fifteen,
and the engine's thread for the interpreter that makes them.

A token becomes part of the message on the engine's thread, which has just made it: a step of the
model leaves nothing in the processor's caches, so that work is cheapest where its code has just
run. Everything else here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from chunkserve.v1 import decode_pb2, types_pb2
from services.decode.generation import Generation
from services.runtime.errors import AlreadyExistsError, UnavailableError


class TokenFeed:
    """What one caller is sent."""

    def __init__(self) -> None:
        self._next = decode_pb2.FeedTokensResponse()
        self._next_lock = threading.Lock()
        self._changed = asyncio.Event()
        self._calls: dict[int, Generation] = {}
        self._is_draining = False
        self._is_closed = False

    @contextmanager
    def carrying(self, key: int, generation: Generation) -> Iterator[None]:
        """Let the feed end the generation, and its caller hold it, while the block runs.

        Raises:
            AlreadyExistsError: Another call of the feed has this key.
            UnavailableError: The feed has ended, before or meanwhile.
        """
        if key in self._calls:
            raise AlreadyExistsError(
                f"feed_key {key} names another call of this feed; send a new one"
            )
        self._check_open()
        self._calls[key] = generation
        try:
            yield
        finally:
            del self._calls[key]
            self._changed.set()
        self._check_open()

    def put(self, key: int, delta: types_pb2.TokenDelta) -> Callable[[], None]:
        """Add tokens of a call to the next message; on the engine's thread.

        Returns:
            What sends it, to be called on the event loop; the same for all calls of the feed.
        """
        with self._next_lock:
            # In place: handed to a constructor, each delta would be copied twice.
            self._next.tokens.add(feed_key=key).delta.CopyFrom(delta)
        return self._changed.set

    def hold(self, key: int, is_held: bool) -> None:
        """Pause a call, or let it go on; without effect on one that has ended."""
        if key in self._calls:
            self._calls[key].hold(is_held)

    async def messages(self) -> AsyncIterator[decode_pb2.FeedTokensResponse]:
        """Yield what is to be sent, until the feed drains and its last call has ended."""
        yield decode_pb2.FeedTokensResponse()
        while self._calls or self._next.tokens or not self._is_draining:
            await self._changed.wait()
            self._changed.clear()
            with self._next_lock:
                message, self._next = self._next, decode_pb2.FeedTokensResponse()
            if message.tokens:
                yield message

    def drain(self) -> None:
        """End as soon as no call is left."""
        self._is_draining = True
        self._changed.set()

    def close(self) -> None:
        """End now; the calls fail."""
        self._is_closed = True
        for generation in self._calls.values():
            generation.cancel()

    def _check_open(self) -> None:
        if self._is_closed:
            raise _closed("the feed of this call has ended")


class TokenFeeds:
    """The open feeds of a worker, by id."""

    def __init__(self) -> None:
        self._feeds: dict[str, TokenFeed] = {}
        self._is_draining = False

    @contextmanager
    def open(self, feed_id: str) -> Iterator[TokenFeed]:
        """Have a feed for the block.

        Raises:
            AlreadyExistsError: There is one of this id.
            UnavailableError: The worker stops.
        """
        if self._is_draining:
            raise UnavailableError("this worker is stopping; ask another", reason="WORKER_STOPPED")
        if feed_id in self._feeds:
            raise AlreadyExistsError(f"feed {feed_id!r} is open already; send an id of your own")
        feed = self._feeds[feed_id] = TokenFeed()
        try:
            yield feed
        finally:
            del self._feeds[feed_id]
            feed.close()

    def get(self, feed_id: str) -> TokenFeed:
        """Return an open feed.

        Raises:
            UnavailableError: There is none of this id.
        """
        try:
            return self._feeds[feed_id]
        except KeyError:
            raise _closed(f"no feed {feed_id!r} is open") from None

    def drain(self) -> None:
        """End each feed as soon as its last call has, and open no more."""
        self._is_draining = True
        for feed in self._feeds.values():
            feed.drain()


def _closed(what: str) -> UnavailableError:
    return UnavailableError(
        f"{what}; open one with FeedTokens, wait for its first message, and send the request again",
        reason="FEED_CLOSED",
    )
