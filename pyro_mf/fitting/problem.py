"""What ``fit`` is asked to do, checked at the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyro.infer import ELBO, SVI
from torch import Tensor

from pyro_mf.convert.samples import check_arguments
from pyro_mf.density import LogJoint
from pyro_mf.guides import AutoMeanField
from pyro_mf.guides.site_families import FamilySpec
from pyro_mf.objectives import ForwardKL


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with its data, the guide to be trained, and the objective.

    Args:
        model: The Pyro model.
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        guide: The guide; trained in place.
        objective: The objective; ``None`` for the reverse KL.
    """

    model: Callable[..., Any]
    model_args: tuple[Any, ...]
    model_kwargs: dict[str, Any]
    guide: Any
    objective: ELBO | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return str(getattr(self.model, "__name__", type(self.model).__name__))

    @cached_property
    def log_joint(self) -> LogJoint:
        """The model with its full data as a density.

        Raises:
            ModelError: If the model subsamples its data, or is no model.
        """
        backend = self.objective.backend if isinstance(self.objective, ForwardKL) else "auto"
        return LogJoint(self.model, self.model_args, self.model_kwargs, backend=backend)


def read_problem(
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    guide: Any | None = None,
    family: FamilySpec | None = None,
    objective: ELBO | None = None,
) -> Problem:
    """Check what ``fit`` was given, and make the guide where none was given.

    Raises:
        TypeError: If model or guide cannot be called, the arguments are no tuple or mapping, or the
            objective is no ELBO.
        ValueError: If a family is named beside a guide, which has one.
    """
    if not callable(model):
        raise TypeError(
            f"model must be a Pyro model, a callable; got {type(model).__name__}. Give the "
            "function itself, not what it returns."
        )
    if isinstance(model_args, str) or model_args is None:
        raise TypeError(f"model_args must be a tuple; got {model_args!r}. Write (x,) or ().")
    check_arguments(model_args)
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(
            "model_kwargs must be a mapping from names to keyword arguments of the model; got "
            f"{type(model_kwargs).__name__}."
        )
    _check_objective(objective)
    if guide is None:
        guide = AutoMeanField(model, "normal" if family is None else family)
    elif isinstance(guide, type | Tensor | SVI) or not callable(guide):
        raise TypeError(
            "guide must be a guide for the model, such as AutoMeanField(model); got "
            f"{guide.__name__ if isinstance(guide, type) else type(guide).__name__}."
        )
    elif family is not None:
        raise ValueError(
            f"family={family!r} is for the guide that fit makes; the guide given has its own. "
            "Leave one of the two out."
        )
    return Problem(model, tuple(model_args), dict(model_kwargs or {}), guide, objective)


def _check_objective(objective: Any) -> None:
    if objective is None or isinstance(objective, ELBO):
        return
    got = f"the class {objective.__name__}" if isinstance(objective, type) else repr(objective)
    raise TypeError(
        "objective must be an instance of pyro.infer.ELBO, such as pyro_mf.ReverseKL() or "
        f"pyro.infer.Trace_ELBO(); got {got}."
    )


def at_least(name: str, value: Any, least: int) -> int:
    """The value, if it is an integer of at least ``least``.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}.")
    return value


@dataclass(frozen=True)
class Limits:
    """When a solver may stop, and when it must.

    Args:
        tolerance: Error that the solver may leave in the result, in sds, positive.
        max_gradients: Budget in gradient evaluations per start; ``None`` for the solver's own.

    Raises:
        TypeError: If one is no number, or the budget no integer.
        ValueError: If one is not positive.
    """

    tolerance: float = 0.1
    max_gradients: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tolerance, bool) or not isinstance(self.tolerance, int | float):
            raise TypeError(f"tolerance must be a number; got {self.tolerance!r}.")
        if not 0.0 < self.tolerance < float("inf"):
            raise ValueError(
                "tolerance must be positive: the error that the solver may leave, in posterior "
                f"sds; got {self.tolerance}."
            )
        if self.max_gradients is not None:
            at_least("max_gradients", self.max_gradients, 1)

    def options(self, budget: str) -> dict[str, Any]:
        """Keyword arguments of a solver that calls its budget so."""
        limits: dict[str, Any] = {"tolerance": self.tolerance}
        return limits if self.max_gradients is None else limits | {budget: self.max_gradients}
