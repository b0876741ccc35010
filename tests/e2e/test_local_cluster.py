"""``chunkserve up``, ``status``, ``down`` and the demo, as a person runs them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.local.cluster import ClusterError, ClusterOptions, LocalCluster

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.slow]


def chunkserve(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        env={**os.environ, "CHUNKSERVE_HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def processes_of(mark: str) -> list[psutil.Process]:
    """Return the processes whose command line or environment has ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            seen = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(mark in text for text in seen):
            found.append(process)
    return found


def wait_until(what: Callable[[], bool], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder for a cluster; whatever it started must be gone afterwards."""
    yield tmp_path
    left = processes_of(str(tmp_path))
    for process in left:
        process.kill()
    assert left == []


def test_up_status_generate_down(home: Path, model_path: str) -> None:
    up = chunkserve(home, "up", "--model", model_path, "--port", "0")
    assert up.returncode == 0, up.stderr
    address = up.stdout.strip().removeprefix("ready at ")

    status = chunkserve(home, "status")
    answer = chunkserve(
        home, "generate", "What is the capital of France?", CHUNKSERVE_ADDRESS=address
    )
    second_up = chunkserve(home, "up", "--model", model_path, "--port", "0")
    down = chunkserve(home, "down")

    assert status.returncode == 0
    assert address in status.stdout
    assert answer.stdout.strip() == "The capital of France is Paris."
    assert second_up.returncode == 1
    assert f"runs already at {address}" in second_up.stderr
    assert down.stdout.strip() == "stopped"
    assert chunkserve(home, "status").returncode == 1
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0


def test_a_supervisor_that_is_killed_takes_its_services_along(home: Path, model_path: str) -> None:
    chunkserve(home, "up", "--model", model_path, "--port", "0")
    supervisor = next(
        process
        for process in processes_of(str(home))
        if "services.local.supervisor" in process.cmdline()
    )

    supervisor.kill()

    wait_until(lambda: not processes_of(str(home)), timeout_s=60)


def test_a_service_that_dies_at_the_start_is_told_with_its_last_words(home: Path) -> None:
    up = chunkserve(home, "up", "--model", str(home / "nothing"), "--port", "0")

    assert up.returncode == 1
    assert "ended with code 1" in up.stderr
    assert "cannot load the model" in up.stderr


def test_a_taken_port_is_refused_before_anything_is_started(home: Path, model_path: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with (
            pytest.raises(ClusterError, match=f"port {port} is taken"),
            LocalCluster(ClusterOptions(directory=home, model=model_path, port=port)),
        ):
            pass


def test_an_interrupted_demo_leaves_nothing_running(home: Path, model_path: str) -> None:
    # The cache holds the model already; the mark in the environment finds all processes.
    with subprocess.Popen(
        [sys.executable, "-m", "services.local.demo"],
        env={
            **os.environ,
            "TMPDIR": str(home),
            "CHUNKSERVE_CACHE": str(_cache_of(model_path, home)),
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("Question:"):
                break

        demo.send_signal(signal.SIGINT)
        rest = demo.stdout.read()

        assert demo.wait(timeout=90) == 130
        assert "nothing is left running" in rest


def _cache_of(model_path: str, home: Path) -> Path:
    """Return a cache folder that has the demo model at ``model_path``."""
    cache = home / "cache"
    cache.mkdir()
    (cache / "SmolLM2-135M-Instruct").symlink_to(model_path)
    return cache
