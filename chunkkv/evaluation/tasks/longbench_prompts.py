"""What each dataset of LongBench asks, how long an answer may be, and how it is judged.

The prompts have the structure of the published ones: what stands before the context, what after
it, how the answer is to look. They are not word for word the same; ``LongBenchTask.prompts_file``
takes the published file where that matters.

Source: https://arxiv.org/abs/2308.14508; lengths from ``config/dataset2maxlen.json``, metrics from
``eval.py`` of https://github.com/THUDM/LongBench.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Spec:
    """One dataset.

    Attributes:
        before: Text before the context.
        after: Text after the context; ``{input}`` is the record's question.
        max_new_tokens: Of the answer.
        metric: Its name.
        as_chat: Not where the context is a list of examples or code to continue.
        first_line: Whether only the first line of an answer is judged.
    """

    before: str
    after: str
    max_new_tokens: int
    metric: str
    as_chat: bool = True
    first_line: bool = False


_SHORT = "as briefly as possible, in a single phrase if you can, and explain nothing"
_PASSAGES = (
    "Use the passages to answer the question. Reply with the answer alone and no other words.\n\n"
)
_QASPER = (
    "Answer the question about the article as briefly as possible, in a single phrase or sentence. "
    'If the article does not answer it, write "unanswerable". If it is a yes/no question, answer '
    '"yes", "no" or "unanswerable". Explain nothing.'
)
_COUNT = "How many different paragraphs are there once the repeated ones are taken out?"

_MULTI_DOCUMENT = Spec(
    f"{_PASSAGES}These are the passages.\n",
    f"\n\n{_PASSAGES}Question: {{input}}\nAnswer:",
    32,
    "qa_f1",
)
_CODE = "Complete the following code.\n"

SPECS: Final[Mapping[str, Spec]] = {
    "narrativeqa": Spec(
        "Below is a story, a novel or the script of a film, and a question about it. Answer the "
        f"question {_SHORT}.\n\nStory: ",
        f"\n\nAnswer the question about the story {_SHORT}.\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "qasper": Spec(
        f"Below is a scientific article and a question. {_QASPER}\n\nArticle: ",
        f"\n\n{_QASPER}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "qa_f1",
    ),
    "multifieldqa_en": Spec(
        "Read this text and give a brief answer.\n\n",
        "\n\nAnswer the question about the text above. Reply with the answer alone and no other "
        "words.\n\nQuestion: {input}\nAnswer:",
        64,
        "qa_f1",
    ),
    "multifieldqa_zh": Spec(
        "请阅读下面的文字，并用中文简短作答：\n\n",
        "\n\n请根据上面的文字回答问题，只给出答案，不要写其他内容。\n\n问题：{input}\n回答：",
        64,
        "qa_f1_chinese",
    ),
    "hotpotqa": _MULTI_DOCUMENT,
    "2wikimqa": _MULTI_DOCUMENT,
    "musique": _MULTI_DOCUMENT,
    "dureader": Spec(
        "请根据给出的文章回答问题。\n\n文章：",
        "\n\n请根据上面的文章回答下列问题。\n\n问题：{input}\n回答：",
        128,
        "rouge_l_chinese",
    ),
    "gov_report": Spec(
        "Below is a report of a government agency. Summarize it on one page.\n\nReport:\n",
        "\n\nSummarize the report on one page.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": Spec(
        "Below is the transcript of a meeting and a query, which is a question or an instruction. "
        "Answer it in one or several sentences.\n\nTranscript:\n",
        "\n\nAnswer the query about the meeting in one or several sentences.\n\n"
        "Query: {input}\nAnswer:",
        512,
        "rouge_l",
    ),
    "multi_news": Spec(
        "Below are several news articles. Summarize all of them on one page.\n\nNews:\n",
        "\n\nSummarize all the news on one page.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "vcsum": Spec(
        "下面是一段会议记录，请阅读后写一段总结，概括会议内容。\n会议记录：\n",
        "\n\n会议总结：",
        512,
        "rouge_l_chinese",
    ),
    "trec": Spec(
        "Say which type the last question has. Examples of questions and their types come "
        "first.\n\n",
        "\n{input}",
        64,
        "classification",
        as_chat=False,
        first_line=True,
    ),
    "triviaqa": Spec(
        "Use the passage to answer the question. Reply with the answer alone and no other words. "
        "Some examples come first.\n\n",
        "\n\n{input}",
        32,
        "qa_f1",
        as_chat=False,
        first_line=True,
    ),
    "samsum": Spec(
        "Summarize the dialogue in a few short sentences. Some examples come first.\n\n",
        "\n\n{input}",
        128,
        "rouge_l",
        as_chat=False,
        first_line=True,
    ),
    "lsht": Spec(
        "请判断新闻属于哪个类别，先看一些例子。\n\n",
        "\n{input}",
        64,
        "classification",
        as_chat=False,
        first_line=True,
    ),
    "passage_count": Spec(
        f"Below are paragraphs from Wikipedia, some of them more than once. {_COUNT}\n\n",
        f"\n\n{_COUNT} Reply with the number alone, such as 1, 2 or 3.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": Spec(
        "Below are 30 paragraphs from Wikipedia and an abstract. Say which paragraph the abstract "
        "belongs to.\n\n",
        "\n\nThis is the abstract.\n\n{input}\n\nGive the number of the paragraph that the "
        'abstract belongs to, in the form "Paragraph 1", "Paragraph 2" and so on.\n\n'
        "The answer is: ",
        32,
        "retrieval",
    ),
    "passage_retrieval_zh": Spec(
        "下面有若干段落，以及其中一段的摘要。请判断摘要来自哪一段。\n\n",
        "\n\n这是摘要\n\n{input}\n\n请写出该段落的编号，格式为“段落1”、“段落2”等。\n\n答案是：",
        32,
        "retrieval",
    ),
    "lcc": Spec(_CODE, "Next line of code:\n", 64, "code_similarity", as_chat=False),
    "repobench-p": Spec(_CODE, "{input}Next line of code:\n", 64, "code_similarity", as_chat=False),
}
