"""The command ``chunkkv``: how much of an answer survives compression, and which policy to take.

Importing this package imports neither torch nor the packages of the extra ``eval``.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C."""
    app = load("chunkkv.cli.app")
    try:
        app.app(prog_name="chunkkv")
    except KeyboardInterrupt:
        sys.exit(130)


def load(module: str) -> ModuleType:
    """Import a module of the command line.

    Raises:
        SystemExit: A package of others is missing; its code is 2, and stderr says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "chunkkv":
            raise
        print(
            f"error: this command needs the package {package!r}, which is not installed: "
            "pip install 'chunkserve[eval]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
