"""One check of a fit: what it found, how bad that is, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["green", "amber", "red"]
"""Green: shown to be right within the limits. Amber: not shown. Red: shown to be wrong."""

_ORDER: tuple[Status, ...] = ("green", "amber", "red")


@dataclass(frozen=True)
class Check:
    """What one check found.

    Args:
        name: What was looked at, in a word or two.
        status: How bad it is; ``None`` where the check informs and does not judge.
        finding: One sentence with the numbers.
        advice: What to do about it; empty where nothing is wrong.
        values: The numbers by name.
        is_standby: Whether it only judges where the marginals could not be held to draws of the
            posterior: what is suspicious is of no weight against what was measured.
    """

    name: str
    status: Status | None
    finding: str
    advice: str = ""
    values: dict[str, float] = field(default_factory=dict)
    is_standby: bool = False

    def at_ease(self) -> Check:
        """The same finding, no longer judging."""
        return replace(self, status=None, advice="")


def worst(statuses: Iterable[Status | None]) -> Status:
    """The worst of several; green where none judges.

    Example:
        >>> worst(["green", None, "amber"])
        'amber'
    """
    return max((s for s in statuses if s is not None), key=_ORDER.index, default="green")
