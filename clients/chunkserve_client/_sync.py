"""The same client for programs without an event loop: every call waits.

The work is the asynchronous client's, on a thread with an event loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from chunkserve_client._client import Client
from chunkserve_client._connection import DEFAULT_ADDRESS, ClientOptions
from chunkserve_client._generation import Generation
from chunkserve_client._portal import Portal
from chunkserve_client._session import Session
from chunkserve_client._types import (
    Compression,
    CompressionResult,
    Event,
    Finish,
    GenerateOptions,
    Message,
    Model,
    PromptInfo,
    Result,
    SessionInfo,
    TokenCount,
    TokenLogprob,
)


class SyncGeneration:
    """An answer: iterate over its text, or over its events, once. See :class:`Generation`."""

    def __init__(self, portal: Portal, generation: Generation) -> None:
        self._portal = portal
        self._generation = generation

    @property
    def request_id(self) -> str:
        """Names the request in the server's logs."""
        return self._generation.request_id

    @property
    def prompt_info(self) -> PromptInfo | None:
        """What was done with the prompt; ``None`` before the first event."""
        return self._generation.prompt_info

    @property
    def finish(self) -> Finish | None:
        """How the answer ended; ``None`` until it has."""
        return self._generation.finish

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._generation.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Its tokens so far."""
        return self._generation.token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """One for each of its tokens so far, if they were asked for; else empty."""
        return self._generation.logprobs

    def __iter__(self) -> Iterator[str]:
        """Yield the text as it comes; leaving the loop early cancels the answer."""
        return self._portal.iterate(aiter(self._generation))

    def events(self) -> Iterator[Event]:
        """Yield one PromptInfo, then TokenDeltas, last one Finish."""
        return self._portal.iterate(self._generation.events())

    def result(self) -> Result:
        """Wait for the whole answer."""
        return self._portal.run(self._generation.result())

    def close(self) -> None:
        """Cancel the answer unless it has ended. Harmless if it has."""
        if self._portal.is_open:
            self._portal.run(self._generation.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class SyncSession:
    """A session on the server. See :class:`Session`."""

    def __init__(self, portal: Portal, session: Session) -> None:
        self._portal = portal
        self._session = session

    def __repr__(self) -> str:
        return f"SyncSession({self.session_id!r})"

    @property
    def session_id(self) -> str:
        """Its id."""
        return self._session.session_id

    @property
    def info(self) -> SessionInfo:
        """The session as the server last told; :meth:`refresh` asks again."""
        return self._session.info

    def generate(
        self, prompt: str | None = None, **options: Unpack[GenerateOptions]
    ) -> SyncGeneration:
        """Ask the next question of the conversation. See :meth:`Client.generate`."""
        return SyncGeneration(self._portal, self._session.generate(prompt, **options))

    def refresh(self) -> SessionInfo:
        """Ask the server for the session as it is now."""
        return self._portal.run(self._session.refresh())

    def fork(self, new_session_id: str | None = None, *, ttl_s: float | None = None) -> SyncSession:
        """Make a session that continues this one. See :meth:`Client.fork_session`."""
        forked = self._portal.run(self._session.fork(new_session_id, ttl_s=ttl_s))
        return SyncSession(self._portal, forked)

    def compress(self, compression: Compression) -> CompressionResult:
        """Compress what is stored further. See :meth:`Client.compress_session`."""
        return self._portal.run(self._session.compress(compression))

    def export(self, *, timeout_s: float | None = None) -> Iterator[bytes]:
        """Stream the session out. See :meth:`Client.export_session`."""
        return self._portal.iterate(self._session.export(timeout_s=timeout_s))

    def delete(self) -> None:
        """Delete the session."""
        self._portal.run(self._session.delete())


class SyncClient:
    """Talks to a ChunkServe gateway. May be used from several threads. See :class:`Client`.

    with SyncClient("localhost:50051") as client:
        for text in client.generate("Why is the sky blue?"):
            print(text, end="", flush=True)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Unpack[ClientOptions]) -> None:
        self._portal = Portal()
        self._client = Client(address, **options)
        weakref.finalize(self, self._portal.close)

    def generate(
        self,
        prompt: str | None = None,
        *,
        session: SyncSession | str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> SyncGeneration:
        """Ask the model. See :meth:`Client.generate`."""
        session_id = session.session_id if isinstance(session, SyncSession) else session
        generation = self._client.generate(prompt, session=session_id, **options)
        return SyncGeneration(self._portal, generation)

    def create_session(
        self,
        session_id: str | None = None,
        *,
        model: str | None = None,
        compression: Compression | None = None,
        ttl_s: float | None = None,
    ) -> SyncSession:
        """Create an empty session. See :meth:`Client.create_session`."""
        session = self._portal.run(
            self._client.create_session(
                session_id, model=model, compression=compression, ttl_s=ttl_s
            )
        )
        return SyncSession(self._portal, session)

    def get_session(self, session_id: str) -> SyncSession:
        """Return a handle on a session. See :meth:`Client.get_session`."""
        return SyncSession(self._portal, self._portal.run(self._client.get_session(session_id)))

    def list_sessions(self, *, page_size: int = 0) -> Iterator[SyncSession]:
        """Yield all sessions, oldest first. See :meth:`Client.list_sessions`."""
        for session in self._portal.iterate(self._client.list_sessions(page_size=page_size)):
            yield SyncSession(self._portal, session)

    def delete_session(self, session_id: str) -> None:
        """Delete a session. See :meth:`Client.delete_session`."""
        self._portal.run(self._client.delete_session(session_id))

    def fork_session(
        self, session_id: str, new_session_id: str | None = None, *, ttl_s: float | None = None
    ) -> SyncSession:
        """Make a session that continues another one. See :meth:`Client.fork_session`."""
        forked = self._portal.run(
            self._client.fork_session(session_id, new_session_id, ttl_s=ttl_s)
        )
        return SyncSession(self._portal, forked)

    def compress_session(self, session_id: str, compression: Compression) -> CompressionResult:
        """Compress a stored session further. See :meth:`Client.compress_session`."""
        return self._portal.run(self._client.compress_session(session_id, compression))

    def export_session(self, session_id: str, *, timeout_s: float | None = None) -> Iterator[bytes]:
        """Stream a session out. See :meth:`Client.export_session`."""
        exported = self._client.export_session(session_id, timeout_s=timeout_s)
        return self._portal.iterate(exported)

    def import_session(
        self,
        data: Iterable[bytes],
        session_id: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> SyncSession:
        """Store a session that was streamed out. See :meth:`Client.import_session`."""
        imported = self._portal.run(
            self._client.import_session(data, session_id, timeout_s=timeout_s)
        )
        return SyncSession(self._portal, imported)

    def count_tokens(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] | None = None,
        text: str | None = None,
        token_ids: Sequence[int] | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> TokenCount:
        """Count the tokens of an input. See :meth:`Client.count_tokens`."""
        return self._portal.run(
            self._client.count_tokens(
                prompt,
                messages=messages,
                text=text,
                token_ids=token_ids,
                model=model,
                timeout_s=timeout_s,
            )
        )

    def list_models(self) -> tuple[Model, ...]:
        """Return the models that can be asked now, by name."""
        return self._portal.run(self._client.list_models())

    def close(self) -> None:
        """End all calls and close the connection. Harmless if it is closed."""
        if self._portal.is_open:
            self._portal.run(self._client.aclose())
            self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
