"""A whole cluster: the demo model, an embedded store, Ray with two decode workers, a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.local.cluster import ClusterOptions, LocalCluster


@pytest.fixture(scope="session")
def cluster(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory: Path = tmp_path_factory.mktemp("c")
    options = ClusterOptions(directory=directory, model=model_path, port=0, num_decode_workers=2)
    with LocalCluster(options) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def reference(model_path: str) -> tuple[Any, Any]:
    """The demo model and its tokenizer in plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    return model, AutoTokenizer.from_pretrained(model_path)
