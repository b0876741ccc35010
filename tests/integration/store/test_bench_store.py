"""The benchmark runs; what it measures is for people to read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]


def test_the_benchmark_prints_a_table_and_writes_json(tmp_path: Path):
    out = tmp_path / "store.json"
    command = [sys.executable, "-m", "tests.benchmarks.bench_store"]

    run = subprocess.run(
        [*command, "--parts", "2", "--rounds", "1", "--json", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    results = {result["name"]: result for result in json.loads(out.read_text())}
    assert {"raw read", "fetch", "fetch + verify", "raw write", "put"} <= set(results)
    for name, result in results.items():
        assert name in run.stdout
        assert result["mib_per_s"] > 0
