from __future__ import annotations

import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from services.decode.detokenizer import Detokenizer

TEXTS = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("ab \n.,é中文字日本語👍🏽👩‍👩‍👧\u0301\ufffd"),
    ),
    max_size=60,
)
SLOW = settings(max_examples=150, deadline=None)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, three merges, and one special token (id 0)."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("a", "b"), ("ð", "Ł"), ("Ġ", "a")]  # the second is half of an emoji's bytes
    pieces = ["<end>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with a mark for the space, and a token for each byte (as Llama 2 and Phi-3)."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "中"]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    return byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def smollm2():
    path = os.environ.get("CHUNKSERVE_TEST_MODEL")
    if not path:
        pytest.skip("CHUNKSERVE_TEST_MODEL names no model")
    return AutoTokenizer.from_pretrained(path)


def deltas(tokenizer, token_ids, stop=()) -> tuple[list[str], str]:
    """Push tokens until a stop string; return the texts and the stop string."""
    detokenizer = Detokenizer(tokenizer, stop)
    texts = []
    for token_id in token_ids:
        texts.append(detokenizer.push(token_id))
        if detokenizer.matched_stop:
            break
    texts.append(detokenizer.finish())
    return texts, detokenizer.matched_stop


def whole(tokenizer, token_ids) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_at_first_stop(text: str, stop: list[str]) -> tuple[str, str]:
    """The obvious way: read character by character, longest stop string first."""
    for end in range(len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)], candidate
    return text, ""


@SLOW
@given(text=TEXTS)
@example(text="👩‍👩‍👧" * 20)
@example(text="\ufffd" * 40 + "é")
def test_texts_add_up_to_what_was_encoded(byte_level, text):
    texts, _ = deltas(byte_level, byte_level.encode(text))

    assert "".join(texts) == text


@SLOW
@given(token_ids=st.lists(st.integers(0, 259), max_size=120))
@example(token_ids=[200] * 60)
@example(token_ids=[258, 258, 1, 258] * 20)
def test_any_tokens_add_up_to_their_decoding(byte_level, token_ids):
    texts, _ = deltas(byte_level, token_ids)

    assert "".join(texts) == whole(byte_level, token_ids)
    for text in texts:
        text.encode()


@SLOW
@given(
    text=st.lists(st.sampled_from(list("ab 中é👍")), max_size=60).map("".join),
)
def test_byte_fallback_and_stripped_spaces_add_up(byte_fallback, text):
    ids = byte_fallback.encode(text.replace(" ", "▁"), add_special_tokens=False)

    texts, _ = deltas(byte_fallback, ids)

    assert "".join(texts) == whole(byte_fallback, ids)


def test_an_emoji_is_released_whole_with_its_last_byte(byte_level):
    ids = byte_level.encode("a👍")
    detokenizer = Detokenizer(byte_level)

    texts = [detokenizer.push(token_id) for token_id in ids]

    assert texts == ["a", *[""] * (len(ids) - 2), "👍"]
    assert detokenizer.finish() == ""


def test_special_and_unknown_tokens_have_no_text(byte_level):
    a, b = byte_level.encode("a")[0], byte_level.encode("b")[0]

    texts, _ = deltas(byte_level, [0, a, 0, 9999, b, 0])

    assert texts == ["", "a", "", "", "b", "", ""]


@SLOW
@given(
    token_ids=st.lists(st.sampled_from([0, 66, 67, 68, 257, 258, 259, 1, 2]), max_size=80),
    stop=st.lists(st.text(alphabet='abc !"', min_size=1, max_size=4), max_size=4),
)
def test_a_stop_string_ends_the_text_wherever_tokens_begin(byte_level, token_ids, stop):
    texts, matched = deltas(byte_level, token_ids, stop)

    assert ("".join(texts), matched) == cut_at_first_stop(whole(byte_level, token_ids), stop)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(byte_level):
    detokenizer = Detokenizer(byte_level, ["\n\nUser:"])

    texts = [detokenizer.push(i) for i in byte_level.encode("x\n\nUs no")]

    assert texts == ["x", "", "", "", "", "\n\nUs ", "n", "o"]


def test_what_is_held_back_is_released_at_the_end(byte_level):
    texts, matched = deltas(byte_level, byte_level.encode("yes STO"), ["STOP"])

    assert "".join(texts) == "yes STO"
    assert texts[-1] == "STO"
    assert matched == ""


def test_nothing_follows_a_stop_string(byte_level):
    detokenizer = Detokenizer(byte_level, ["b"])

    assert detokenizer.push(byte_level.encode("b")[0]) == ""
    assert detokenizer.push(byte_level.encode("c")[0]) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.matched_stop == "b"


def test_a_stop_string_inside_a_token_cuts_it(byte_level):
    ids = byte_level.encode("xab", add_special_tokens=False)
    assert len(ids) == 2

    assert deltas(byte_level, ids, ["b"]) == (["x", "a", ""], "b")


@pytest.mark.parametrize("kind", ["text", "end", "broken", "half", "emoji"])
def test_a_token_costs_the_same_after_a_long_answer(byte_level, kind):
    decoded: list[int] = []

    class Counting:
        all_special_ids = byte_level.all_special_ids

        def __len__(self) -> int:
            return len(byte_level)

        def decode(self, token_ids, **options):
            decoded.append(len(token_ids))
            return byte_level.decode(token_ids, **options)

    pattern = {
        "text": byte_level.encode("a b c "),
        "end": [0],
        "broken": [200],
        "half": byte_level.encode("👍")[:-1],
        "emoji": byte_level.encode("👍🏽"),
    }[kind]
    detokenizer = Detokenizer(Counting(), ["@@@"])
    for token_id in pattern * (3000 // len(pattern)):
        detokenizer.push(token_id)

    assert max(decoded, default=0) <= 128
    assert len(decoded) <= 3000 * 3


@pytest.mark.model
@SLOW
@given(text=TEXTS)
def test_smollm2_texts_add_up_to_what_was_encoded(smollm2, text):
    ids = smollm2.encode(text, add_special_tokens=False)

    texts, _ = deltas(smollm2, ids)

    assert "".join(texts) == whole(smollm2, ids) == smollm2.decode(ids, skip_special_tokens=True)


@pytest.mark.model
@SLOW
@given(
    token_ids=st.lists(st.integers(0, 49_151), max_size=80),
    stop=st.lists(st.text(alphabet="aeiou tn", min_size=1, max_size=3), max_size=3),
)
def test_smollm2_any_tokens_add_up_to_their_decoding(smollm2, token_ids, stop):
    texts, matched = deltas(smollm2, token_ids, stop)

    assert ("".join(texts), matched) == cut_at_first_stop(whole(smollm2, token_ids), stop)
