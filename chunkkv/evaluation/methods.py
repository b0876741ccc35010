"""What is compared: named methods, each a policy once a ratio and a text are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from chunkkv.policy import CompressionPolicy
from chunkkv.presets import preset

FULL: Final = "full"
"""Name of the row that drops nothing."""


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table.

    Attributes:
        name: Of the row.
        preset: What it is made of.
        changes: Fields of the policy that replace the preset's.
    """

    name: str
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def policy(self, keep_ratio: float, num_tokens: int) -> CompressionPolicy:
        """Return the policy for a text of so many tokens."""
        return preset(self.preset, keep_ratio=keep_ratio, num_tokens=num_tokens, **self.changes)

    @property
    def settings(self) -> str:
        """What it chooses, whatever the ratio: equal for methods that are the same."""
        # Of a length that no share of a budget leaves unseen, and of a ratio below 1.
        return preset(self.preset, keep_ratio=0.5, num_tokens=1000, **self.changes).canonical()


def method(text: str) -> Method:
    """Read ``preset`` or ``preset:field=value,field=value``, as the command line gives it.

    Raises:
        InvalidPolicyError: There is no such preset, or a value is out of range.
    """
    name, _, changes = text.partition(":")
    fields = dict(pair.partition("=")[::2] for pair in changes.split(",") if pair)
    made = Method(text, name, {key.strip(): _value(value) for key, value in fields.items()})
    made.policy(0.5, 1000)
    return made


def _value(text: str) -> Any:
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
