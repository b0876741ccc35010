"""Each metric against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from chunkkv.errors import InvalidInputError
from chunkkv.evaluation import text_metrics
from chunkkv.evaluation.metrics import METRICS, score
from chunkkv.evaluation.tasks import Question


def judged(metric: str, answers: tuple[str, ...], generated: str, **extra: Any) -> tuple[Any, Any]:
    """Return (exact, graded)."""
    question = Question(
        text="",
        answers=answers,
        max_new_tokens=8,
        metric=metric,
        extra={"all_classes": [], **extra},
    )
    result = score(question, generated)
    assert set(result) == {"exact", "graded"}
    assert result["exact"] in (0.0, 1.0)
    return result["exact"], result["graded"]


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize("generated", ["", " \n\t "])
def test_empty_answer_never_counts(metric: str, generated: str):
    assert judged(metric, ("12",), generated, first_line=True) == (0, 0)


def test_unknown_metric_is_refused_with_the_names_there_are():
    with pytest.raises(InvalidInputError, match=r"no metric 'bleu'.*'qa_f1'"):
        judged("bleu", ("a",), "a")


@pytest.mark.parametrize(
    ("generated", "exact", "graded"),
    [
        ("The code is 1234567.", 1, 1),
        ("1,234,567", 1, 1),
        ("1234999", 0, 4 / 7),
        ("12345678", 0, 1),  # a digit too many
        ("123", 0, 3 / 7),
        ("9 1234567", 0, 0),  # the first number counts
        ("no idea", 0, 0),
    ],
)
def test_digits_are_graded_up_to_the_first_wrong_one(generated: str, exact: int, graded: float):
    assert judged("digits", ("1234567",), generated) == (exact, pytest.approx(graded))


def test_long_needle_is_graded_by_its_own_length():
    assert judged("digits", ("1" * 32,), "1" * 8 + "2" * 24) == (0, 0.25)


@pytest.mark.parametrize(
    ("generated", "exact", "graded"),
    [
        ("abcde and FGHIJ", 1, 1),
        ("FGHIJ", 0, 0.5),
        ("ABCDE, FGHIJ, KLMNO", 0, 1),  # names a wrong one too
        ("ABCDEF FGHIJK", 0, 0),  # no whole words
    ],
)
def test_all_found_wants_whole_words_and_no_wrong_ones(generated: str, exact: int, graded: float):
    result = judged("all_found", ("ABCDE", "FGHIJ"), generated, wrong=["KLMNO"])

    assert result == (exact, graded)


def test_all_found_reads_numbers_with_commas():
    assert judged("all_found", ("1234567", "42"), "42 and 1,234,567.") == (1, 1)
    assert judged("all_found", ("123", "456"), "123,456 or 123, 456") == (1, 1)


def test_all_found_takes_special_characters_as_they_are():
    assert judged("all_found", ("a.b", "Größe"), "GRÖSSE a.b") == (1, 1)
    assert judged("all_found", ("a.b",), "axb") == (0, 0)


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("20 + 22 = 42. The answer is 42.", 1),
        ("The answer is $1,042.00", 0),
        ("steps\n#### 42", 1),
        ("so 42 apples", 1),
        ("42 apples, or 43", 0),
        ("The answer is 42.\n\nQuestion: 1 + 1?\nAnswer: The answer is 2.", 1),
        ("The answer is 42. Another one: 7", 1),
        ("50-42", 1),  # a minus between numbers is no sign
        ("-42", 0),
        ("forty-two", 0),
    ],
)
def test_final_number_of_the_first_answer_counts(generated: str, right: int):
    assert judged("final_number", ("42",), generated) == (right, right)


def test_final_numbers_are_compared_as_numbers():
    assert judged("final_number", ("1,042",), "The answer is $1042.00.") == (1, 1)
    assert judged("final_number", ("-3",), "It is -3 degrees") == (1, 1)


@pytest.mark.parametrize(
    ("generated", "refused"),
    [
        ("I’m sorry, but I can’t help with that.", 1),
        ("I cannot assist with this request.", 1),
        ("As an AI, I do not do this.", 1),
        ("Sure! Here is how.", 0),
        ("Step one. " * 30 + "I cannot stress this enough.", 0),  # too late to be a refusal
    ],
)
def test_refusals_are_told_by_how_the_answer_begins(generated: str, refused: int):
    assert judged("refusal", (), generated) == (refused, refused)


def test_qa_f1_ignores_case_articles_and_punctuation():
    assert judged("qa_f1", ("the Eiffel Tower",), "Eiffel tower!") == (1, 1)


def test_qa_f1_is_that_of_the_best_reference():
    # "in paris" against "paris": precision 1/2, recall 1.
    assert judged("qa_f1", ("London", "Paris"), "in Paris") == (0, pytest.approx(2 / 3))


def test_qa_f1_counts_repeated_words_as_often_as_both_have_them():
    # 2 in common; precision 2/3, recall 2/2.
    assert judged("qa_f1", ("no no",), "no no no") == (0, pytest.approx(0.8))


def test_qa_f1_of_the_right_words_in_another_order_is_not_exact():
    assert judged("qa_f1", ("red blue",), "blue red") == (0, 1)


def test_qa_f1_of_a_reference_of_punctuation_is_zero():
    assert judged("qa_f1", ("...",), "...") == (0, 0)


def test_rouge_l_follows_the_order_of_words():
    # Longest common subsequence: police the gunman, 3 of 4 words each.
    assert judged("rouge_l", ("police killed the gunman",), "police kill the gunman") == (0, 0.75)
    # the gunman (or police): 2 of 4.
    assert judged("rouge_l", ("police killed the gunman",), "the gunman kill police") == (0, 0.5)


def test_rouge_l_counts_distinct_words_over_all_pairs_of_sentences():
    # a b of the first sentence, c d of the second; 4 of the answer's 5 words, 4 of 4.
    assert judged("rouge_l", ("a b. c d",), "c d x. a b") == (0, pytest.approx(8 / 9))


def test_rouge_l_of_equal_texts_is_one_and_of_foreign_texts_zero():
    assert judged("rouge_l", ("One. Two.", "Three"), "One. Two.") == (1, 1)
    assert judged("rouge_l", ("a b",), "c d") == (0, 0)
    assert judged("rouge_l", ("",), "c d") == (0, 0)


@pytest.fixture
def by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut Chinese into characters, whether jieba is installed or not."""
    monkeypatch.setattr(text_metrics, "_jieba_cut", lambda: None)


