"""Where others reach this machine."""

from __future__ import annotations

import socket
from typing import Final

# Reserved for documentation, so never a neighbour; nothing is sent to it.
_SOMEWHERE: Final = ("192.0.2.1", 9)


def own_address() -> str:
    """Return the IPv4 address that the rest of the network reaches this machine, or container, by.

    With several networks, it is the one towards the default route.

    Raises:
        OSError: There is no network, and the machine's own name has no address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
        except OSError:
            # No default route, as in a container on an isolated network: there, the name leads to
            # the address.
            return socket.gethostbyname(socket.gethostname())
        return str(probe.getsockname()[0])
