"""Manifests as the gateway reads and makes them, and the public view of one."""

from __future__ import annotations

import time
import uuid

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from chunkserve.v1 import manifest_pb2, session_pb2
from services.store.base import SessionStore, StoredManifest


async def read_manifest(
    store: SessionStore, tenant: str, session_id: str
) -> tuple[manifest_pb2.Manifest, StoredManifest]:
    """Return a session's manifest, with the version that was read, and how it was stored.

    Raises:
        NotFoundError: There is no such session.
    """
    stored = await store.get_manifest(tenant, session_id)
    manifest = manifest_pb2.Manifest.FromString(stored.body)
    manifest.version = stored.version
    return manifest, stored


def new_manifest(
    *, tenant: str, session_id: str, model: str, ttl_s: float
) -> manifest_pb2.Manifest:
    """Return the manifest of an empty session, or with an empty id of a one-off request."""
    now = timestamp(time.time())
    return manifest_pb2.Manifest(
        tenant=tenant,
        session_id=session_id,
        model=model,
        create_time=now,
        update_time=now,
        ttl=duration(ttl_s),
    )


def new_session_id() -> str:
    """Return an id for a session whose creator chose none."""
    return f"s-{uuid.uuid4().hex}"


def session_of(
    manifest: manifest_pb2.Manifest, stored: StoredManifest, *, with_segments: bool = True
) -> session_pb2.Session:
    """Return what callers see of a session."""
    return session_pb2.Session(
        session_id=manifest.session_id,
        model=manifest.model,
        version=stored.version,
        num_turns=manifest.num_turns,
        num_tokens=len(manifest.token_ids),
        num_kept_tokens=sum(segment.num_kept_tokens for segment in manifest.segments),
        stored_bytes=sum(segment.size_bytes for segment in manifest.segments),
        compression=manifest.compression if manifest.HasField("compression") else None,
        create_time=manifest.create_time,
        update_time=manifest.update_time,
        expire_time=timestamp(time.time() + stored.expires_in_s),
        ttl=manifest.ttl,
        segments=manifest.segments if with_segments else (),
    )


def num_cached_tokens(manifest: manifest_pb2.Manifest) -> int:
    """Return the tokens whose KV is stored; those behind are pending."""
    if not manifest.segments:
        return 0
    last = manifest.segments[-1]
    return last.first_token + last.num_tokens


def timestamp(seconds: float) -> Timestamp:
    """Return a point in time from seconds since the epoch."""
    value = Timestamp()
    value.FromNanoseconds(round(seconds * 1e9))
    return value


def duration(seconds: float) -> Duration:
    """Return a duration from seconds."""
    value = Duration()
    value.FromNanoseconds(round(seconds * 1e9))
    return value
