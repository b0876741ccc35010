"""Random steps on sessions, each of which knows what must come of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration

from chunkserve.v1 import inference_pb2, manifest_pb2, session_pb2, types_pb2
from services.gateway.manifests import read_manifest
from services.models.chat import tokenize
from services.models.loader import LoadedModel
from tests.fakes import error_info
from tests.integration.session_cluster import (
    MAX_MODEL_LEN,
    WAIT_S,
    SessionCluster,
)
from tests.integration.session_model import (
    MAX_ANSWER_TOKENS,
    MIN_COMPRESS_TOKENS,
    TENANT,
    Answer,
    Conversation,
    Keys,
    check_is_greedy,
)

MAX_SESSIONS: Final = 10
MAX_MOMENT: Final = 60

_EVERYTHING: Final = types_pb2.CompressionPolicy(keep_ratio=1.0, chunk_size=4, window_size=4)
_POLICIES: Final = (
    _EVERYTHING,
    types_pb2.CompressionPolicy(keep_ratio=0.5, chunk_size=4, window_size=4),
    types_pb2.CompressionPolicy(max_kept_tokens=12, chunk_size=2, window_size=2, sink_tokens=2),
    types_pb2.CompressionPolicy(
        keep_ratio=0.6, chunk_size=4, window_size=4, precision=types_pb2.PRECISION_INT8
    ),
    types_pb2.CompressionPolicy(
        keep_ratio=0.5,
        chunk_size=4,
        window_size=4,
        scope=types_pb2.SCOPE_HEAD,
        scorer=types_pb2.SCORER_KEY_DIFF,
    ),
    types_pb2.CompressionPolicy(
        keep_ratio=0.4,
        chunk_size=4,
        window_size=4,
        scope=types_pb2.SCOPE_HEAD,
        spread=types_pb2.BUDGET_SPREAD_ADAPTIVE,
        scorer=types_pb2.SCORER_EXPECTED_ATTENTION,
    ),
    types_pb2.CompressionPolicy(
        keep_ratio=0.6,
        chunk_size=12,
        window_size=4,
        unit=types_pb2.UNIT_SENTENCE,
        spread=types_pb2.BUDGET_SPREAD_PYRAMID,
        scorer=types_pb2.SCORER_HEAVY_HITTER,
        gating=0.9,
    ),
    types_pb2.CompressionPolicy(preset="durable", keep_ratio=0.5),
    types_pb2.CompressionPolicy(
        keep_ratio=0.7, chunk_size=4, scope=types_pb2.SCOPE_GLOBAL, merge_layers=True
    ),
)
_BOOKS: Final = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
)
_TTLS_S: Final = (300, 3600)
_LOST_KV: Final = ("lost", "flipped")

# How often each step is drawn.
_WEIGHTS: Final = {
    "create": 12,
    "take_turn": 22,
    "repeat_turn": 6,
    "cancel_turn": 10,
    "turn_while_killing": 8,
    "busy": 4,
    "fork": 8,
    "twins": 4,
    "share_prefix": 2,
    "delete": 7,
    "expire": 4,
    "expire_in_turn": 2,
    "damage": 3,
    "compress": 6,
    "compress_while_killing": 2,
    "move": 4,
    "cut_import": 3,
    "answer_once": 3,
    "too_long": 2,
    "list_sessions": 2,
}


class Steps:
    """Draws steps, does them on the cluster and on the model, and compares.

    Args:
        cluster: Gateway and workers.
        model_keys: The store's keys.
        loaded: Says what is right.
        seed: Every step is drawn from it and its number alone.

    Attributes:
        log: What was done, a line for each step.
    """

    def __init__(
        self, cluster: SessionCluster, stored_keys: Keys, loaded: LoadedModel, *, seed: int
    ) -> None:
        self._cluster = cluster
        self._keys = stored_keys
        self._loaded = loaded
        self._seed = seed
        self._sessions: dict[str, Conversation] = {}
        self._num_requests = 0
        self._abandoned: set[str] = set()
        self._rng = random.Random(seed)
        self.log: list[str] = []

    async def run(self, number: int) -> None:
        """Do the step of this number."""
        self._rng = random.Random(f"{self._seed}/{number}")
        name = self._rng.choices([*_WEIGHTS], [*_WEIGHTS.values()])[0]
        if not self._sessions:
            name = "create"
        self.log.append(f"{number} {name}")
        step: Callable[[], Awaitable[None]] = getattr(self, f"_{name}")
        await step()
        await self._cluster.quiesce()

    async def check_all(self) -> None:
        """Compare every session, and every key in the store."""
        for conversation in self._sessions.values():
            await self._check(conversation)
        self._keys.check(self._sessions.values(), self._abandoned)
        usage = await self._cluster.store.usage(TENANT)
        assert usage.num_sessions == len(self._sessions)
        assert usage.stored_bytes == sum(
            segment.size_bytes for c in self._sessions.values() for segment in c.segments
        )

    async def end(self) -> None:
        """Delete half of the sessions, let the others expire, and look what is left."""
        remaining = list(self._sessions.values())
        for conversation in remaining[::2]:
            await self._delete_session(conversation)
        await self.check_all()
        for conversation in remaining[1::2]:
            self._expire_session(conversation)
            await self.check_all()
        await self._list_sessions()
        self._keys.check_nothing_left(self._abandoned)

    # Steps.

    async def _create(self) -> None:
        taken = list(self._sessions)
        session_id = f"s-{self._rng.randrange(2 * MAX_SESSIONS)}"
        policy = self._rng.choice(_POLICIES)
        ttl_s = self._rng.choice(_TTLS_S)
        if len(taken) >= MAX_SESSIONS:
            await self._delete_session(self._drawn())
            taken = list(self._sessions)
        request = session_pb2.CreateSessionRequest(
            session_id=session_id, compression=policy, ttl=Duration(seconds=ttl_s)
        )
        if session_id in taken:
            self._note(f"{session_id} is taken")
            error = await self._refused(self._cluster.sessions.CreateSession(request))
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS
            await self._check(self._sessions[session_id])
            return
        self._note(f"{session_id} policy {_POLICIES.index(policy)}")
        made = (await self._cluster.sessions.CreateSession(request)).session
        self._add(Conversation(made.session_id, ttl_s, is_exact=policy == _EVERYTHING))
        await self._check(self._sessions[session_id])

    async def _take_turn(self) -> None:
        conversation = await self._roomy()
        request = self._request(conversation)
        await self._expect_whole(conversation, request, await self._ask(request))

    async def _repeat_turn(self) -> None:
        conversation = self._drawn()
        if not conversation.turns:
            return
        request, first = self._rng.choice(conversation.turns[-60:])
        self._note(f"{conversation.session_id} {request.request_id}")
        again = await self._ask(request)
        assert again.is_whole
        assert again.info.replayed
        assert (again.token_ids, again.text) == (first.token_ids, first.text)
        assert again.finish == first.finish or again.finish.session_version > 0
        other = inference_pb2.GenerateRequest()
        other.CopyFrom(request)
        other.sampling.max_tokens += 1
        refused = await self._ask(other)
        assert refused.error.code() == grpc.StatusCode.ALREADY_EXISTS
        assert error_info(refused.error).reason == "REQUEST_ID_REUSED"
        await self._check(conversation)

    async def _cancel_turn(self) -> None:
        """A turn whose client leaves is stored whole, or not at all."""
        conversation = await self._roomy()
        request = self._request(conversation)
        moment = self._rng.randint(1, MAX_MOMENT)
        self._note(f"at {moment}")
        answer = await self._ask(request, cancel_at=moment)
        await self._cluster.quiesce()
        if answer.is_whole:
            await self._expect_whole(conversation, request, answer)
            return
        await self._expect_whole_or_nothing(conversation, request, answer)

    async def _turn_while_killing(self) -> None:
        """A worker that dies is replaced in the middle of the turn; nobody notices."""
        conversation = await self._roomy()
        request = self._request(conversation)
        role = self._rng.choice(["prefill", "decode", "decode"])
        moment = self._rng.randint(1, MAX_MOMENT)
        twin = await self._fork_of(conversation)
        self._note(f"kill {role} at {moment}")
        async with self._killing(role, moment):
            answer = await self._ask_again(request)
        await self._expect_whole(conversation, request, answer)
        await self._expect_same(twin, request, answer)

    async def _busy(self) -> None:
        """While a turn runs, others are refused or wait, and copies are of what was before."""
        conversation = await self._roomy()
        request, second = self._request(conversation), self._request(conversation)
        session_id = conversation.session_id
        before = conversation.copied(session_id, conversation.ttl_s)
        sessions = self._cluster.sessions
        async with asyncio.TaskGroup() as tasks, self._held_commits() as release:
            first = tasks.create_task(self._ask(request))
            await self._cluster.moments.held.wait()
            refused = await self._ask(second)
            assert refused.error.code() == grpc.StatusCode.ABORTED
            for method, asked in (
                (sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id)),
                (sessions.CompressSession, _to_one_token(session_id)),
            ):
                error = await self._refused(method(asked))
                assert error.code() == grpc.StatusCode.ABORTED
            fork = await self._fork_of(before)
            second.wait_if_busy = True
            waiting = tasks.create_task(self._ask(second))
            release()
        await self._expect_whole(conversation, request, first.result(), checks=False)
        await self._expect_whole(conversation, second, waiting.result())
        await self._check(fork)

    async def _fork(self) -> None:
        source = self._drawn()
        if self._rng.random() < 0.2:
            taken = self._rng.choice([*self._sessions])
            request = session_pb2.ForkSessionRequest(
                session_id=source.session_id, new_session_id=taken
            )
            error = await self._refused(self._cluster.sessions.ForkSession(request))
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS
            await self._check(self._sessions[taken])
            return
        fork = await self._fork_of(source, ttl_s=self._rng.choice(_TTLS_S))
        await self._check(fork)
        await self._check(source)

    async def _twins(self) -> None:
        """Branches of a session answer alike, at the same time, and leave each other alone."""
        conversation = await self._roomy()
        twin = await self._fork_of(conversation)
        request = self._request(conversation)
        other = self._for(twin, request)
        answers = await asyncio.gather(self._ask(request), self._ask(other))
        await self._expect_whole(conversation, request, answers[0])
        await self._expect_whole(twin, other, answers[1])
        assert answers[0].token_ids == answers[1].token_ids

    async def _share_prefix(self) -> None:
        """A prefix that one session has is found by the next one."""
        policy, book = self._rng.choice(_POLICIES), self._rng.choice(_BOOKS)
        self._note(f"policy {_POLICIES.index(policy)}")
        firsts = []
        for _ in range(2):
            conversation = await self._created(policy)
            request = self._chat(conversation, book, f"Question {self._num_requests}?")
            answer = await self._ask(request)
            await self._expect_whole(conversation, request, answer)
            firsts.append(conversation.segments[0])
        assert firsts[0].is_prefix
        assert firsts[0].segment_id == firsts[1].segment_id
        assert answer.info.num_shared_tokens == firsts[0].num_tokens

    async def _delete(self) -> None:
        conversation = self._drawn()
        self._note(conversation.session_id)
        await self._delete_session(conversation)
        session_id = conversation.session_id
        gone = await self._ask(self._request(conversation))
        assert gone.error.code() == grpc.StatusCode.NOT_FOUND
        sessions = self._cluster.sessions
        for method, request in (
            (sessions.GetSession, session_pb2.GetSessionRequest(session_id=session_id)),
            (sessions.DeleteSession, session_pb2.DeleteSessionRequest(session_id=session_id)),
            (sessions.ForkSession, session_pb2.ForkSessionRequest(session_id=session_id)),
            (sessions.CompressSession, _to_one_token(session_id)),
        ):
            error = await self._refused(method(request))
            assert error.code() == grpc.StatusCode.NOT_FOUND

    async def _expire(self) -> None:
        conversation = self._drawn()
        self._note(conversation.session_id)
        self._expire_session(conversation)
        gone = await self._ask(self._request(conversation))
        assert gone.error.code() == grpc.StatusCode.NOT_FOUND

    async def _expire_in_turn(self) -> None:
        """A session that is gone before its turn is committed stays so."""
        conversation = await self._roomy()
        request = self._request(conversation)
        async with asyncio.TaskGroup() as tasks, self._held_commits() as release:
            asking = tasks.create_task(self._ask(request))
            await self._cluster.moments.held.wait()
            self._expire_session(conversation)
            release()
        assert asking.result().error.code() == grpc.StatusCode.NOT_FOUND
        await self._cluster.quiesce()
        self._keys.expire(conversation)  # what the turn reserved expires, too

    async def _damage(self) -> None:
        """Lost KV is computed again by the next turn, which says so."""
        conversation = await self._roomy()
        if not conversation.segments:
            return
        kind, index = self._rng.choice(_LOST_KV), self._rng.randrange(1 << 20)
        segment = self._rng.choice(conversation.segments)
        self._note(f"{kind} {segment.segment_id}")
        # None that is left has it in memory.
        for worker in list(self._cluster.workers["decode"]):
            self._cluster.kill(worker)
        await self._cluster.replace_dead()
        self._keys.damage(segment.segment_id, kind, index)
        # No chat: behind a prefix that it finds, a prefill worker heals and does not say so.
        request = self._empty_request(conversation)
        request.token_ids.ids.extend(self._ids(self._rng.randint(1, 60)))
        answer = await self._ask(request)
        await self._expect_whole(conversation, request, answer, is_healed=True)
        # In place of what was compressed again, the original may still be there.
        assert answer.info.rebuilt or segment.HasField("recompression")
        for other in list(self._sessions.values()):
            if segment.segment_id in {each.segment_id for each in other.segments}:
                await self._heal(other)

    async def _heal(self, conversation: Conversation) -> None:
        """Let a session find out what became of a segment that it names."""
        if len(conversation.token_ids) > MAX_MODEL_LEN - 300:
            await self._delete_session(conversation)
            return
        request = self._request(conversation)
        await self._expect_whole(conversation, request, await self._ask(request), is_healed=True)

    async def _compress(self) -> None:
        conversation = self._drawn()
        request = self._compression(conversation)
        calling = self._cluster.sessions.CompressSession(request, timeout=WAIT_S)
        done, error = await self._outcome(calling)
        if error is None:
            self._compressed(conversation, done.session)
        else:
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert error_info(error).reason == "NO_SCORES"
            self._note("refused")
        await self._check(conversation)

    async def _compress_while_killing(self) -> None:
        """A session is compressed whole, or not at all."""
        conversation = self._drawn()
        request = self._compression(conversation)
        moment = self._rng.randint(1, MAX_MOMENT)
        self._note(f"kill at {moment}")
        async with self._killing("compression", moment):
            calling = self._cluster.sessions.CompressSession(request, timeout=WAIT_S)
            _, error = await self._outcome(calling)
        if error is not None:
            self._note(str(error.code()))
            codes = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
            assert error.code() in codes
        self._keys.release_lease(conversation.session_id)
        self._compressed(conversation, await self._session(conversation))
        await self._check(conversation)

    async def _move(self) -> None:
        """What is exported can be imported, and is another session then."""
        source = self._drawn()
        pieces = await self._exported(source)
        session_id = self._unused_id()
        self._note(f"{source.session_id} to {session_id}")
        await self._imported(pieces, session_id)
        conversation = source.copied(session_id, source.ttl_s)
        conversation.segments = list((await self._manifest(session_id)).segments)
        self._add(conversation)
        await self._check(conversation)
        await self._check(source)

    async def _cut_import(self) -> None:
        """An import that is cut off, damaged, cancelled, or of a taken id leaves nothing behind."""
        source = self._drawn()
        pieces = await self._exported(source)
        kind = self._rng.choice(["cut", "flipped", "taken", "cancelled"])
        session_id = source.session_id if kind == "taken" else "imported"
        self._note(f"{source.session_id} {kind}")
        index = self._rng.randrange(len(pieces))
        if kind == "cut":
            pieces = pieces[:index]
        elif kind == "flipped":
            pieces[index] = _flipped(pieces[index], self._rng.randrange(1 << 20))
        elif kind == "cancelled":
            call = self._cluster.sessions.ImportSession()
            for piece in pieces[:index]:
                await call.write(piece)
            call.cancel()
            return
        error = await self._refused(self._imported(pieces, session_id))
        assert error.code() in (
            grpc.StatusCode.DATA_LOSS,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.ALREADY_EXISTS,
        )
        await self._check(source)

    async def _answer_once(self) -> None:
        """Nothing is kept of a request without a session, however it ends."""
        nobody = Conversation("", 0, is_exact=False)
        request = self._request(nobody)
        kind = self._rng.choice(["whole", "cancel", "kill"])
        moment = self._rng.randint(1, MAX_MOMENT)
        self._note(f"{kind} at {moment}")
        self._cluster.take_disowned()
        if kind == "cancel":
            await self._ask(request, cancel_at=moment)
            await self._cluster.quiesce()
            self._abandoned |= self._cluster.take_disowned()
            return
        if kind == "kill":
            async with self._killing(self._rng.choice(["prefill", "decode"]), moment):
                answer = await self._ask_again(request)
            self._abandoned |= self._cluster.take_disowned()
        else:
            answer = await self._ask(request)
        assert answer.is_whole, answer.error

    async def _too_long(self) -> None:
        conversation = self._drawn()
        request = self._request(conversation)
        request.token_ids.ids[:] = [7] * MAX_MODEL_LEN
        answer = await self._ask(request)
        assert answer.error.code() == grpc.StatusCode.INVALID_ARGUMENT
        await self._check(conversation)

    async def _list_sessions(self) -> None:
        found, token = [], ""
        while True:
            page = await self._cluster.sessions.ListSessions(
                session_pb2.ListSessionsRequest(page_size=5, page_token=token)
            )
            found += [session.session_id for session in page.sessions]
            if not (token := page.next_page_token):
                break
        assert found == list(dict.fromkeys(found))
        assert set(found) == set(self._sessions)

    # Requests.

    def _request(self, conversation: Conversation) -> inference_pb2.GenerateRequest:
        """Draw a turn of any kind."""
        kind = self._rng.choice(["ids", "ids", "short", "text", "chat"])
        request = self._empty_request(conversation)
        if kind == "ids":
            request.token_ids.ids.extend(self._ids(self._rng.randint(1, 60)))
        elif kind == "short":
            request.token_ids.ids.extend(self._ids(self._rng.randrange(1, MIN_COMPRESS_TOKENS)))
        elif kind == "text":
            request.text = " ".join(self._rng.choice(["one", "two", "threé"]) for _ in range(9))
        else:
            messages = request.chat.messages
            if self._rng.random() < 0.7:
                messages.add(role="system", content=self._rng.choice(_BOOKS), cache_breakpoint=True)
            messages.add(role="user", content=f"What is {self._rng.randrange(100)}?")
        self._note(f"{conversation.session_id} {request.request_id} {kind}")
        return request

    def _chat(
        self, conversation: Conversation, book: str, question: str
    ) -> inference_pb2.GenerateRequest:
        request = self._empty_request(conversation)
        request.chat.messages.add(role="system", content=book, cache_breakpoint=True)
        request.chat.messages.add(role="user", content=question)
        return request

    def _empty_request(self, conversation: Conversation) -> inference_pb2.GenerateRequest:
        self._num_requests += 1
        sampling = types_pb2.SamplingParams(
            max_tokens=self._rng.randint(1, MAX_ANSWER_TOKENS), ignore_eos=self._rng.random() < 0.8
        )
        if self._rng.random() < 0.3:
            sampling.temperature, sampling.seed = 1.0, self._rng.randrange(1 << 30)
        return inference_pb2.GenerateRequest(
            session_id=conversation.session_id,
            sampling=sampling,
            request_id=f"r-{self._num_requests}",
        )

    def _for(
        self, conversation: Conversation, request: inference_pb2.GenerateRequest
    ) -> inference_pb2.GenerateRequest:
        same = inference_pb2.GenerateRequest()
        same.CopyFrom(request)
        same.session_id = conversation.session_id
        return same

    def _compression(self, conversation: Conversation) -> session_pb2.CompressSessionRequest:
        policy = types_pb2.CompressionPolicy()
        budget = self._rng.choice(["keep_ratio", "max_kept_tokens", "none"])
        if budget == "keep_ratio":
            policy.keep_ratio = self._rng.choice([0.2, 0.5, 1.0])
        elif budget == "max_kept_tokens":
            policy.max_kept_tokens = self._rng.randint(1, 80)
        if budget == "none" or self._rng.random() < 0.5:
            policy.precision = self._rng.choice(
                [types_pb2.PRECISION_FP8, types_pb2.PRECISION_INT8, types_pb2.PRECISION_INT4]
            )
        self._note(f"{conversation.session_id} {budget} {policy.precision}")
        return session_pb2.CompressSessionRequest(
            session_id=conversation.session_id, compression=policy
        )

    def _ids(self, number: int) -> list[int]:
        return [self._rng.randrange(1, 257) for _ in range(number)]

    # What must come of them.

    async def _expect_whole(
        self,
        conversation: Conversation,
        request: inference_pb2.GenerateRequest,
        answer: Answer,
        *,
        is_healed: bool = False,
        checks: bool = True,
    ) -> None:
        """The turn is answered and stored; what it says of itself is right."""
        assert answer.is_whole, answer.error
        assert not answer.info.replayed
        if not is_healed:
            assert not answer.info.rebuilt
        prompt = tokenize(self._loaded, request, before=conversation.token_ids)
        self._commit(conversation, request, prompt, answer)
        info, finish = answer.info, answer.finish
        assert info.request_id == request.request_id
        num_prompt_tokens = len(conversation.token_ids) - len(answer.token_ids)
        assert info.num_prompt_tokens == num_prompt_tokens
        assert info.num_reused_tokens + info.num_prefilled_tokens == num_prompt_tokens
        assert finish.num_generated_tokens == len(answer.token_ids)
        assert finish.num_total_tokens == len(conversation.token_ids)
        assert finish.seed == request.sampling.seed or not request.sampling.temperature
        if conversation.is_exact and not request.sampling.temperature:
            check_is_greedy(self._loaded, conversation.token_ids, len(answer.token_ids))
        if not checks:
            return
        assert finish.session_version == conversation.version
        manifest = await self._manifest(conversation.session_id)
        if not is_healed:
            conversation.check_unchanged_segments(manifest)
        conversation.segments = list(manifest.segments)
        await self._check(conversation)

    async def _expect_whole_or_nothing(
        self,
        conversation: Conversation,
        request: inference_pb2.GenerateRequest,
        answer: Answer,
    ) -> None:
        """The turn was stored as it was streamed, as far as it was; or the session is unchanged."""
        manifest = await self._manifest(conversation.session_id)
        if manifest.version == conversation.version:
            self._note("nothing")
            await self._check(conversation)
            return
        self._note("whole")
        stored = await self._ask(request)
        assert stored.is_whole
        assert stored.info.replayed
        assert stored.token_ids[: len(answer.token_ids)] == answer.token_ids
        assert stored.text.startswith(answer.text)
        prompt = tokenize(self._loaded, request, before=conversation.token_ids)
        self._commit(conversation, request, prompt, stored)
        conversation.check_unchanged_segments(manifest)
        conversation.segments = list(manifest.segments)
        await self._check(conversation)

    async def _expect_same(
        self, twin: Conversation, request: inference_pb2.GenerateRequest, answer: Answer
    ) -> None:
        """A branch that is asked the same without any trouble answers the same."""
        same = self._for(twin, request)
        undisturbed = await self._ask(same)
        await self._expect_whole(twin, same, undisturbed)
        assert answer.token_ids == undisturbed.token_ids
        assert answer.text == undisturbed.text

    def _commit(
        self,
        conversation: Conversation,
        request: inference_pb2.GenerateRequest,
        prompt: Sequence[int],
        answer: Answer,
    ) -> None:
        conversation.token_ids += [*prompt, *answer.token_ids]
        conversation.num_turns += 1
        conversation.version += 1
        conversation.turns.append((request, answer))

    def _compressed(self, conversation: Conversation, session: session_pb2.Session) -> None:
        """Adopt what became of the segments: the same spans, of which none grew."""
        after = list(session.segments)
        if after == conversation.segments:
            assert session.version == conversation.version
            return
        conversation.version += 1
        conversation.is_exact = False
        for old, new in zip(conversation.segments, after, strict=True):
            assert (old.first_token, old.num_tokens) == (new.first_token, new.num_tokens)
            assert new.num_kept_tokens <= old.num_kept_tokens
            if new != old:
                assert new.recompression.original_segment_id
        conversation.segments = after

    async def _check(self, conversation: Conversation) -> None:
        manifest = await self._manifest(conversation.session_id)
        conversation.check(await self._session(conversation), manifest)
        assert list(manifest.segments) == conversation.segments

    # Calls.

    async def _ask(self, request: inference_pb2.GenerateRequest, *, cancel_at: int = 0) -> Answer:
        """Send a request and return what came; at a moment of this number, cancel it."""
        answer, moments = Answer(), self._cluster.moments
        call = self._cluster.inference.Generate(request, timeout=WAIT_S)
        loop = asyncio.get_running_loop()
        if cancel_at:
            moments.arm(cancel_at, lambda: loop.call_soon_threadsafe(call.cancel))
        try:
            async for event in call:
                moments.pass_by()
                _take_in(answer, event)
        except grpc.aio.AioRpcError as error:
            answer.error = error
        except asyncio.CancelledError:
            if not cancel_at:
                raise
        finally:
            if cancel_at:
                moments.disarm()
        return answer

    async def _ask_again(self, request: inference_pb2.GenerateRequest) -> Answer:
        """Send a request again as long as it is refused before it began: nobody is left to ask."""
        async with asyncio.timeout(WAIT_S):
            while True:
                answer = await self._ask(request)
                is_refused = answer.error is not None and answer.info is None
                if not is_refused or answer.error.code() != grpc.StatusCode.UNAVAILABLE:
                    return answer
                self._note(f"again: {error_info(answer.error).reason}")
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def _killing(self, role: str, moment: int) -> AsyncIterator[None]:
        """Kill a worker, one that works if there is one, at a moment of the block."""

        def kill() -> None:
            workers = list(self._cluster.workers[role])
            self._cluster.kill(next((w for w in workers if w.num_active), workers[0]))

        self._cluster.moments.arm(moment, kill)
        try:
            yield
        finally:
            self._cluster.moments.disarm()
            await self._cluster.replace_dead()
            await self._cluster.quiesce()

    @asynccontextmanager
    async def _held_commits(self) -> AsyncIterator[Callable[[], None]]:
        async with self._cluster.moments.commits_held() as release:
            yield release

    async def _refused(self, call: Awaitable[Any]) -> grpc.aio.AioRpcError:
        _, error = await self._outcome(call)
        assert error is not None
        return error

    async def _outcome(self, call: Awaitable[Any]) -> tuple[Any, grpc.aio.AioRpcError | None]:
        """Return what a call answers, or with what it is refused."""
        try:
            return await call, None
        except grpc.aio.AioRpcError as error:
            return None, error

    async def _session(self, conversation: Conversation) -> session_pb2.Session:
        request = session_pb2.GetSessionRequest(session_id=conversation.session_id)
        return (await self._cluster.sessions.GetSession(request)).session

    async def _manifest(self, session_id: str) -> manifest_pb2.Manifest:
        manifest, _ = await read_manifest(self._cluster.store, TENANT, session_id)
        return manifest

    async def _fork_of(self, source: Conversation, ttl_s: int = 0) -> Conversation:
        if len(self._sessions) > 2 * MAX_SESSIONS:
            others = [c for c in self._sessions.values() if c.session_id != source.session_id]
            await self._delete_session(self._rng.choice(others))
        session_id = self._unused_id()
        self._note(f"{source.session_id} forked to {session_id}")
        request = session_pb2.ForkSessionRequest(
            session_id=source.session_id,
            new_session_id=session_id,
            ttl=Duration(seconds=ttl_s) if ttl_s else None,
        )
        await self._cluster.sessions.ForkSession(request)
        fork = source.copied(session_id, ttl_s or source.ttl_s)
        self._add(fork)
        return fork

    async def _created(self, policy: types_pb2.CompressionPolicy) -> Conversation:
        session_id = self._unused_id()
        await self._cluster.sessions.CreateSession(
            session_pb2.CreateSessionRequest(
                session_id=session_id, compression=policy, ttl=Duration(seconds=_TTLS_S[0])
            )
        )
        conversation = Conversation(session_id, _TTLS_S[0], is_exact=policy == _EVERYTHING)
        self._add(conversation)
        return conversation

    async def _delete_session(self, conversation: Conversation) -> None:
        await self._cluster.sessions.DeleteSession(
            session_pb2.DeleteSessionRequest(session_id=conversation.session_id)
        )
        del self._sessions[conversation.session_id]

    def _expire_session(self, conversation: Conversation) -> None:
        self._keys.expire(conversation)
        del self._sessions[conversation.session_id]

    async def _exported(self, source: Conversation) -> list[session_pb2.ImportSessionRequest]:
        call = self._cluster.sessions.ExportSession(
            session_pb2.ExportSessionRequest(session_id=source.session_id)
        )
        return [session_pb2.ImportSessionRequest(piece=answer.piece) async for answer in call]

    async def _imported(
        self, pieces: list[session_pb2.ImportSessionRequest], session_id: str
    ) -> None:
        if pieces:
            pieces[0].new_session_id = session_id
        await self._cluster.sessions.ImportSession(iter(pieces), timeout=WAIT_S)

    # Sessions.

    def _add(self, conversation: Conversation) -> None:
        self._sessions[conversation.session_id] = conversation

    def _drawn(self) -> Conversation:
        return self._sessions[self._rng.choice([*self._sessions])]

    async def _roomy(self) -> Conversation:
        """Return a session with room for two more turns; delete those without."""
        while self._sessions:
            conversation = self._drawn()
            if len(conversation.token_ids) < MAX_MODEL_LEN - 300:
                return conversation
            await self._delete_session(conversation)
        return await self._created(_EVERYTHING)

    def _unused_id(self) -> str:
        return next(name for i in range(10_000) if (name := f"s-{i}") not in self._sessions)

    def _note(self, what: str) -> None:
        self.log[-1] += f" | {what}"


def _to_one_token(session_id: str) -> session_pb2.CompressSessionRequest:
    return session_pb2.CompressSessionRequest(
        session_id=session_id, compression=types_pb2.CompressionPolicy(max_kept_tokens=1)
    )


def _take_in(answer: Answer, event: inference_pb2.GenerateResponse) -> None:
    match event.WhichOneof("event"):
        case "prompt_info":
            assert answer.info is None
            answer.info = event.prompt_info
        case "delta":
            assert event.delta.first_token_index == len(answer.token_ids)
            answer.token_ids.extend(event.delta.token_ids)
            answer.text += event.delta.text
        case "finish":
            answer.finish = event.finish


def _flipped(
    request: session_pb2.ImportSessionRequest, index: int
) -> session_pb2.ImportSessionRequest:
    """Return a piece of an export with one byte turned."""
    kind = request.piece.WhichOneof("piece")
    flipped = session_pb2.ImportSessionRequest()
    flipped.CopyFrom(request)
    if kind == "end":
        flipped.piece.end.num_pieces += 1
        return flipped
    data = bytearray(getattr(request.piece, kind))
    data[index % len(data)] ^= 0x55
    setattr(flipped.piece, kind, bytes(data))
    return flipped