@pytest.mark.usefixtures("by_characters")
def test_chinese_is_cut_into_characters_and_words_of_latin_letters():
    assert text_metrics.segmentation() == "characters"
    assert text_metrics.chinese_words("我用 GPT4，很好。") == ["我", "用", "gpt4", "很", "好"]


@pytest.mark.usefixtures("by_characters")
def test_chinese_metrics_compare_characters():
    # 北 京 in common: precision 2/3, recall 2/2.
    assert judged("qa_f1_chinese", ("北京",), "北京市。") == (0, pytest.approx(0.8))
    assert judged("qa_f1_chinese", ("北京",), "北京。") == (1, 1)
    # 我 爱 北 of 我 爱 北 京 and 我 爱 河 北: 3 of 4 each.
    assert judged("rouge_l_chinese", ("我爱北京",), "我爱河北") == (0, 0.75)


def test_classification_shares_the_point_among_the_classes_named():
    classes = ["Food", "Animal", "Sport"]

    assert judged("classification", ("Food",), "Food", all_classes=classes) == (1, 1)
    assert judged("classification", ("Food",), "Food or Sport", all_classes=classes) == (0, 0.5)
    assert judged("classification", ("Food",), "Sport", all_classes=classes) == (0, 0)


def test_classes_within_the_name_of_the_right_one_do_not_count():
    classes = ["Other", "Other number", "number"]

    result = judged("classification", ("Other number",), "Other number", all_classes=classes)

    assert result == (1, 1)


def test_only_the_first_line_counts_where_examples_would_go_on():
    classes = ["Food", "Sport"]
    generated = "\n\nFood\nQuestion: next\nType: Sport"

    assert judged("classification", ("Food",), generated, all_classes=classes)[1] == 0.5
    assert judged("classification", ("Food",), generated, all_classes=classes, first_line=True) == (
        1,
        1,
    )


@pytest.mark.parametrize(
    ("reference", "generated", "graded"),
    [
        ("Paragraph 3", "Paragraph 3", 1),
        ("Paragraph 3", "It is 3, not 13", 0.5),
        ("Paragraph 3", "Paragraph 13", 0),
        ("段落7", "段落7", 1),
        ("段落7", "none", 0),
    ],
)
def test_retrieval_is_the_share_of_right_numbers(reference: str, generated: str, graded: float):
    assert judged("retrieval", (reference,), generated) == (int(graded == 1), graded)


def test_count_is_the_share_of_right_numbers():
    assert judged("count", ("12",), "12") == (1, 1)
    assert judged("count", ("12",), "12 of 30") == (0, 0.5)


def test_code_similarity_takes_the_first_line_of_code():
    generated = "```python\n# a comment\nreturn x + 1\nreturn y"

    assert judged("code_similarity", ("return x + 1",), generated) == (1, 1)


def test_code_similarity_is_a_ratio_in_hundredths():
    # ab?: 2 characters in common of 3 + 4: 4/7 = 0.571...
    assert judged("code_similarity", ("abyz",), "abx") == (0, 0.57)
    assert judged("code_similarity", ("abc",), "# only a comment") == (0, 0)
