"""LongBench from files in its published format."""

from __future__ import annotations

import json
import shutil
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from chunkkv.errors import DatasetError, InvalidInputError
from chunkkv.evaluation.metrics import METRICS, score
from chunkkv.evaluation.tasks import LongBenchTask
from chunkkv.evaluation.tasks.longbench import DATASETS, cut_middle
from chunkkv.evaluation.tasks.longbench_prompts import SPECS
from tests.unit.evaluation.words import WordTokenizer


@pytest.fixture
def folder(data: Path) -> Path:
    return data / "longbench"


def samples(task: LongBenchTask, *, seed: int = 0, count: int = 10) -> list[Any]:
    return list(task.samples(WordTokenizer(), seed=seed, num_samples=count))


def test_all_21_datasets_have_a_prompt_a_length_and_a_metric():
    assert len(DATASETS) == 21
    for name, spec in SPECS.items():
        assert spec.metric in METRICS
        assert spec.max_new_tokens in (32, 64, 128, 512)
        assert spec.after.count("{input}") <= 1
        # Summaries, counting and code to continue ask nothing of their own.
        silent = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
        assert ("{input}" in spec.after) == (name not in silent)


def test_record_becomes_context_and_question(folder: Path):
    found = samples(LongBenchTask("hotpotqa", folder))
    [sample] = [s for s in found if "hotpotqa-0" in s.sample_id]
    [question] = sample.questions

    assert len(found) == 3
    assert sample.task == "longbench/hotpotqa"
    assert sample.as_chat
    assert sample.answer_prefix == ""
    assert "Velm lies on the river Orra.\n\n" in sample.context
    assert "Ida Lund was born?" not in sample.context
    assert question.text.endswith(
        "Question: Which river runs through the town where Ida Lund was born?\nAnswer:"
    )
    assert question.answers == ("Orra", "the river Orra")
    assert question.extra["num_words"] == 16
    assert score(question, "Orra.") == {"exact": 1, "graded": 1}


def test_seed_chooses_records_and_more_only_add(folder: Path):
    task = LongBenchTask("hotpotqa", folder)

    orders = {tuple(s.sample_id for s in samples(task, seed=seed)) for seed in range(8)}

    assert len(orders) > 1
    assert samples(task, seed=3, count=2) == samples(task, seed=3)[:2]
    assert samples(task, count=0) == []


def test_examples_are_continued_without_a_chat_template_and_braces_stay(folder: Path):
    [sample] = samples(LongBenchTask("trec", folder))
    [question] = sample.questions

    assert not sample.as_chat
    assert question.text == "Question: What eats {reeds}?\nType:"
    assert question.extra["all_classes"] == ["Person", "Place", "Animal"]
    assert score(question, " Animal\nQuestion: Who?\nType: Person") == {"exact": 1, "graded": 1}


def test_code_is_context(folder: Path):
    [sample] = samples(LongBenchTask("lcc", folder))

    assert sample.context.endswith("    total = {a: b}\n")
    assert score(sample.questions[0], "    return a + b\n\n") == {"exact": 1, "graded": 1}


def test_chinese_says_how_it_was_cut(folder: Path):
    [sample] = samples(LongBenchTask("multifieldqa_zh", folder))
    [question] = sample.questions

    assert question.extra["segmentation"] in ("jieba", "characters")
    assert score(question, "1911年。") == {"exact": 1, "graded": 1}


def test_data_folder_of_the_archive_and_longbench_e_are_found(folder: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    shutil.copy(folder / "hotpotqa.jsonl", tmp_path / "data" / "hotpotqa_e.jsonl")

    found = samples(LongBenchTask("hotpotqa_e", tmp_path))

    assert [s.task for s in found] == ["longbench/hotpotqa_e"] * 3


def test_published_prompts_can_be_used(folder: Path, tmp_path: Path):
    path = tmp_path / "dataset2prompt.json"
    path.write_text(json.dumps({"hotpotqa": "Read {this}.\n{context}\n\nQ: {input}\nA:"}))

    [sample] = samples(LongBenchTask("hotpotqa", folder, prompts_file=path), count=1)

    assert sample.context.startswith("Read {this}.\nPassage 1:")
    assert sample.context.endswith("\n\n")
    assert sample.questions[0].text.startswith("Q: W")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"hotpotqa": "{input}"}'])
