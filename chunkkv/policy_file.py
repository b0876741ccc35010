"""A compression policy as a JSON file: what ``chunkkv tune`` writes and services read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

from chunkkv.errors import InvalidPolicyError
from chunkkv.policy import CompressionPolicy

_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(CompressionPolicy))


def policy_from_file(path: str | Path) -> CompressionPolicy:
    """Read a policy: a JSON object whose names are fields of ``CompressionPolicy``.

    Fields that are missing have their defaults.

    Raises:
        InvalidPolicyError: The file cannot be read, is not such an object, or a value is out of
            range; names the file.
    """
    try:
        fields: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidPolicyError(f"policy file {path}: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidPolicyError(f"policy file {path}: give an object of fields, not {fields!r}")
    unknown = sorted(set(fields) - _FIELDS)
    if unknown:
        raise InvalidPolicyError(
            f"policy file {path}: no field {', '.join(unknown)}; "
            f"fields are {', '.join(sorted(_FIELDS))}"
        )
    try:
        return CompressionPolicy(**fields)
    except (InvalidPolicyError, TypeError) as error:
        raise InvalidPolicyError(f"policy file {path}: {error}") from error


def write_policy(policy: CompressionPolicy, path: str | Path) -> None:
    """Write a policy so that ``policy_from_file`` returns an equal one. All fields but ``None``."""
    fields = {k: v for k, v in dataclasses.asdict(policy).items() if v is not None}
    Path(path).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
