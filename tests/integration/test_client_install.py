"""The client installs alone: an empty environment, `.[client]`, no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
UNWANTED = ("torch", "transformers", "ray", "redis", "structlog", "grpc_status")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh environment that holds the client extra alone."""
    root = tmp_path_factory.mktemp("client") / "venv"
    subprocess.run([sys.executable, "-m", "venv", root], check=True, timeout=120)
    install = [root / "bin" / "python", "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", REPOSITORY / "constraints.txt"]
    subprocess.run(
        [*install, *constraints, f"{REPOSITORY}[client]"],
        check=True,
        timeout=280,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return root / "bin"


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Elsewhere than in the repository, whose packages Python would find in the current folder.
    program, *args = command
    return subprocess.run(
        [environment / program, *args], capture_output=True, text=True, timeout=60, cwd=cwd
    )


@pytest.mark.slow
def test_client_imports_without_the_rest(environment: Path, tmp_path: Path):
    script = (
        "import importlib.util, chunkserve_client\n"
        f"print(*[m for m in {UNWANTED!r} if importlib.util.find_spec(m)])\n"
        "print(chunkserve_client.Client.__name__)"
    )

    done = run(environment, "python", "-c", script, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "Client"]


@pytest.mark.slow
def test_command_line_works_without_the_rest(environment: Path, tmp_path: Path):
    shown = run(environment, "chunkserve", "--help", cwd=tmp_path)
    refused = run(environment, "chunkserve", "models", "--address", "127.0.0.1:1", cwd=tmp_path)

    assert shown.returncode == 0, shown.stderr
    assert "generate" in shown.stdout
    assert refused.returncode == 1
    assert "no answer from 127.0.0.1:1" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", ["gateway", "prefill", "decode", "compress"])
def test_service_says_what_to_install(environment: Path, tmp_path: Path, command: str):
    done = run(environment, "chunkserve", command, cwd=tmp_path)

    assert done.returncode == 2
    assert "pip install 'chunkserve[services]'" in done.stderr
    assert "Traceback" not in done.stderr
