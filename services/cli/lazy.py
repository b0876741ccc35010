"""Imports a command's module when the command runs, and says what to install if it cannot."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Final

_OWN_PACKAGES: Final = frozenset({"services", "chunkkv", "chunkserve", "chunkserve_client"})


def load(module: str, *, extra: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: Full name.
        extra: The extra of the distribution that brings what the module needs.

    Raises:
        SystemExit: A package of others is missing; its code is 2, and stderr says what to install.
        ModuleNotFoundError: A module of our own is missing, which no installation mends.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _OWN_PACKAGES:
            raise
        print(
            f"error: this command needs the package {package!r}, which is not installed: "
            f"pip install 'chunkserve[{extra}]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from error
