"""The compression stage: score, select, gather. A cache in, a compressed span out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chunkkv.compressed import CompressedKV, LayerKV, LayerShape, SpanShape
from chunkkv.policy import CompressionPolicy
from chunkkv.prefilled import Prefilled
from chunkkv.scoring import layer_scores
from chunkkv.selection import Selection, scored_layers, select


@torch.no_grad()
def compress(prefilled: Prefilled, policy: CompressionPolicy) -> list[CompressedKV]:
    """Return what ``policy`` keeps of each row's span.

    The prefix, if there is one, is neither scored nor compressed again.

    Raises:
        InvalidInputError: The prefill lacks what the policy's scorer needs, or the scores are not
            finite.
    """
    full = list(prefilled.cache.full_layers)
    scores = _scores(prefilled, policy, full)  # (batch, scored layers, num_kv_heads, longest span)
    return [
        _compress_row(prefilled, policy, full, row, scores[row, ..., -num_tokens:])
        for row, num_tokens in enumerate(prefilled.num_tokens)
    ]


def _scores(prefilled: Prefilled, policy: CompressionPolicy, full: list[int]) -> torch.Tensor:
    scored = [full[i] for i in scored_layers(policy, len(full))]
    if not scored:
        return torch.zeros(len(prefilled.num_tokens), 0, 1, prefilled.longest)
    return torch.stack([layer_scores(prefilled, policy, index) for index in scored], dim=1)


def _compress_row(
    prefilled: Prefilled,
    policy: CompressionPolicy,
    full: list[int],
    row: int,
    scores: torch.Tensor,
) -> CompressedKV:
    """Compress one row; ``scores`` is ``(scored layers, num_kv_heads, num_tokens)``."""
    num_tokens = prefilled.num_tokens[row]
    selection = Selection((), ())
    if full:
        ends = prefilled.sentence_ends
        selection = select(
            scores,
            policy,
            num_layers=len(full),
            sentence_ends=None if ends is None else ends[row, -num_tokens:],
        )
    shape = _shape(prefilled, policy, full, row, selection)
    span = CompressedKV.empty(shape, device=prefilled.cache.layers[0].keys.device)
    written: set[int] = set()
    for index, (layer, out) in enumerate(zip(prefilled.cache.layers, span.layers, strict=True)):
        keys, values = layer.keys[row], layer.values[row]
        if out.is_sliding:
            _copy_sliding(keys, values, out, end=prefilled.first_token + num_tokens)
            continue
        ordinal = full.index(index)
        rows = selection.lists[selection.list_of_layer[ordinal]]  # a row, or one for each head
        _gather(keys, rows, keys.shape[1] - num_tokens, out.keys)
        _gather(values, rows, values.shape[1] - num_tokens, out.values)
        which = shape.layers[index].index_list
        if which not in written:
            written.add(which)
            shared = _list_scores(scores, policy, selection.list_of_layer[ordinal])
            out.positions.copy_(torch.cat(rows) + prefilled.first_token)
            _scores_of(out).copy_(
                torch.cat([own[row] for own, row in zip(shared, rows, strict=True)])
            )
    return span


def _shape(
    prefilled: Prefilled,
    policy: CompressionPolicy,
    full: list[int],
    row: int,
    selection: Selection,
) -> SpanShape:
    lists = [sum(map(len, rows)) for rows in selection.lists]
    sliding_lists: dict[int, int] = {}  # sliding layers that hold equally many tokens share a list
    layers = []
    for index, layer in enumerate(prefilled.cache.layers):
        num_heads, held, key_dim = layer.keys.shape[1:]
        if index in full:
            which = selection.list_of_layer[full.index(index)]
            rows = selection.lists[which]
            lengths = (
                tuple(map(len, rows)) if len(rows) == num_heads else (len(rows[0]),) * num_heads
            )
        else:
            kept = min(held, prefilled.first_token + prefilled.num_tokens[row])
            which = sliding_lists.setdefault(kept, len(lists))
            lists[which:] = [kept]
            lengths = (kept,) * num_heads
        layers.append(
            LayerShape(lengths, key_dim, layer.values.shape[-1], which, index not in full)
        )
    return SpanShape(
        fingerprint=prefilled.fingerprint,
        policy=policy.canonical(),
        first_token=prefilled.first_token,
        num_tokens=prefilled.num_tokens[row],
        dtype=str(prefilled.cache.layers[0].keys.dtype).removeprefix("torch."),
        layers=tuple(layers),
        index_lengths=tuple(lists),
        has_scores=True,
        precision=policy.precision,
        merge_layers=policy.merge_layers,
    )


def _list_scores(scores: torch.Tensor, policy: CompressionPolicy, which: int) -> torch.Tensor:
    """Return the scores that list ``which`` was chosen by, ``(lists, seq_len)``."""
    if policy.scope == "head":
        return scores[which]
    if policy.scope == "global":
        return scores.sum(dim=(0, 1))[None]
    return scores[which].sum(dim=0, keepdim=True)


def _scores_of(out: LayerKV) -> torch.Tensor:
    assert out.scores is not None  # spans that this module makes have them
    return out.scores


def _gather(
    source: torch.Tensor, rows: Sequence[torch.Tensor], start: int, out: torch.Tensor
) -> None:
    """Copy ``source[h, start + rows[h or 0]]`` into ``out``, head after head."""
    num_heads, _, dim = source.shape
    if len(rows) == 1:
        torch.index_select(source, 1, rows[0] + start, out=out.view(num_heads, -1, dim))
        return
    for head, part in enumerate(torch.split(out, [len(row) for row in rows])):
        torch.index_select(source[head], 0, rows[head] + start, out=part)


def _copy_sliding(keys: torch.Tensor, values: torch.Tensor, out: LayerKV, *, end: int) -> None:
    held = out.lengths[0]
    out.keys.view(keys.shape[0], held, -1).copy_(keys[:, keys.shape[1] - held :])
    out.values.view(values.shape[0], held, -1).copy_(values[:, values.shape[1] - held :])
    torch.arange(end - held, end, out=out.positions)
    _scores_of(out).zero_()
