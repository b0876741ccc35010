"""How alike two texts are, as LongBench counts it: an answer against one reference, in [0, 1].

Source: https://github.com/THUDM/LongBench, ``LongBench/metrics.py``; each function says where it
deviates.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec

# As published, with one of the two double angle brackets.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕"
    "〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_NO_CHINESE_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation + _CHINESE_PUNCTUATION))


def english_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation and articles."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def chinese_words(text: str) -> list[str]:
    """Return the segments of a Chinese text in lower case, without punctuation."""
    words = (word.lower().translate(_NO_CHINESE_PUNCTUATION) for word in segments(text))
    return [joined for word in words if (joined := "".join(word.split()))]


def segments(text: str) -> list[str]:
    """Return a Chinese text cut into words by jieba, or into characters without it.

    Characters give other scores than words: usually higher ones. :func:`segmentation` says which
    it was. Runs of Latin letters and digits stay whole either way.
    """
    cut = _jieba_cut()
    return cut(text) if cut else re.findall(r"[A-Za-z0-9]+|\s+|[^A-Za-z0-9\s]", text)


def segmentation() -> str:
    """Return how Chinese is cut here: ``jieba`` or ``characters``."""
    return "jieba" if _jieba_cut() else "characters"


@cache
def _jieba_cut() -> Callable[[str], list[str]] | None:
    if find_spec("jieba") is None:
        return None
    cut: Callable[[str], list[str]] = import_module("jieba").lcut
    return cut


def f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of two bags of words; 0 if either is empty."""
    num_same = sum((Counter(answer) & Counter(reference)).values())
    if not num_same:
        return 0.0
    precision, recall = num_same / len(answer), num_same / len(reference)
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str) -> float:
    """Return the F1 of ROUGE-L over sentences, as the package ``rouge`` computes it.

    Sentences end at full stops. Each of the answer's is compared with each of the reference's;
    the distinct words of all longest common subsequences are counted against the distinct words
    of both texts. Deviation: no 1e-8 in the denominator, so that equal texts have exactly 1.
    """
    answers, references = _rouge_sentences(answer), _rouge_sentences(reference)
    common = {word for one in references for other in answers for word in _common_words(one, other)}
    if not common:
        return 0.0
    precision = len(common) / len({word for sentence in answers for word in sentence})
    recall = len(common) / len({word for sentence in references for word in sentence})
    return 2 * precision * recall / (precision + recall)


def rouge_l_chinese(answer: str, reference: str) -> float:
    """Return :func:`rouge_l` of the texts' segments."""
    return rouge_l(" ".join(segments(answer)), " ".join(segments(reference)))


def classification(answer: str, reference: str, all_classes: Sequence[str]) -> float:
    """Return 1 over the number of classes that the answer names, if the right one is among them.

    Classes whose name is a part of the right one's do not count. Deviation: the published code
    removes from the list it walks through, so of two such classes in a row it leaves the second.
    """
    named = [name for name in all_classes if name in answer]
    counted = [name for name in named if name == reference or name not in reference]
    return 1 / len(counted) if reference in counted else 0.0


def share_of_numbers(answer: str, number: str) -> float:
    """Return which share of the numbers in the answer is the right one; 0 if there are none."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str) -> float:
    """Return how alike the answer's first line of code is, in whole hundredths.

    Lines with a backquote, ``#`` or ``//`` are no code. The ratio is difflib's, and so that of
    ``fuzzywuzzy`` without python-Levenshtein; with it, fuzzywuzzy gives slightly other values.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((x for x in lines if not re.search(r"`|#|//", x)), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def _rouge_sentences(text: str) -> list[list[str]]:
    # White space between two full stops is one empty word in the package, and so it is here.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_words(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Return a longest common subsequence, the one that is found from the end.

    Where both ways are equally long, the last word of ``other`` is dropped first.
    """
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one):
        above, row = table[i], table[i + 1]
        for j, candidate in enumerate(other):
            row[j + 1] = above[j] + 1 if word == candidate else max(above[j + 1], row[j])
    i, j = len(one), len(other)
    words = []
    while i and j:
        if one[i - 1] == other[j - 1]:
            words.append(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]
