"""KV caches of finished turns that stay in memory, so that the next turn fetches nothing.

A turn takes its session's cache out and changes it. Only a committed turn puts it back: a turn
that fails leaves nothing behind. Event loop only; knows no store and no model.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import chunkkv
from chunkserve.v1 import manifest_pb2


@dataclass(frozen=True, slots=True)
class _Resident:
    manifest: manifest_pb2.Manifest
    cache: chunkkv.KVCache


class ResidentSessions:
    """Caches by session, the least recently used given up first.

    Args:
        max_bytes: Of all caches together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sessions: OrderedDict[tuple[str, str], _Resident] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(resident.cache.nbytes for resident in self._sessions.values())

    def __len__(self) -> int:
        return len(self._sessions)

    def take(self, manifest: manifest_pb2.Manifest) -> chunkkv.KVCache | None:
        """Take a session's cache out, whether it can be used or not.

        Args:
            manifest: The session as it goes on: with the new turn's tokens and segments.

        Returns:
            The cache, if the manifest goes on exactly where it was put back; it holds the
            manifest's first ``cache.get_seq_length()`` tokens.
        """
        resident = self._sessions.pop((manifest.tenant, manifest.session_id), None)
        if resident is None or not _goes_on(manifest, resident.manifest):
            return None
        return resident.cache

    def put(self, manifest: manifest_pb2.Manifest, cache: chunkkv.KVCache) -> None:
        """Keep the cache of a committed turn, if there is room for it at all.

        Args:
            manifest: As it was committed. Must not be changed afterwards.
            cache: KV of all tokens that the manifest's segments cover.
        """
        key = (manifest.tenant, manifest.session_id)
        self._sessions.pop(key, None)
        self._sessions[key] = _Resident(manifest, cache)
        while self.num_bytes > self._max_bytes:
            self._sessions.popitem(last=False)


def _goes_on(new: manifest_pb2.Manifest, old: manifest_pb2.Manifest) -> bool:
    num_segments, num_tokens = len(old.segments), len(old.token_ids)
    return (
        new.version == old.version
        and new.segments[:num_segments] == old.segments[:]
        and new.token_ids[:num_tokens] == old.token_ids[:]
    )
