"""A machine's own address."""

from __future__ import annotations

import socket

import pytest

from services.runtime import address


def test_a_server_on_all_interfaces_is_reached_by_it() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]

        with socket.create_connection((address.own_address(), port), timeout=5) as client:
            assert client.getpeername() == (address.own_address(), port)


def test_without_a_route_it_is_the_address_of_the_machines_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The kernel refuses a datagram to broadcast as it refuses one without a route: OSError.
    monkeypatch.setattr(address, "_SOMEWHERE", ("255.255.255.255", 9))

    assert address.own_address() == socket.gethostbyname(socket.gethostname())
