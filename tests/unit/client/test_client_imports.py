"""What the client and the command line pull in."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray", "redis", "chunkkv", "grpc_status", "structlog")


def loaded_by(code: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def test_client_imports_nothing_heavy():
    assert loaded_by("import chunkserve_client") == []


@pytest.mark.parametrize("module", ["services.cli", "services.cli.app"])
def test_command_line_imports_nothing_heavy(module: str):
    assert loaded_by(f"import {module}") == []


def test_command_line_imports_no_server():
    code = "import services.cli.app\nprint(*[m for m in sys.modules if m.startswith('services.')])"

    own = {name for name in loaded_by(code) if not name.startswith("services.cli")}

    assert own == set()
