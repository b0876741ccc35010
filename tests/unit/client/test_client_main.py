"""The process around the command tree: missing packages, faults, Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(*args: str, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys\n{before}\nfrom services.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )


def absent(package: str) -> str:
    return f"sys.modules[{package!r}] = None"


@pytest.mark.parametrize("package", ["typer", "grpc", "google.protobuf"])
def test_missing_client_package_names_the_extra(package: str):
    done = run("models", before=absent(package))

    assert done.returncode == 2
    assert "pip install 'chunkserve[client]'" in done.stderr
    assert repr(package.partition(".")[0]) in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_service_package_names_the_extra():
    done = run("decode", before=absent("pydantic_settings"))

    assert done.returncode == 2
    assert "'pydantic_settings', which is not installed" in done.stderr
    assert "pip install 'chunkserve[services]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["gateway", "prefill", "decode", "compress"])
def test_command_runs_its_service(command: str):
    service = f"services.{command}.__main__"
    before = (
        "import types\n"
        f"service = types.ModuleType({service!r})\n"
        f"service.main = lambda: print('running', {command!r})\n"
        f"sys.modules[{service!r}] = service"
    )

    done = run(command, before=before)

    assert (done.returncode, done.stdout) == (0, f"running {command}\n")


def test_missing_module_of_our_own_is_a_fault_and_not_an_extra():
    done = run("gateway", before=absent("services.gateway.__main__"))

    assert done.returncode == 1
    assert "a fault of chunkserve" in done.stderr
    assert "pip" not in done.stderr


FAULT = """
import types
service = types.ModuleType("services.gateway.__main__")
def fail(): raise RuntimeError("two\\nlines")
service.main = fail
sys.modules["services.gateway.__main__"] = service
"""


def test_fault_is_one_line():
    done = run("gateway", before=FAULT)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: RuntimeError: two lines")


def test_fault_shows_where_on_request():
    done = run("gateway", before=FAULT, CHUNKSERVE_DEBUG="1")

    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_interrupt_during_import_is_quiet():
    before = (
        "import services.cli\n"
        "def load(*args, **kwargs): raise KeyboardInterrupt\n"
        "services.cli.load = load"
    )

    done = run("models", before=before)

    assert (done.returncode, done.stderr) == (130, "")


def test_output_survives_a_narrow_encoding():
    done = run("generate", "--help", PYTHONIOENCODING="ascii")

    assert done.returncode == 0
    assert "--keep-ratio" in done.stdout
