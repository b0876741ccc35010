"""Segments on every kind of server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.runtime.errors import CorruptError, InvalidRequestError, NotFoundError
from services.store import Store
from services.store.base import Buffer

MIB = 1 << 20


def part(seed: int, size: int = MIB) -> bytes:
    return bytes((seed + i) % 251 for i in range(256)) * (size // 256) + b"x" * (size % 256)


def fetch(store: Store, segment_id: str, sizes: list[int]) -> list[bytes]:
    out = memoryview(bytearray(sum(sizes)))
    return [bytes(view) for view in store.fetch_parts(segment_id, sizes, out)]


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [MIB], [MIB] * 9, [3, 0, MIB + 1, 7, 511, 512, 513, 5]],
    ids=["no_parts", "empty", "byte", "one", "nine", "odd"],
)
def test_what_was_put_is_fetched(store: Store, sizes: list[int]):
    parts = [part(i, size) for i, size in enumerate(sizes)]

    store.put_segment("s", b"header", parts, ttl_s=60)

    assert store.get_header("s") == b"header"
    assert fetch(store, "s", sizes) == parts


def test_views_lie_one_after_another_in_the_memory_given(store: Store):
    store.put_segment("s", b"", [b"abc", b"defg"], ttl_s=60)
    out = bytearray(b"." * 9)

    views = list(store.fetch_parts("s", [3, 4], memoryview(out)))

    assert [bytes(view) for view in views] == [b"abc", b"defg"]
    assert out == b"abcdefg.."
    out[0:1] = b"A"
    assert views[0][0] == ord("A")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_stored(store: Store, kind: type[Buffer]):
    store.put_segment("s", kind(b"header"), [kind(b"part")], ttl_s=60)

    assert store.get_header("s") == b"header"
    assert fetch(store, "s", [4]) == [b"part"]


def test_an_array_of_numbers_is_stored_as_its_bytes(store: Store):
    numbers = memoryview(bytearray(16)).cast("I")

    store.put_segment("s", b"", [numbers], ttl_s=60)

    assert fetch(store, "s", [16]) == [bytes(16)]


def test_a_segment_that_was_never_stored_is_not_found(store: Store):
    assert not store.has_segment("s", ttl_s=60)
    with pytest.raises(NotFoundError) as from_header:
        store.get_header("s")
    with pytest.raises(NotFoundError) as from_parts:
        fetch(store, "s", [1])

    assert from_header.value.error_reason == from_parts.value.error_reason == "SEGMENT_NOT_FOUND"
    assert from_header.value.resource == ("segment", "s")


def test_a_missing_part_is_not_found(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb", b"cc"], ttl_s=60)
    key, node = server.only_key(ending=":1")
    node.delete(key)

    with pytest.raises(NotFoundError) as caught:
        fetch(store, "s", [2, 2, 2])

    assert caught.value.error_reason == "SEGMENT_NOT_FOUND"
    assert not store.has_segment("s", ttl_s=60)


@pytest.mark.parametrize("stored", [b"b", b"bbb", b""], ids=["truncated", "oversized", "empty"])
def test_a_part_of_another_size_is_corrupt(store: Store, server, stored: bytes):
    store.put_segment("s", b"h", [b"aa", b"bb", b"cc"], ttl_s=60)
    key, node = server.only_key(ending=":1")
    node.set(key, stored, keepttl=True)

    with pytest.raises(CorruptError, match=f"part 1 has {len(stored)} bytes; 2 were expected"):
        fetch(store, "s", [2, 2, 2])


def test_another_number_of_parts_than_the_header_lists_is_corrupt(store: Store):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)

    with pytest.raises(CorruptError, match="has 2 parts; its header lists 1"):
        fetch(store, "s", [2])


def damages(value: bytes) -> Iterator[bytes]:
    """Every value with one byte changed, and every one cut short."""
    for i, byte in enumerate(value):
        yield value[:i] + bytes([byte ^ 0x10]) + value[i + 1 :]
        yield value[:i]


def test_a_damaged_header_key_is_corrupt_however_it_is_used(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)
    key, node = server.only_key(ending=":header")

    for damaged in damages(node.get(key)):
        node.set(key, damaged, keepttl=True)
        for use in (
            lambda: store.has_segment("s", ttl_s=600),
            lambda: store.get_header("s"),
            lambda: fetch(store, "s", [2, 2]),
        ):
            with pytest.raises(CorruptError, match="do not match their checksum") as caught:
                use()
            assert caught.value.resource == ("segment", "s")

    assert server.ttl_s(ending=":header") <= 60


def test_a_copy_with_a_damaged_header_key_is_replaced(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)
    key, node = server.only_key(ending=":header")

    for damaged in damages(node.get(key)):
        node.set(key, damaged, keepttl=True)

        store.put_segment("s", b"new", [b"cc"], ttl_s=60)

        assert store.get_header("s") == b"new"
        assert fetch(store, "s", [2]) == [b"cc"]


def test_deleting_a_segment_with_a_damaged_header_key_touches_no_other_key(store: Store, server):
    store.put_segment("s", b"h", [b"aa"], ttl_s=60)
    key, node = server.only_key(ending=":header")
    store.put_segment("other", b"h", [b"bb"], ttl_s=60)
    before = set(server.holders())

    for damaged in damages(node.get(key)):
        node.set(key, damaged, px=60_000)

        store.delete_segments(["s"])

        assert set(server.holders()) == before - {key}


def test_memory_that_is_too_small_is_refused(store: Store):
    with pytest.raises(ValueError, match="parts have 3 bytes; out has 2"):
        list(store.fetch_parts("s", [3], memoryview(bytearray(2))))


def test_no_stale_answer_is_read_after_a_fetch_was_left(store: Store):
    parts = [part(i) for i in range(6)]
    store.put_segment("s", b"h", parts, ttl_s=60)
    store.put_segment("other", b"other", [b"tiny"], ttl_s=60)

    for num_read in range(len(parts)):
        fetching = store.fetch_parts("s", [MIB] * 6, memoryview(bytearray(6 * MIB)))
        with contextlib.closing(fetching):
            for _ in range(num_read):
                next(fetching)

        assert store.get_header("other") == b"other"
        assert fetch(store, "other", [4]) == [b"tiny"]


def test_no_stale_answer_is_read_after_a_fetch_failed(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb", b"cc"], ttl_s=60)
    key, node = server.only_key(ending=":0")
    node.set(key, b"x" * MIB, keepttl=True)

    with pytest.raises(CorruptError):
        fetch(store, "s", [2, 2, 2])

    assert store.get_header("s") == b"h"


def test_a_connection_serves_many_fetches(store: Store, server):
    store.put_segment("s", b"h", [part(1), part(2)], ttl_s=60)
    fetch(store, "s", [MIB, MIB])
    before = sum(node.info("stats")["total_connections_received"] for node in server.nodes)

    for _ in range(5):
        fetch(store, "s", [MIB, MIB])
        store.put_segment("again", b"h", [part(3)], ttl_s=60)

    # ``again`` may live on another node of a cluster.
    after = sum(node.info("stats")["total_connections_received"] for node in server.nodes)
    assert after - before <= 1


def test_threads_do_not_mix_their_segments(store: Store):
    def round_trip(i: int) -> bool:
        parts = [part(i * 7 + j, 100_000) for j in range(6)]
        store.put_segment(f"s{i}", str(i).encode(), parts, ttl_s=60)
        return (
            store.get_header(f"s{i}") == str(i).encode()
            and fetch(store, f"s{i}", [100_000] * 6) == parts
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(round_trip, range(24)))


def test_storing_again_is_harmless(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=600)
    before = set(server.holders())

    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)

    assert set(server.holders()) == before
    assert fetch(store, "s", [2, 2]) == [b"aa", b"bb"]


def test_storing_again_never_shortens_a_life_but_lengthens_it(store: Store, server):
    store.put_segment("s", b"h", [b"aa"], ttl_s=600)
    store.put_segment("s", b"h", [b"aa"], ttl_s=60)
    assert server.ttl_s(ending=":header") > 590
    assert server.ttl_s(ending=":0") > 590

    store.put_segment("s", b"h", [b"aa"], ttl_s=6000)

    assert server.ttl_s(ending=":header") > 5900
    assert server.ttl_s(ending=":0") > 5900


def test_two_writers_never_mix_their_parts(store: Store, server):
    # The same tokens give other bytes on another machine: its parts fit its own header alone.
    writers = [b"A", b"B", b"C", b"D"]
    start = threading.Barrier(len(writers))

    def write(name: bytes) -> None:
        start.wait()
        store.put_segment("s", name, [name * 100_000] * 5, ttl_s=60)

    with ThreadPoolExecutor(len(writers)) as threads:
        list(threads.map(write, writers))

    winner = store.get_header("s")
    assert fetch(store, "s", [100_000] * 5) == [winner * 100_000] * 5
    assert len(server.holders()) == 6, "the losers' parts are removed"


def test_a_copy_that_lost_a_part_is_replaced(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)
    key, node = server.only_key(ending=":1")
    node.delete(key)

    store.put_segment("s", b"new", [b"cc", b"dd"], ttl_s=60)

    assert store.get_header("s") == b"new"
    assert fetch(store, "s", [2, 2]) == [b"cc", b"dd"]


def test_asking_for_a_segment_extends_its_life(store: Store, server):
    store.put_segment("s", b"h", [b"aa"], ttl_s=60)

    assert store.has_segment("s", ttl_s=600)

    assert server.ttl_s(ending=":header") > 590
    assert server.ttl_s(ending=":0") > 590
    assert store.has_segment("s", ttl_s=6)
    assert server.ttl_s(ending=":header") > 590


def test_a_segment_expires(store: Store, server, until):
    store.put_segment("s", b"h", [b"aa"], ttl_s=0.05)

    until(lambda: not server.holders())

    assert not store.has_segment("s", ttl_s=60)


def test_deleting_removes_every_key_and_unknown_segments_are_passed_over(store: Store, server):
    store.put_segment("s", b"h", [b"aa", b"bb"], ttl_s=60)
    store.put_segment("t", b"h", [b"aa"], ttl_s=60)

    store.delete_segments(["s", "unknown", "t"])

    assert server.holders() == {}


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
def test_a_ttl_that_is_not_positive_is_refused(store: Store, ttl_s: float):
    with pytest.raises(InvalidRequestError, match="greater than 0"):
        store.put_segment("s", b"h", [b"aa"], ttl_s=ttl_s)
    with pytest.raises(InvalidRequestError, match="greater than 0"):
        store.has_segment("s", ttl_s=ttl_s)


def test_a_part_larger_than_the_server_takes_is_refused(store: Store):
    with pytest.raises(ValueError, match="at most 536870912"):
        store.put_segment("s", b"h", [bytearray((512 << 20) + 1)], ttl_s=60)


def test_a_copy_that_is_discarded_makes_room_for_another(store: Store, server):
    store.put_segment("s", b"h", [b"damaged", b"parts"], ttl_s=60)

    store.discard_damaged("s")
    store.discard_damaged("never stored")

    assert not server.holders()
    store.put_segment("s", b"h", [b"intact"], ttl_s=60)
    assert fetch(store, "s", [6]) == [b"intact"]


def test_a_segments_lease_is_one_callers_until_it_is_given_back(store: Store):
    assert store.acquire_segment_lease("s", "ours", ttl_s=60)

    assert not store.acquire_segment_lease("s", "theirs", ttl_s=60)
    assert not store.renew_segment_lease("s", "theirs", ttl_s=60)
    store.release_segment_lease("s", "theirs")
    assert store.renew_segment_lease("s", "ours", ttl_s=60)
    store.release_segment_lease("s", "ours")
    assert not store.renew_segment_lease("s", "ours", ttl_s=60)
    assert store.acquire_segment_lease("s", "theirs", ttl_s=60)


def test_a_segments_lease_ends_by_itself(store: Store, until):
    assert store.acquire_segment_lease("s", "ours", ttl_s=0.05)

    until(lambda: store.acquire_segment_lease("s", "theirs", ttl_s=60))
