"""What a user hands in as a posterior, read as an ArviZ result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_mf.convert import generations
from pyro_mf.convert.datasets import Axes, to_dataset, to_numpy


def as_baseline(value: Any, name: str) -> Any:
    """A result as :func:`as_result` reads it, or reference draws.

    Args:
        value: As there, or a mapping from every variable to draws ``(chains, draws, *shape)``.
        name: What errors call it.

    Raises:
        TypeError: If it is neither.
        ValueError: If arrays do not have the same chains and draws.
    """
    if generations.is_result(value) or not isinstance(value, Mapping):
        return as_result(value, name)
    arrays = {str(variable): to_numpy(array) for variable, array in value.items()}
    shapes = {variable: array.shape for variable, array in arrays.items()}
    if len({shape[:2] for shape in shapes.values()}) != 1 or min(map(len, shapes.values())) < 2:
        raise ValueError(
            f"reference draws '{name}' must be (chains, draws, *shape) per variable, with the same "
            f"chains and draws for all; got {shapes}."
        )
    chains, draws = next(iter(shapes.values()))[:2]
    sample = {"chain": range(chains), "draw": range(draws)}
    return generations.wrap({"posterior": to_dataset(arrays, Axes(), sample)})


def as_result(value: Any, name: str) -> Any:
    """An ``InferenceData`` or a ``DataTree``.

    Args:
        value: One of them, or an object with ``to_arviz()``.
        name: What errors call it.

    Raises:
        TypeError: If it is something else.
    """
    if generations.is_result(value):
        return value
    if hasattr(value, "to_arviz"):
        return value.to_arviz()
    raise TypeError(
        f"'{name}' must be an InferenceData, a DataTree or an object with to_arviz(); got "
        f"{type(value).__name__}. Convert it with from_pyro or from_pyro_svi."
    )


def group(result: Any, name: str) -> Any | None:
    """A group of a result, or ``None`` where it has none of that name.

    Args:
        result: An ``InferenceData`` or a ``DataTree``.
        name: Of the group.
    """
    return generations.dataset(result, name) if name in generations.groups(result) else None


def seconds_of(result: Any) -> float | None:
    """Wall time that the posterior took, where it says so."""
    seconds = generations.dataset(result, "posterior").attrs.get("sampling_time")
    return None if seconds is None else float(seconds)


def is_independent(result: Any) -> bool:
    """Whether draws are independent: all are, unless ``is_approximate`` is 0."""
    return bool(generations.dataset(result, "posterior").attrs.get("is_approximate", 1))
