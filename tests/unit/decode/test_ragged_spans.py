"""Two readers of spans whose heads keep different numbers of tokens: transformers' cache, and ours.

They share the spans and nothing else: attention over a padded slab there, piece by piece here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import chunkkv
from services.decode.attention import Rows, forward, kv_geometry, use_sequences
from services.decode.sequence_kv import SequenceKV
from services.decode.tail import tail_size_bytes
from tests.models import FAMILIES, prompts, tiny_model
from tests.ragged_spans import ragged_span, random_rows

WHOLE = chunkkv.CompressionPolicy(keep_ratio=1.0, scope="head", window_size=4)
LENGTHS = [[5, 20], [9, 1], [0, 30], [17, 0]]
# Tokens of a ragged span, of one kept whole, and of another ragged one.
PIECES = (40, 30, 50)


def session(model: Any, ids: torch.Tensor, spread: Any) -> list[chunkkv.CompressedKV]:
    """Return a ragged span, a whole one behind it, and another ragged one.

    Args:
        model: Makes them.
        ids: The tokens.
        spread: Of the policy that chooses what is kept; ``None``: chosen by hand.
    """
    slides = [layer.is_sliding for layer in chunkkv.KVCache(model.config).layers]
    lengths = [own for own, is_sliding in zip(LENGTHS, slides, strict=True) if not is_sliding]
    spans: list[chunkkv.CompressedKV] = []
    start = 0
    for index, size in enumerate(PIECES):
        past = chunkkv.KVCache.from_segments(model.config, spans)
        prefilled = chunkkv.run_prefill(
            model, ids[:, start : start + size], window_size=4, past=past, prefill_chunk_tokens=17
        )
        if index == 1:
            spans.append(past.take_tail(start, fingerprint=prefilled.fingerprint))
        elif spread is not None:
            policy = chunkkv.CompressionPolicy(
                keep_ratio=0.4, scope="head", spread=spread, chunk_size=3, window_size=4
            )
            spans += chunkkv.compress(prefilled, policy)
        else:
            [whole] = chunkkv.compress(prefilled, WHOLE)
            spans.append(ragged_span(whole, random_rows(lengths, size, seed=index)))
        start += size
    return spans


@torch.inference_mode()
def engine_logits(
    model: Any, spans: list[chunkkv.CompressedKV], ids: list[int], num_pending: int
) -> torch.Tensor:
    """Return the decode engine's logits behind the pending tokens, and behind each one after."""
    geometry = kv_geometry(model)
    room = len(ids) + sum(span.num_kept_tokens for span in spans)
    memory = torch.empty(tail_size_bytes(geometry, room), dtype=torch.uint8)
    kv = SequenceKV(geometry, spans, memory, capacity=room)
    logits = []
    for new in [ids[:num_pending], *([token] for token in ids[num_pending:])]:
        positions = list(range(kv.num_tokens, kv.num_tokens + len(new)))
        logits.append(forward(model, new, positions, Rows([(kv, len(new))]), [len(new) - 1])[0])
        kv.advance(len(new))
    return torch.stack(logits)


@pytest.mark.parametrize("spread", [None, "adaptive", "pyramid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_answers_as_the_engine_does(family: str, spread: Any) -> None:
    model = tiny_model(family)
    num_pending = 3
    ids, _ = prompts(sum(PIECES) + num_pending)
    spans = session(model, ids, spread)
    with torch.inference_mode():
        output = model.generate(
            **chunkkv.generation_inputs(model, [spans], [ids[0]]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    answer = output.sequences[0, ids.shape[1] :].tolist()
    engine = tiny_model(family)
    use_sequences(engine)

    pending = ids[0, -num_pending:].tolist()
    logits = engine_logits(engine, spans, [*pending, *answer[:-1]], num_pending)

    torch.testing.assert_close(
        logits, torch.stack([row[0] for row in output.logits]), atol=2e-4, rtol=2e-4
    )
    assert logits.argmax(-1).tolist() == answer
