"""The process behind ``chunkserve up``: owns a local cluster until it is told to stop.

Its state is one JSON file, replaced atomically, so that ``up``, ``down`` and ``status`` agree.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from services.local.cluster import ClusterError, ClusterOptions, LocalCluster
from services.local.processes import end_all
from services.store.embedded import EmbeddedStoreError

_STATE_FILE: Final = "cluster.json"
_POLL_S: Final = 0.1
_DOWN_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What is known of a cluster.

    Attributes:
        pid: Of the supervisor.
        started: When that process started (seconds since the epoch): a pid may be used again.
        phase: How far it is.
        message: What it does or what went wrong, for people.
        address: Of the gateway.
        redis_url: Of the store.
        model: What is served.
        services: Process id of each service.
    """

    pid: int
    started: float
    phase: Literal["starting", "ready", "failed"]
    message: str
    address: str
    redis_url: str
    model: str
    services: dict[str, int]

    @property
    def is_alive(self) -> bool:
        """Whether the supervisor runs."""
        with suppress(psutil.NoSuchProcess):
            same = abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
            return same and runs(self.pid)
        return False


def state_dir() -> Path:
    """Return the cluster's folder: ``$CHUNKSERVE_HOME``, else in the user's state folder."""
    default = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")) / "chunkserve"
    return Path(os.environ.get("CHUNKSERVE_HOME", default)).expanduser()


def read_state(directory: Path) -> ClusterState | None:
    """Return what the last supervisor wrote, if there was one."""
    path = directory / _STATE_FILE
    return ClusterState(**json.loads(path.read_text())) if path.exists() else None


def launch(options: ClusterOptions) -> int:
    """Start a supervisor that outlives this process, and return its pid."""
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / _STATE_FILE).unlink(missing_ok=True)
    described = json.dumps({**asdict(options), "directory": str(options.directory)})
    with (options.directory / "supervisor.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.local.supervisor", described],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process.pid


def stop(state: ClusterState, directory: Path) -> None:
    """Stop a supervisor and its cluster; return when they are gone."""
    if state.is_alive:
        supervisor = psutil.Process(state.pid)
        family = {supervisor, *supervisor.children(recursive=True)}
        with suppress(psutil.NoSuchProcess):
            supervisor.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs([supervisor], timeout=_DOWN_TIMEOUT_S)
        if left:
            end_all(family)
    (directory / _STATE_FILE).unlink(missing_ok=True)


def runs(pid: int) -> bool:
    """Whether a process runs (one that ended and was not waited for does not)."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def usage(pid: int, *, with_children: bool) -> tuple[int, int]:
    """Return how many processes a service has, and the bytes of memory they hold."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        family = [process, *(process.children(recursive=True) if with_children else [])]
        return len(family), sum(member.memory_info().rss for member in family)
    return 0, 0


def supervise(options: ClusterOptions) -> int:
    """Run a cluster until SIGTERM, or until one of its services dies. Return an exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise_stop)
    cluster = LocalCluster(options, say=lambda text: _write(cluster, options, "starting", text))
    try:
        with cluster:
            _write(cluster, options, "ready", "ready")
            while True:
                time.sleep(_POLL_S)
                cluster.check()
    except _Stop:
        (options.directory / _STATE_FILE).unlink(missing_ok=True)
        return 0
    except (ClusterError, EmbeddedStoreError) as error:
        print(error, file=sys.stderr)
        _write(cluster, options, "failed", str(error))
        return 1


class _Stop(BaseException):  # a request, as KeyboardInterrupt is
    """Somebody asked the supervisor to stop."""


def _raise_stop(number: int, frame: Any) -> None:
    # Once: a second signal must not interrupt the cleaning up.
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise _Stop


def _write(
    cluster: LocalCluster,
    options: ClusterOptions,
    phase: Literal["starting", "ready", "failed"],
    message: str,
) -> None:
    state = ClusterState(
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        phase=phase,
        message=message,
        address=cluster.address,
        redis_url=cluster.redis_url,
        model=options.model,
        services={child.name: child.process.pid for child in cluster.children},
    )
    scratch = options.directory / f"{_STATE_FILE}.new"
    scratch.write_text(json.dumps(asdict(state), indent=2))
    scratch.replace(options.directory / _STATE_FILE)


def main() -> None:
    """Supervise the cluster that the first argument describes, as JSON."""
    described = json.loads(sys.argv[1])
    sys.exit(supervise(ClusterOptions(**{**described, "directory": Path(described["directory"])})))


if __name__ == "__main__":
    main()