def test_prompts_without_one_for_the_dataset_are_refused(
    folder: Path, tmp_path: Path, content: str
):
    path = tmp_path / "prompts.json"
    path.write_text(content)

    with pytest.raises(DatasetError, match=r"no prompt for 'hotpotqa' with \{context\}"):
        samples(LongBenchTask("hotpotqa", folder, prompts_file=path))
    with pytest.raises(DatasetError, match=r"dataset2prompt\.json"):
        samples(LongBenchTask("hotpotqa", folder, prompts_file=tmp_path / "none.json"))


def test_long_prompts_lose_their_middle(folder: Path):
    [whole] = samples(LongBenchTask("hotpotqa", folder), count=1)

    [cut] = samples(LongBenchTask("hotpotqa", folder, max_prompt_tokens=60), count=1)

    assert cut.questions == whole.questions
    words = (whole.context + whole.questions[0].text).split()
    # The line breaks between context and question are a token as well.
    assert (cut.context + cut.questions[0].text).split() == words[:30] + words[-29:]
    assert cut.sample_id != whole.sample_id


@pytest.mark.parametrize("num_context", [1, 4, 5, 6, 9, 19])
def test_cut_is_that_of_the_whole_prompt(tokenizer: WordTokenizer, num_context: int):
    words = [f" w{i}" for i in range(20)]

    context, question = cut_middle(
        tokenizer, "".join(words[:num_context]), "".join(words[num_context:]), max_tokens=11
    )

    assert context + question == "".join(words[:5] + words[-5:])
    assert set(context.split()) <= {word.strip() for word in words[:num_context]}


def test_short_prompts_stay_whole(tokenizer: WordTokenizer):
    assert cut_middle(tokenizer, "a b", " c", max_tokens=3) == ("a b", " c")


def test_unknown_dataset_is_refused():
    with pytest.raises(InvalidInputError, match=r"no dataset 'squad'.*narrativeqa, qasper"):
        LongBenchTask("squad")


def test_missing_file_says_where_it_comes_from(tmp_path: Path):
    with pytest.raises(DatasetError, match=r"qasper\.jsonl is not there.*data\.zip of https://"):
        samples(LongBenchTask("qasper", tmp_path))


def test_classes_must_be_there_where_they_are_needed(folder: Path, tmp_path: Path):
    shutil.copy(folder / "hotpotqa.jsonl", tmp_path / "trec.jsonl")

    with pytest.raises(DatasetError, match="line 1: field 'all_classes' is NoneType, not list"):
        samples(LongBenchTask("trec", tmp_path))


def hub(download: Any) -> types.ModuleType:
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download  # type: ignore[attr-defined]
    return module


def test_without_a_folder_the_archive_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.write(folder / "trec.jsonl", "data/trec.jsonl")
    asked = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(archive)

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(download))

    assert samples(LongBenchTask("trec")) == samples(LongBenchTask("trec", folder))
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]
    with pytest.raises(DatasetError, match="lcc could not be fetched"):
        samples(LongBenchTask("lcc"))


def test_without_a_network_the_error_names_the_folder_to_make(monkeypatch: pytest.MonkeyPatch):
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(download))

    with pytest.raises(DatasetError, match=r"no route.*unpack its data\.zip.*data/lcc\.jsonl"):
        samples(LongBenchTask("lcc"))


def test_prompts_cut_to_nothing_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="max_prompt_tokens=0; at least 1"):
        LongBenchTask("qasper", max_prompt_tokens=0)
