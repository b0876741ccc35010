"""Asks a server for its health: ``python -m services.runtime.probe host:port``.

For container health checks. The exit code is 0 if it serves, 1 if not, 2 if the call is malformed.
"""

from __future__ import annotations

import sys
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S: Final = 2.0


def status(address: str, *, timeout_s: float = _TIMEOUT_S) -> str:
    """Return ``SERVING``, another health status, or why there is none.

    Args:
        address: ``host:port``.
        timeout_s: Seconds after which the server counts as unreachable.
    """
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: list[str]) -> int:
    """Print the status, and return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m services.runtime.probe host:port", file=sys.stderr)
        return 2
    found = status(arguments[0])
    print(found)
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
