"""Sessions and their compressed KV cache, in Redis or Valkey."""

from __future__ import annotations

from services.store.base import Store
from services.store.connect import parse_store_url
from services.store.redis import RedisStore

__all__ = ["Store", "open_store"]


def open_store(url: str) -> Store:
    """Return the store at a URL. Connects when it is first used.

    Args:
        url: ``redis://``, ``rediss://`` (TLS), ``unix://``, ``redis+cluster://`` or
            ``rediss+cluster://``, with user and password if there are any.

    Raises:
        ValueError: The URL is malformed.
    """
    return RedisStore(parse_store_url(url))
