"""Prints what an extra of pyproject.toml asks for, its own extras resolved, one line each.

With it, an image installs the dependencies in a layer of their own, which a change of the code does
not build again: ``python list_requirements.py library server < pyproject.toml``.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator


def requirements(project: dict[str, object], extras: Iterable[str]) -> Iterator[str]:
    """Yield the requirements of ``extras``.

    Raises:
        KeyError: The project has no such extra.
    """
    own = re.compile(rf"{re.escape(str(project['name']))}\[(.+)\]")
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    for extra in extras:
        for requirement in optional[extra]:
            if match := own.fullmatch(requirement):
                yield from requirements(project, match[1].split(","))
            else:
                yield requirement


if __name__ == "__main__":
    pyproject = tomllib.load(sys.stdin.buffer)
    print("\n".join(dict.fromkeys(requirements(pyproject["project"], sys.argv[1:]))))
