"""Attention over spans and a tail gives what the model gives over one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import chunkkv
from services.decode.attention import Rows, forward, kv_geometry, use_sequences
from services.decode.geometry import KVGeometry
from services.decode.sequence_kv import SequenceKV
from services.decode.tail import MAX_NEW_TOKENS, tail_size_bytes
from tests.models import FAMILIES, SLIDING_WINDOW, VOCAB_SIZE, tiny_model

FINGERPRINT = "f" * 32


def tokens(count: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()


def new_kv(
    geometry: KVGeometry, *, room: int = 64, spans: Sequence[chunkkv.CompressedKV] = ()
) -> SequenceKV:
    gathered = sum(span.num_kept_tokens for span in spans)
    memory = torch.empty(tail_size_bytes(geometry, room + gathered), dtype=torch.uint8)
    return SequenceKV(geometry, spans, memory, capacity=room + gathered)


@torch.inference_mode()
def feed(model: Any, *rows: tuple[SequenceKV, list[int]]) -> torch.Tensor:
    """Return the logits behind each row's last token."""
    ids = [token for _, new in rows for token in new]
    positions = [kv.num_tokens + i for kv, new in rows for i in range(len(new))]
    ends = torch.tensor([len(new) for _, new in rows]).cumsum(0) - 1
    logits = forward(
        model, ids, positions, Rows([(kv, len(new)) for kv, new in rows]), ends.tolist()
    )
    for kv, new in rows:
        kv.advance(len(new))
    return logits


@torch.inference_mode()
def plain_logits(family: str, ids: list[int], **config: Any) -> torch.Tensor:
    """Return the model's own logits behind each token."""
    logits: torch.Tensor = tiny_model(family, **config)(input_ids=torch.tensor([ids])).logits[0]
    return logits


def sequences_model(family: str, **config: Any) -> Any:
    model = tiny_model(family, **config)
    use_sequences(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[40], [1] * 40, [7, 1, 1, 20, 11]])
