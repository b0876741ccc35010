"""Forks, exports and imports over the real store."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio
import pytest
import redis
from google.protobuf.duration_pb2 import Duration

from chunkserve.v1 import manifest_pb2, session_pb2
from services.store import Store, open_store
from services.store.embedded import EmbeddedValkey
from tests.fakes import (
    ANSWER,
    WAIT_S,
    FakeCluster,
    error_info,
    fake_header,
    sealed_header,
)

Piece = session_pb2.SessionPiece


@pytest.fixture(autouse=True)
async def a_session(cluster: FakeCluster) -> None:
    """A session ``s-1`` of one turn, and workers."""
    await cluster.add_prefill()
    await cluster.add_decode()
    await cluster.create_session(session_id="s-1", ttl=Duration(seconds=90))
    await cluster.generate("0123456789", session_id="s-1")


@pytest.fixture
def valkey(valkey_url: str) -> Any:
    with redis.Redis.from_url(valkey_url) as client:
        yield client


async def shown(cluster: FakeCluster, session_id: str) -> session_pb2.Session:
    request = session_pb2.GetSessionRequest(session_id=session_id)
    return (await cluster.sessions.GetSession(request)).session


async def fork(cluster: FakeCluster, **fields: Any) -> session_pb2.Session:
    request = session_pb2.ForkSessionRequest(**{"session_id": "s-1", **fields})
    return (await cluster.sessions.ForkSession(request)).session


async def delete(cluster: FakeCluster, *session_ids: str) -> None:
    for session_id in session_ids:
        request = session_pb2.DeleteSessionRequest(session_id=session_id)
        await cluster.sessions.DeleteSession(request)


async def exported(cluster: FakeCluster, session_id: str = "s-1") -> list[Piece]:
    call = cluster.sessions.ExportSession(session_pb2.ExportSessionRequest(session_id=session_id))
    return [response.piece async for response in call]


async def imported(
    cluster: FakeCluster, pieces: Sequence[Piece], new_session_id: str = "copy"
) -> session_pb2.Session:
    requests = [
        session_pb2.ImportSessionRequest(piece=piece, new_session_id=new_session_id)
        for piece in pieces
    ]
    return (await cluster.sessions.ImportSession(iter(requests), timeout=WAIT_S)).session


async def refused(cluster: FakeCluster, pieces: Sequence[Piece]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await imported(cluster, pieces)
    return caught.value


def kinds(pieces: Sequence[Piece]) -> list[str | None]:
    return [piece.WhichOneof("piece") for piece in pieces]


def sealed(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with the end mark that fits them."""
    body = [getattr(piece, piece.WhichOneof("piece")) for piece in pieces]
    digest = hashlib.sha256(b"".join(body)).digest()
    return [*pieces, Piece(end=session_pb2.SessionEnd(num_pieces=len(body), sha256=digest))]


def session_keys(valkey: redis.Redis) -> set[bytes]:
    """All keys but those of living workers."""
    return {key for key in valkey.scan_iter(count=1000) if b"{workers}" not in key}


# Forks


async def test_a_fork_continues_from_the_present_state_alone(cluster: FakeCluster) -> None:
    made = await fork(cluster, new_session_id="s-2")

    original = await shown(cluster, "s-1")
    assert (made.session_id, made.version, made.num_turns) == ("s-2", 1, 1)
    assert made.segments == original.segments
    assert made.num_tokens == original.num_tokens
    assert made.ttl == Duration(seconds=90)

    answer = await cluster.generate("more", session_id="s-2")
    assert answer[0].prompt_info.num_prompt_tokens == 10 + len(ANSWER) + 4
    unchanged = await shown(cluster, "s-1")
    unchanged.expire_time.CopyFrom(original.expire_time)
    assert unchanged == original


async def test_a_fork_stores_no_kv(cluster: FakeCluster, valkey: redis.Redis) -> None:
    before = session_keys(valkey)

    made = await fork(cluster, ttl=Duration(seconds=30))

    new = session_keys(valkey) - before
    assert all(made.session_id.encode() in key for key in new)
    assert made.session_id.startswith("s-")
    assert made.ttl == Duration(seconds=30)


