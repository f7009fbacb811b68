"""Checks of the options that families have."""

from __future__ import annotations


def check_count(name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least ``least``.

    Args:
        name: What it is called.
        value: What came.
        least: The smallest that is allowed.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")


def check_within(name: str, value: object, low: float, high: float, unit: str = "") -> None:
    """Refuse what is no number between two bounds.

    Args:
        name: What it is called.
        value: What came.
        low: The bound that it must be above, or at.
        high: The bound that it may reach.
        unit: What it counts, for the message.

    Raises:
        ValueError: If it is anything else.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be between {low:g} and {high:g}{unit}; got {value!r}.")