def test_tokens_fed_in_any_pieces_give_the_models_own_logits(
    family: str, pieces: list[int]
) -> None:
    model = sequences_model(family)
    ids = tokens(40)
    kv = new_kv(kv_geometry(model))

    logits, start = [], 0
    for piece in pieces:
        logits.append(feed(model, (kv, ids[start : start + piece])))
        start += piece

    ends = torch.tensor(pieces).cumsum(0) - 1
    torch.testing.assert_close(
        torch.cat(logits), plain_logits(family, ids)[ends], atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_influence_one_another(family: str) -> None:
    model = sequences_model(family)
    geometry = kv_geometry(model)
    prompts = [tokens(length, seed=length) for length in (3, 31, 18, 1)]
    rows = [new_kv(geometry) for _ in prompts]

    together = [feed(model, *zip(rows, prompts, strict=True))]
    together += [feed(model, *((kv, [7]) for kv in rows)) for _ in range(3)]

    for index, prompt in enumerate(prompts):
        kv = new_kv(geometry)
        alone = [feed(model, (kv, prompt))] + [feed(model, (kv, [7])) for _ in range(3)]
        for seen, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(seen[index], expected[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sealed_tail_is_what_the_transformers_cache_would_store(family: str) -> None:
    model = sequences_model(family)
    ids = tokens(50)
    kv = new_kv(kv_geometry(model))
    for start in (0, 30):
        feed(model, (kv, ids[start : start + 30][:20] if start else ids[:30]))

    sealed = kv.seal(fingerprint=FINGERPRINT)

    plain = tiny_model(family)
    cache = chunkkv.KVCache(plain.config)
    with torch.inference_mode():
        plain(input_ids=torch.tensor([ids]), past_key_values=cache)
    expected = cache.take_tail(0, fingerprint=FINGERPRINT)
    assert sealed is not None
    assert sealed.shape == expected.shape
    for seen, right in zip(sealed.layers, expected.layers, strict=True):
        torch.testing.assert_close(seen.keys, right.keys, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(seen.values, right.values, atol=2e-5, rtol=2e-5)
        assert seen.positions.tolist() == right.positions.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[20, 20], [300, 5, 35]], ids=["gathered", "mixed"])
def test_a_sequence_goes_on_from_spans(family: str, sizes: list[int]) -> None:
    config = {"max_position_embeddings": 512}
    model = sequences_model(family, **config)
    geometry = kv_geometry(model)
    ids = tokens(sum(sizes) + 3)
    spans: list[chunkkv.CompressedKV] = []
    for size in sizes:
        kv = new_kv(geometry, room=size, spans=spans)
        start = kv.num_tokens
        for first in range(start, start + size, MAX_NEW_TOKENS):
            feed(model, (kv, ids[first : min(first + MAX_NEW_TOKENS, start + size)]))
        sealed = kv.seal(fingerprint=FINGERPRINT)
        assert sealed is not None
        spans.append(sealed)

    kv = new_kv(geometry, spans=spans)
    logits = torch.cat([feed(model, (kv, [token])) for token in ids[sum(sizes) :]])

    assert kv.num_tokens == len(ids)
    torch.testing.assert_close(
        logits, plain_logits(family, ids, **config)[-3:], atol=5e-5, rtol=5e-5
    )


def test_a_window_moves_to_the_front_of_its_memory_and_stays_right() -> None:
    config = {"max_position_embeddings": 1024}
    model = sequences_model("gemma3", **config)
    ids = tokens(700)
    kv = new_kv(kv_geometry(model), room=700)

    logits = torch.cat(
        [feed(model, (kv, ids[i : i + 100])) for i in range(0, 600, 100)]
        + [feed(model, (kv, [token])) for token in ids[600:]]
    )

    ends = [99, 199, 299, 399, 499, *range(599, 700)]
    torch.testing.assert_close(
        logits, plain_logits("gemma3", ids, **config)[ends], atol=1e-4, rtol=1e-4
    )
    sealed = kv.seal(fingerprint=FINGERPRINT)
    assert sealed is not None
    assert sealed.layers[0].lengths == (SLIDING_WINDOW - 1,) * 2


def random_span(geometry: KVGeometry, lengths: list[list[int]]) -> chunkkv.CompressedKV:
    """Return a span whose heads keep ``lengths[layer][head]`` random tokens."""
    shape = chunkkv.SpanShape(
        fingerprint=FINGERPRINT,
        policy="test",
        first_token=0,
        num_tokens=400,
        dtype="float32",
        layers=tuple(
            chunkkv.LayerShape(tuple(kept), own.key_dim, own.value_dim, index)
            for index, (kept, own) in enumerate(zip(lengths, geometry.layers, strict=True))
        ),
        index_lengths=tuple(sum(kept) for kept in lengths),
        has_scores=False,
    )
    span = chunkkv.CompressedKV.empty(shape)
    generator = torch.Generator().manual_seed(1)
    for layer in span.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    return span


@pytest.mark.parametrize(
    "lengths",
    [
        [[300, 300], [100, 100], [7, 7], [1, 1]],
        [[300, 20], [0, 350], [40, 41], [300, 300]],
        [[0, 0], [1, 0], [400, 0], [0, 400]],
    ],
    ids=["pyramid", "adaptive", "with empty heads"],
)
@pytest.mark.parametrize("new", [1, 5])
def test_heads_and_layers_of_different_lengths_read_what_they_keep(
    lengths: list[list[int]], new: int
) -> None:
    model = sequences_model("llama")
    geometry = kv_geometry(model)
    span = random_span(geometry, lengths)
    kv = new_kv(geometry, spans=[span])
    generator = torch.Generator().manual_seed(2)

    for index, layer in enumerate(geometry.layers):
        query = torch.randn(new, 2, 2, layer.key_dim, generator=generator)
        key = torch.randn(2, new, layer.key_dim, generator=generator)
        value = torch.randn(2, new, layer.value_dim, generator=generator)

        read = kv.attend(index, query, key, value)

        start = 0
        for head, kept in enumerate(lengths[index]):
            old = slice(start, start + kept)
            start += kept
            keys = torch.cat([span.layers[index].keys[old], key[head]])
            values = torch.cat([span.layers[index].values[old], value[head]])
            for i in range(new):
                visible = kept + i + 1
                weights = (query[i, head] @ keys[:visible].T).softmax(-1)
                torch.testing.assert_close(
                    read[i, head], weights @ values[:visible], atol=1e-5, rtol=1e-5
                )


def test_a_softcap_and_sinks_change_the_weights_as_defined() -> None:
    model = sequences_model("llama")
    geometry = kv_geometry(model)
    kv = new_kv(geometry)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(4, 2, 2, 16, generator=generator)
    key, value = (torch.randn(2, 4, 16, generator=generator) for _ in range(2))
    sinks = torch.randn(2, 2, generator=generator)

    read = kv.attend(0, query, key, value, softcap=1.5, sinks=sinks)

    for i in range(4):
        for head in range(2):
            for row in range(2):
                logits = 1.5 * torch.tanh(query[i, head, row] @ key[head, : i + 1].T / 1.5)
                weights = torch.cat([logits, sinks[head, row][None]]).softmax(-1)[:-1]
                torch.testing.assert_close(
                    read[i, head, row], weights @ value[head, : i + 1], atol=1e-5, rtol=1e-5
                )


def test_spans_that_do_not_fit_are_refused() -> None:
    geometry = kv_geometry(sequences_model("llama"))
    span = random_span(geometry, [[3, 3]] * 4)
    other = kv_geometry(sequences_model("llama", num_key_value_heads=4))

    with pytest.raises(chunkkv.MismatchError, match="KV heads"):
        new_kv(other, spans=[span])
    with pytest.raises(chunkkv.MismatchError, match="span starts at token 0"):
        new_kv(geometry, spans=[span, span])
    with pytest.raises(chunkkv.MismatchError, match="span has 4 layers, the model has 2"):
        new_kv(kv_geometry(sequences_model("llama", num_hidden_layers=2)), spans=[span])
