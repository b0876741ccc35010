"""Fixtures of the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.words import WordTokenizer


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def data() -> Path:
    """Folder of a few records in each published format."""
    return Path(__file__).parent / "data"
