"""Selection as Algorithms 1 and 2 of ChunkKV say it, token by token: slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

from chunkkv import CompressionPolicy

Scores = Sequence[float]


def slow_positions(
    scores: Scores, budget: int, *, unit_tokens: int, window_size: int, sink_tokens: int
) -> list[int]:
    """Return the positions that one list keeps."""
    num_tokens = len(scores)
    budget = min(budget, num_tokens)
    window = [p for p in range(num_tokens) if p >= num_tokens - window_size]
    sink = [p for p in range(num_tokens) if p < sink_tokens and p not in window]
    kept = (list(reversed(window)) + sink)[:budget]

    chunks = []
    for start in range(0, num_tokens, unit_tokens):
        stop = min(start + unit_tokens, num_tokens)
        chunks.append([p for p in range(start, stop) if p not in window and p not in sink])
    # Python's sort is stable: of equals, the earlier stays in front.
    chunks.sort(key=lambda chunk: -sum(scores[p] for p in chunk))
    for chunk in chunks:
        room = budget - len(kept)
        if len(chunk) > room:
            kept += sorted(chunk, key=lambda p: -scores[p])[:room]
            break
        kept += chunk
    return sorted(kept)


def slow_select(
    scores: Sequence[Sequence[Scores]], policy: CompressionPolicy
) -> list[list[list[int]]]:
    """Return the positions that each KV head of each layer keeps.

    Args:
        scores: By layer, by KV head, by token: of all layers.
    """
    num_layers, num_tokens = len(scores), len(scores[0][0])

    def positions(voters: Sequence[Scores]) -> list[int]:
        return slow_positions(
            [sum(voter[p] for voter in voters) for p in range(num_tokens)],
            policy.budget(num_tokens),
            unit_tokens=policy.chunk_size if policy.unit == "chunk" else 1,
            window_size=policy.window_size,
            sink_tokens=policy.sink_tokens,
        )

    kept = []
    for layer in range(num_layers):
        if policy.scope == "head":
            kept.append([positions([head]) for head in scores[layer]])
            continue
        if policy.scope == "layer":
            shared = positions(scores[layer])
        elif policy.scope == "group":
            shared = positions(scores[layer - layer % policy.reuse_interval])
        else:
            shared = positions([head for heads in scores for head in heads])
        kept.append([shared] * len(scores[layer]))
    return kept
