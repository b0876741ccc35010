"""Questions that no scorer saw, asked of a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkkv
from chunkkv.evaluation.haystack import Haystack, graded, haystack

MAX_NEW_TOKENS = 16
NUM_DOCUMENTS = 4
POLICIES = [chunkkv.preset(name, keep_ratio=0.2) for name in ("fast", "durable")]


def answers(model: Any, tokenizer: Any, sample: Haystack) -> list[list[str]]:
    """Return the policies' answers to each question; none of them is seen by the compression."""
    before, after = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{sample.text}\n\n<question>"}],
        add_generation_prompt=True,
        tokenize=False,
    ).split("<question>")
    document = tokenizer(before, return_tensors="pt")["input_ids"]
    prefilled = chunkkv.run_prefill(model, document, window_size=16)
    prefilled = chunkkv.repeat(model, prefilled, document, ["recall"])
    kept = [chunkkv.compress(prefilled, policy) for policy in POLICIES]
    texts = []
    for needle in sample.needles:
        asked = tokenizer(needle.question + after, return_tensors="pt")["input_ids"]
        ids = torch.cat([document, asked], dim=1)
        inputs = chunkkv.generation_inputs(model, kept, [ids[0]] * len(kept))
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.model
@pytest.mark.slow
def test_durable_keeps_needles_that_fast_loses_without_their_question(model_path: str):
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found = torch.zeros(len(POLICIES), dtype=torch.int64)

    for seed in range(NUM_DOCUMENTS):
        sample = haystack(tokenizer, num_tokens=500, seed=seed)
        for needle, texts in zip(sample.needles, answers(model, tokenizer, sample), strict=True):
            found += torch.tensor([graded(needle.answer, text) == 1 for text in texts])

    fast, durable = found.tolist()
    assert durable == NUM_DOCUMENTS
    assert fast <= NUM_DOCUMENTS // 2