@pytest.mark.parametrize("first", ["s-1", "s-2"])
async def test_either_branch_lives_on_without_the_other(
    cluster: FakeCluster, valkey: redis.Redis, first: str
) -> None:
    await fork(cluster, new_session_id="s-2")
    other = {"s-1": "s-2", "s-2": "s-1"}[first]

    await delete(cluster, first)

    assert len(await cluster.generate("more", session_id=other)) > 2
    await delete(cluster, other)
    assert session_keys(valkey) == set()


async def test_a_fork_has_no_results_of_its_original(cluster: FakeCluster) -> None:
    await cluster.generate("more", session_id="s-1", request_id="r-1")
    await fork(cluster, new_session_id="s-2")

    answer = await cluster.generate("more", session_id="s-2", request_id="r-1")

    assert not answer[0].prompt_info.replayed


async def test_a_fork_does_not_replace_a_session(cluster: FakeCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fork(cluster, new_session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert len((await shown(cluster, "s-1")).segments) == 2


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"session_id": "nobody"}, grpc.StatusCode.NOT_FOUND),
        ({"session_id": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"new_session_id": "a/b"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ttl": Duration(nanos=1)}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["unknown", "empty", "name", "ttl"],
)
async def test_a_fork_that_cannot_be_is_refused(
    cluster: FakeCluster, fields: dict[str, Any], code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fork(cluster, **fields)

    assert caught.value.code() is code


class RacingStore:
    """A store in which the original loses its last segment while it is forked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._has_raced = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def create_manifest(self, *args: Any, **kwargs: Any) -> None:
        if not self._has_raced:
            self._has_raced = True
            stored = await self._store.get_manifest("default", "s-1")
            manifest = manifest_pb2.Manifest.FromString(stored.body)
            dropped = manifest.segments.pop()
            await self._store.commit_manifest(
                "default",
                "s-1",
                manifest.SerializeToString(),
                expected_version=stored.version,
                ttl_s=60,
                segment_ids=[segment.segment_id for segment in manifest.segments],
                dropped_segment_ids=[dropped.segment_id],
            )
        await self._store.create_manifest(*args, **kwargs)


async def test_a_fork_of_a_session_that_changes_meanwhile_has_its_newer_state(
    store: Store,
) -> None:
    async with FakeCluster(RacingStore(store)) as cluster:  # type: ignore[arg-type]
        made = await fork(cluster, new_session_id="s-2")

        assert made.segments == (await shown(cluster, "s-1")).segments
        assert len(made.segments) == 1


# Exports


async def test_an_export_has_every_piece_in_order(cluster: FakeCluster) -> None:
    pieces = await exported(cluster)

    segment = ["segment_header", "segment_part", "segment_part"]
    assert kinds(pieces) == ["manifest", *segment, *segment, "end"]
    assert pieces == sealed(pieces[:-1])


async def test_an_export_of_an_unknown_session_is_not_found(cluster: FakeCluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exported(cluster, "nobody")

    assert error_info(caught.value).reason == "SESSION_NOT_FOUND"


async def test_an_export_of_an_expired_segment_is_not_found(
    cluster: FakeCluster, valkey: redis.Redis
) -> None:
    [segment, _] = (await shown(cluster, "s-1")).segments
    valkey.delete(f"cs2:{{{segment.segment_id}}}:header")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exported(cluster)

    assert error_info(caught.value).reason == "SEGMENT_NOT_FOUND"


@pytest.mark.parametrize("damage", [b"keyz", b"key", b"longer"])
async def test_a_damaged_part_is_not_exported(
    cluster: FakeCluster, valkey: redis.Redis, damage: bytes
) -> None:
    [segment, _] = (await shown(cluster, "s-1")).segments
    [key] = valkey.keys(f"cs2:{{{segment.segment_id}}}:*:0")
    valkey.set(key, damage, keepttl=True)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exported(cluster)

    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


async def test_another_segment_under_its_name_is_not_exported(
    cluster: FakeCluster, store: Store
) -> None:
    [segment, _] = (await shown(cluster, "s-1")).segments
    other = fake_header(session_pb2.Segment(segment_id="other"), "", [])
    store.delete_segments([segment.segment_id])
    store.put_segment(segment.segment_id, other, [], ttl_s=60)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exported(cluster)

    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


class ChangingStore:
    """A store in which a session loses a segment, and changes, while it is exported."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def open_segment(self, segment_id: str) -> Any:
        stored = await self._store.get_manifest("default", "s-1")
        await self._store.commit_manifest(
            "default",
            "s-1",
            stored.body,
            expected_version=stored.version,
            ttl_s=60,
            segment_ids=[],
            dropped_segment_ids=[segment_id],
        )
        return await self._store.open_segment(segment_id)


async def test_a_session_that_is_changed_while_it_is_exported_is_aborted(store: Store) -> None:
    async with FakeCluster(ChangingStore(store)) as cluster:  # type: ignore[arg-type]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await exported(cluster)

    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert error_info(caught.value).reason == "SESSION_CHANGED"


# Imports


async def test_an_import_is_the_exported_session(cluster: FakeCluster, valkey: redis.Redis) -> None:
    original = await shown(cluster, "s-1")
    pieces = await exported(cluster)
    await delete(cluster, "s-1")
    assert session_keys(valkey) == set()

    made = await imported(cluster, pieces, new_session_id="")

    assert (made.session_id, made.version) == ("s-1", 1)
    assert (made.num_turns, made.num_tokens) == (1, original.num_tokens)
    assert (made.ttl, made.create_time) == (original.ttl, original.create_time)
    spans = [(segment.first_token, segment.num_tokens) for segment in made.segments]
    assert spans == [(segment.first_token, segment.num_tokens) for segment in original.segments]
    answer = await cluster.generate("more", session_id="s-1")
    assert answer[0].prompt_info.num_prompt_tokens == 10 + len(ANSWER) + 4
    await delete(cluster, "s-1")
    assert session_keys(valkey) == set()


async def test_an_imports_segments_are_its_own(cluster: FakeCluster) -> None:
    made = await imported(cluster, await exported(cluster))

    names = {segment.segment_id for segment in (await shown(cluster, "s-1")).segments}
    assert names.isdisjoint({segment.segment_id for segment in made.segments})
    again = await imported(cluster, await exported(cluster, "copy"), new_session_id="again")
    assert again.stored_bytes == made.stored_bytes


async def test_an_import_into_another_store_works(cluster: FakeCluster) -> None:
    pieces = await exported(cluster)
    with EmbeddedValkey() as server:
        store = open_store(server.url)
        async with FakeCluster(store, tenant="other") as other:
            await other.add_prefill()
            await other.add_decode()

            await imported(other, pieces)

            assert len(await other.generate("more", session_id="copy")) > 2
        await store.close()


async def test_an_import_does_not_replace_a_session(
    cluster: FakeCluster, valkey: redis.Redis
) -> None:
    pieces = await exported(cluster)
    before = session_keys(valkey)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await imported(cluster, pieces, new_session_id="s-1")

    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert session_keys(valkey) == before


async def test_an_imports_ttl_is_capped(store: Store, cluster: FakeCluster) -> None:
    pieces = await exported(cluster)
    async with FakeCluster(store, session_ttl_s=10, max_session_ttl_s=20) as capped:
        made = await imported(capped, pieces)

    assert made.ttl == Duration(seconds=20)


async def test_every_truncation_leaves_nothing(cluster: FakeCluster, valkey: redis.Redis) -> None:
    pieces = await exported(cluster)
    before = session_keys(valkey)

    for length in range(len(pieces)):
        error = await refused(cluster, pieces[:length])

        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert error_info(error).reason == "EXPORT_CUT_OFF"
        assert session_keys(valkey) == before


async def test_every_exchanged_or_missing_piece_leaves_nothing(
    cluster: FakeCluster, valkey: redis.Redis
) -> None:
    pieces = await exported(cluster)
    before = session_keys(valkey)

    for i in range(len(pieces) - 1):
        exchanged = [*pieces[:i], pieces[i + 1], pieces[i], *pieces[i + 2 :]]
        for wrong in (exchanged, pieces[:i] + pieces[i + 1 :]):
            error = await refused(cluster, wrong)

            assert error.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.DATA_LOSS,
            )
            assert session_keys(valkey) == before


async def test_what_follows_the_end_is_refused(cluster: FakeCluster) -> None:
    pieces = await exported(cluster)

    error = await refused(cluster, [*pieces, pieces[-1]])

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_every_damaged_piece_is_data_loss(cluster: FakeCluster, valkey: redis.Redis) -> None:
    pieces = await exported(cluster)
    before = session_keys(valkey)

    for i, piece in enumerate(pieces[1:-1], start=1):
        kind = piece.WhichOneof("piece")
        assert kind is not None
        data = bytearray(getattr(piece, kind))
        data[-1] ^= 1
        error = await refused(
            cluster, [*pieces[:i], Piece(**{kind: bytes(data)}), *pieces[i + 1 :]]
        )

        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert session_keys(valkey) == before


async def test_a_wrong_checksum_at_the_end_is_data_loss(cluster: FakeCluster) -> None:
    pieces = await exported(cluster)
    manifest = manifest_pb2.Manifest.FromString(pieces[0].manifest)
    manifest.num_turns = 7

    error = await refused(cluster, [Piece(manifest=manifest.SerializeToString()), *pieces[1:]])

    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert error_info(error).reason == "EXPORT_DAMAGED"


def _no_tokens(manifest: manifest_pb2.Manifest) -> None:
    del manifest.token_ids[:]


def _gap(manifest: manifest_pb2.Manifest) -> None:
    manifest.segments[1].first_token += 1


def _empty_span(manifest: manifest_pb2.Manifest) -> None:
    manifest.segments[0].num_tokens = 0


def _no_ttl(manifest: manifest_pb2.Manifest) -> None:
    manifest.ClearField("ttl")


def _bad_policy(manifest: manifest_pb2.Manifest) -> None:
    manifest.compression.keep_ratio = 2


@pytest.mark.parametrize("spoil", [_no_tokens, _gap, _empty_span, _no_ttl, _bad_policy])
async def test_a_manifest_that_contradicts_itself_is_refused(
    cluster: FakeCluster, spoil: Callable[[manifest_pb2.Manifest], None]
) -> None:
    pieces = await exported(cluster)
    manifest = manifest_pb2.Manifest.FromString(pieces[0].manifest)
    spoil(manifest)

    error = await refused(
        cluster, sealed([Piece(manifest=manifest.SerializeToString()), *pieces[1:-1]])
    )

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_manifest_are_refused(cluster: FakeCluster) -> None:
    error = await refused(cluster, sealed([Piece(manifest=b"\xff\xff")]))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "other"},
        {"shape": {"fingerprint": "other", "first_token": 0, "num_tokens": 9}},
        {"shape": {"fingerprint": "fake-fingerprint", "first_token": 1, "num_tokens": 9}},
        {"shape": {}},
        {"part_sizes": []},
    ],
    ids=["identity", "model", "span", "fields", "parts"],
)
async def test_a_header_of_another_segment_is_data_loss(
    cluster: FakeCluster, change: dict[str, Any]
) -> None:
    pieces = await exported(cluster)
    [segment, _] = (await shown(cluster, "s-1")).segments
    header = fake_header(segment, "fake-fingerprint", [b"keys", b"values"], **change)

    error = await refused(cluster, sealed([pieces[0], Piece(segment_header=header), *pieces[2:-1]]))

    assert error.code() is grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize("body", [b"no json", b"[]"])
async def test_a_header_that_is_none_is_data_loss(cluster: FakeCluster, body: bytes) -> None:
    pieces = await exported(cluster)
    header = Piece(segment_header=sealed_header(body))

    error = await refused(cluster, sealed([pieces[0], header, *pieces[2:-1]]))

    assert error.code() is grpc.StatusCode.DATA_LOSS


async def test_an_import_that_is_cancelled_leaves_nothing(
    cluster: FakeCluster, valkey: redis.Redis
) -> None:
    pieces = await exported(cluster)
    before = session_keys(valkey)
    all_sent = asyncio.Event()

    async def requests() -> AsyncIterator[session_pb2.ImportSessionRequest]:
        for piece in pieces[:-1]:
            yield session_pb2.ImportSessionRequest(piece=piece, new_session_id="copy")
        all_sent.set()
        await asyncio.Event().wait()

    call = cluster.sessions.ImportSession(requests(), timeout=WAIT_S)
    await asyncio.wait_for(all_sent.wait(), WAIT_S)
    async with asyncio.timeout(WAIT_S):
        # The server has no event for tests.
        while len(session_keys(valkey)) < len(before) + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    call.cancel()

    async with asyncio.timeout(WAIT_S):
        while session_keys(valkey) != before:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
