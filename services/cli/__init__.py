"""The command ``chunkserve``: the client's commands, and the processes of a cluster.

Importing this package imports no torch, ray, redis or server; a command imports what it needs.
"""

from __future__ import annotations

import io
import os
import sys

from services.cli.lazy import load


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer may hold characters that a narrow terminal encoding lacks.
            stream.reconfigure(errors="replace")
    # gRPC's own notes (a connection that went away) do not belong between a command's output.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        load("services.cli.app", extra="client").app(prog_name="chunkserve")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("CHUNKSERVE_DEBUG"):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"error: {what} (a fault of chunkserve; CHUNKSERVE_DEBUG=1 shows where)",
            file=sys.stderr,
        )
        sys.exit(1)
