"""A bounded sequence keeps what the policy keeps, in constant memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import chunkkv
from services.decode.attention import kv_geometry, use_sequences
from services.decode.geometry import KVGeometry
from services.decode.limit import KVLimit
from services.decode.sequence_kv import SequenceKV, tail_tokens
from services.decode.tail import tail_size_bytes
from tests.models import tiny_model
from tests.unit.decode.test_sequence_kv import FINGERPRINT, feed, new_kv, random_span, tokens

POLICY = chunkkv.CompressionPolicy(chunk_size=4, window_size=8, sink_tokens=2)


def bounded_kv(
    geometry: KVGeometry, limit: KVLimit, *spans: chunkkv.CompressedKV, new_tokens: int = 1000
) -> SequenceKV:
    kept = [span.num_kept_tokens for span in spans]
    capacity = tail_tokens(kept, new_tokens=new_tokens, limit=limit)
    memory = torch.empty(tail_size_bytes(geometry, capacity), dtype=torch.uint8)
    return SequenceKV(geometry, spans, memory, capacity=capacity, limit=limit)


def run(model: Any, kv: SequenceKV, ids: list[int]) -> list[int]:
    """Feed tokens one by one; return how many were kept after each."""
    kept = []
    for token in ids:
        kv.make_room(1)
        feed(model, (kv, [token]))
        kept.append(kv.num_kept_tokens)
    return kept


@pytest.mark.parametrize(
    ("family", "scope", "unit"),
    [
        ("llama", "head", "token"),
        ("llama", "layer", "chunk"),
        ("llama", "group", "chunk"),
        ("llama", "global", "chunk"),
        ("gemma3", "layer", "chunk"),
        ("llama", "layer", "sentence"),
    ],
)
def test_kept_tokens_never_pass_the_bound_and_stay_near_it(
    family: str, scope: Any, unit: Any
) -> None:
    model = tiny_model(family, max_position_embeddings=4096)
    use_sequences(model)
    limit = KVLimit(64, dataclasses.replace(POLICY, scope=scope, unit=unit))
    kv = bounded_kv(kv_geometry(model), limit)

    kept = run(model, kv, tokens(200))

    assert max(kept) == 64
    assert min(kept[64:]) >= 64 - limit.step(64)
    assert kv.num_tokens == 200


def test_nothing_is_dropped_before_the_bound_is_reached() -> None:
    model = tiny_model("llama")
    use_sequences(model)
    geometry = kv_geometry(model)
    bounded, plain = bounded_kv(geometry, KVLimit(64, POLICY)), new_kv(geometry)

    for token in tokens(64):
        bounded.make_room(1)
        one, two = feed(model, (bounded, [token])), feed(model, (plain, [token]))
        assert torch.equal(one, two)


@pytest.mark.parametrize("vote_power", [1, 4])
def test_what_is_dropped_is_what_the_policy_drops(vote_power: int) -> None:
    """The first compression keeps exactly what the library keeps of the same tokens."""
    model = tiny_model("llama")
    ids = tokens(64)
    policy = dataclasses.replace(POLICY, sink_tokens=0, vote_power=vote_power, pool_size=5)
    limit = KVLimit(64, policy)
    prefilled = chunkkv.run_prefill(
        model, torch.tensor([ids]), window_size=8, fingerprint=FINGERPRINT
    )
    [expected] = chunkkv.compress(prefilled, limit.choosing(64 - limit.step(64)))
    use_sequences(model)
    kv = bounded_kv(kv_geometry(model), limit)

    run(model, kv, ids)
    kv.make_room(1)
    sealed = kv.seal(fingerprint=FINGERPRINT)

    assert sealed is not None
    assert sealed.num_tokens == 64
    for seen, right in zip(sealed.layers, expected.layers, strict=True):
        assert seen.lengths == right.lengths
        for head in seen.positions.view(2, -1):
            assert head.tolist() == right.positions.tolist()
        torch.testing.assert_close(seen.keys, right.keys, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(seen.values, right.values, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", chunkkv.PRESETS)
def test_answers_are_bounded_by_every_preset(name: str) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    use_sequences(model)
    limit = KVLimit(80, chunkkv.preset(name, max_kept_tokens=16))
    kv = bounded_kv(kv_geometry(model), limit)

    assert max(run(model, kv, tokens(120))) <= 80


@pytest.mark.parametrize("prompt_tokens", [200, 256, 300], ids=["gathered", "edge", "in place"])
def test_what_the_conversation_kept_before_stays(prompt_tokens: int) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    use_sequences(model)
    geometry = kv_geometry(model)
    prompt = new_kv(geometry, room=prompt_tokens)
    for start in range(0, prompt_tokens, 100):
        feed(model, (prompt, tokens(min(100, prompt_tokens - start), seed=start)))
    span = prompt.seal(fingerprint=FINGERPRINT)
    assert span is not None
    kv = bounded_kv(geometry, KVLimit(prompt_tokens + 40, POLICY), span)

    kept = run(model, kv, tokens(150, seed=1))
    sealed = kv.seal(fingerprint=FINGERPRINT)

    assert max(kept) == prompt_tokens + 40
    assert sealed is not None
    assert (sealed.first_token, sealed.num_tokens) == (prompt_tokens, 150)
    end = prompt_tokens + 150
    for layer in sealed.layers:
        positions = layer.positions.view(2, -1)
        assert layer.lengths == (kept[-1] - prompt_tokens,) * 2
        assert (positions >= prompt_tokens).all()
        # The window is there, in order.
        assert (positions[:, -8:] == torch.arange(end - 8, end)).all()
        assert (positions.diff(dim=1) > 0).all()


def test_a_sealed_bounded_answer_goes_on_like_the_sequence_it_came_from() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    use_sequences(model)
    geometry = kv_geometry(model)
    limit = KVLimit(64, dataclasses.replace(POLICY, scope="head"))
    ids = tokens(150)
    first, second = bounded_kv(geometry, limit), bounded_kv(geometry, limit)
    run(model, first, ids)
    run(model, second, ids)
    sealed = second.seal(fingerprint=FINGERPRINT)
    assert sealed is not None

    resumed = new_kv(geometry, spans=[sealed])

    assert resumed.num_tokens == first.num_tokens
    one, two = feed(model, (first, [7])), feed(model, (resumed, [7]))
    torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


def test_heads_of_different_lengths_before_the_tail_are_scored_with_it() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    use_sequences(model)
    geometry = kv_geometry(model)
    span = random_span(geometry, [[300, 20], [0, 350], [40, 41], [300, 300]])
    limit = KVLimit(span.num_kept_tokens + 40, POLICY)
    kv = bounded_kv(geometry, limit, span)

    kept = run(model, kv, tokens(200))

    assert max(kept) == limit.max_kv_tokens


def test_tokens_come_in_pieces_that_fit() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    use_sequences(model)
    kv = bounded_kv(kv_geometry(model), KVLimit(64, POLICY))
    ids = tokens(300)

    while ids:
        piece, ids = ids[: kv.max_new_tokens], ids[kv.max_new_tokens :]
        kv.make_room(len(piece))
        feed(model, (kv, piece))
        assert kv.num_kept_tokens <= 64

    assert kv.num_tokens == 300


def test_a_bound_that_leaves_no_room_is_refused() -> None:
    geometry = kv_geometry(_with_sequences(tiny_model("llama")))
    span = random_span(geometry, [[300, 300]] * 4)

    with pytest.raises(chunkkv.InvalidInputError, match="send at least 316"):
        bounded_kv(geometry, KVLimit(310, POLICY), span)


def _with_sequences(model: Any) -> Any:
    use_sequences(model)
    return model
