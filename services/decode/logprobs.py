"""How likely the model found a token, and which ones it found likelier.

By the log-softmax of its logits as they are: before bias, penalties, temperature and filters, so
that the numbers say what the model thinks and not how it was steered, and compare between requests
(what OpenAI documents and vLLM calls ``raw_logprobs``). Knows nothing of sampling.
"""

from __future__ import annotations

import torch

from chunkserve.v1 import types_pb2


def token_logprob(logits: torch.Tensor, token_id: int, num_top: int) -> types_pb2.TokenLogprob:
    """Return the log-probability of a token and of the likeliest ones.

    Args:
        logits: ``(vocab_size,)`` of the model, any float dtype.
        token_id: The token that was chosen.
        num_top: Alternatives, at least 0; the vocabulary may have fewer.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    top = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return types_pb2.TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs[token_id]),
        top_logprobs=[
            types_pb2.TopLogprob(token_id=top_id, logprob=logprob)
            for top_id, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    )
