"""LongBench: 21 datasets of questions, summaries, examples and code over long texts.

Source: https://arxiv.org/abs/2308.14508 (version 1).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from chunkkv.errors import DatasetError, InvalidInputError
from chunkkv.evaluation.tasks.base import Question, Sample
from chunkkv.evaluation.tasks.files import (
    Record,
    check_records,
    drawn,
    json_objects,
    read_jsonl,
)
from chunkkv.evaluation.tasks.longbench_prompts import SPECS, Spec
from chunkkv.evaluation.text_metrics import segmentation

DATASETS: Final = tuple(SPECS)
_REPO: Final = "THUDM/LongBench"
_FIELDS: Final[dict[str, type]] = {"input": str, "context": str, "answers": list}


@dataclass(frozen=True, slots=True)
class LongBenchTask:
    """One dataset of LongBench.

    Attributes:
        dataset: One of ``DATASETS``; with ``_e`` its part of LongBench-E.
        folder: With ``<dataset>.jsonl``, or ``data/<dataset>.jsonl``, as the published data.zip
            unpacks. Without a folder data.zip is fetched from the Hugging Face hub, once.
        max_prompt_tokens: Prompts with more lose their middle, as in LongBench, so that as many
            tokens stay at the beginning as at the end; a chat template comes on top. None cuts
            nothing.
        prompts_file: A JSON object from dataset to prompt with ``{context}`` and ``{input}``, such
            as the published ``config/dataset2prompt.json``; ours if None.
    """

    dataset: str
    folder: Path | None = None
    max_prompt_tokens: int | None = None
    prompts_file: Path | None = None

    def __post_init__(self) -> None:
        if self._plain_name not in SPECS:
            raise InvalidInputError(
                f"LongBench has no dataset {self.dataset!r}; it has {', '.join(DATASETS)}"
            )
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise InvalidInputError(f"max_prompt_tokens={self.max_prompt_tokens}; at least 1")

    @property
    def name(self) -> str:
        return f"longbench/{self.dataset}"

    def samples(self, tokenizer: Any, *, seed: int, num_samples: int) -> Iterator[Sample]:
        """See ``Task.samples``."""
        spec = SPECS[self._plain_name]
        before, after = self._prompt(spec)
        for index, record in drawn(self._records(), seed=seed, count=num_samples):
            question = after.lstrip("\n")
            context = before + record["context"] + after[: len(after) - len(question)]
            # Not str.format: prompts may have other braces.
            question = question.replace("{input}", record["input"])
            if self.max_prompt_tokens is not None:
                context, question = cut_middle(
                    tokenizer, context, question, max_tokens=self.max_prompt_tokens
                )
            yield Sample(
                task=self.name,
                sample_id=f"{self.name}/{record.get('_id', index)}/max={self.max_prompt_tokens}",
                context=context,
                questions=(self._question(spec, question, record),),
                as_chat=spec.as_chat,
            )

    @property
    def _plain_name(self) -> str:
        return self.dataset.removesuffix("_e")

    def _records(self) -> list[Record]:
        fields: dict[str, type] = dict(_FIELDS)
        if SPECS[self._plain_name].metric == "classification":
            fields["all_classes"] = list
        if self.folder is None:
            return _from_hub(self.dataset, fields)
        paths = [
            self.folder / f"{self.dataset}.jsonl",
            self.folder / "data" / f"{self.dataset}.jsonl",
        ]
        path = next((path for path in paths if path.is_file()), paths[0])
        return read_jsonl(
            path, fields, source=f"data.zip of https://huggingface.co/datasets/{_REPO}"
        )

    def _prompt(self, spec: Spec) -> tuple[str, str]:
        """Return what stands before the context, and what after it with ``{input}`` in it."""
        before, after = spec.before, spec.after
        if self.prompts_file is not None:
            before, after = _published_prompt(self.prompts_file, self._plain_name)
        return before, after

    def _question(self, spec: Spec, text: str, record: Record) -> Question:
        extra: dict[str, Any] = {"num_words": record.get("length"), "first_line": spec.first_line}
        if spec.metric == "classification":
            extra["all_classes"] = record["all_classes"]
        if spec.metric.endswith("_chinese"):
            extra["segmentation"] = segmentation()
        return Question(
            text=text,
            answers=tuple(record["answers"]),
            max_new_tokens=spec.max_new_tokens,
            metric=spec.metric,
            extra=extra,
        )


def cut_middle(tokenizer: Any, context: str, question: str, *, max_tokens: int) -> tuple[str, str]:
    """Return both without the middle of the prompt that they make, if that is too long.

    Normally the middle lies in the context; of a question longer than half the prompt (code to
    continue) its beginning goes too.

    Args:
        tokenizer: Counts, and decodes what stays.
        context: Before the question.
        question: After the context.
        max_tokens: Of both together; an odd one stays unused, as in LongBench.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, question)]
    num_context, total = len(ids[0]), sum(map(len, ids))
    half = max_tokens // 2
    if total <= max_tokens:
        return context, question

    def kept(part: list[int], first: int) -> str:
        """Return a part that begins at token ``first`` without the tokens half to total-half."""
        start = min(max(half - first, 0), len(part))
        end = min(max(total - half - first, 0), len(part))
        pieces = (part[:start], part[end:])
        return "".join(tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces)

    return (
        kept(ids[0], 0),
        kept(ids[1], num_context) if total - half > num_context else question,
    )


def _published_prompt(path: Path, dataset: str) -> tuple[str, str]:
    if not path.is_file():
        raise DatasetError(f"{path} is not there; LongBench publishes config/dataset2prompt.json")
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))[dataset]
        before, after = prompt.split("{context}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path}: no prompt for {dataset!r} with {{context}} in it once"
        ) from error
    return before, after


def _from_hub(dataset: str, fields: dict[str, type]) -> list[Record]:
    # A file of the repository, not ``datasets``: LongBench is published with a loading script,
    # which that package no longer runs.
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(_REPO, "data.zip", repo_type="dataset")
        with zipfile.ZipFile(path) as archive, archive.open(f"data/{dataset}.jsonl") as raw:
            lines = io.TextIOWrapper(raw, encoding="utf-8")
            return check_records(dataset, json_objects(dataset, lines), fields)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{dataset} could not be fetched from https://huggingface.co/datasets/{_REPO} "
            f"({error}); without a network, unpack its data.zip and name the folder, which then "
            f"has data/{dataset}.jsonl"
        ) from error
