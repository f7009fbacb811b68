"""Simulated data sets: by the model itself, or by a function of its user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.checks import check_observed, headline
from pyro_mf.density.data_sets import Arguments
from pyro_mf.density.prior import Prior
from pyro_mf.diagnostics.joint_draws import (
    Simulations,
    bind,
    check_observes,
    draw_jointly,
    signature_of,
    trace_once,
)
from pyro_mf.diagnostics.simulate_from_model import simulate_from_model
from pyro_mf.solvers.random_state import forked

Simulate: TypeAlias = Callable[[dict[str, Tensor]], Any] | Mapping[str, str] | None
"""How data are simulated; see :func:`pyro_mf.calibrate`."""


def simulate_all(
    model: Callable[..., Any],
    simulate: Simulate,
    num: int,
    arguments: Arguments,
    *,
    seed: int,
) -> Simulations:
    """Draw truths from the prior, and data at each.

    Args:
        model: A Pyro model.
        simulate: As for :func:`pyro_mf.calibrate`.
        num: Number of simulations R.
        arguments: The template: arguments whose data are replaced.
        seed: Seed of all draws.

    Raises:
        TypeError: If ``simulate`` is of the wrong kind, or returns what is no arguments.
        ModelError: If the prior is improper, the model observes nothing, the model cannot
            simulate its data by itself, or simulated data are none.
    """
    if simulate is None or isinstance(simulate, Mapping):
        return simulate_from_model(model, simulate, num, arguments, seed)
    if not callable(simulate):
        raise TypeError(
            "simulate must be a function from a dict of latent values to model arguments, a "
            "mapping from observed sites to the names of the arguments that hold their data, or "
            f"None; got {type(simulate).__name__}."
        )
    return _by_function(model, simulate, num, arguments, seed)


def _by_function(
    model: Callable[..., Any],
    simulate: Callable[[dict[str, Tensor]], Any],
    num: int,
    arguments: Arguments,
    seed: int,
) -> Simulations:
    log_joint = LogJoint(model, *arguments)
    Prior(log_joint)
    latents = [site.name for site in log_joint.layout.sites]
    names = [*latents, *log_joint.program.prototype.discrete]
    draws, truths = draw_jointly(model, arguments, log_joint, num, names, seed)
    found: list[Arguments] = []
    for k in range(num):
        with forked(seed + 1 + k):
            given = simulate({name: draws[name][k].clone() for name in names})
        found.append(_read(model, given, arguments))
        if k == 0:
            first = _log_joint_at(model, found[0], 0)
            if first.layout.element_names() != log_joint.layout.element_names():
                raise ModelError(
                    f"with simulated data the model has the latents {first.layout.element_names()};"
                    f" with model_args it has {log_joint.layout.element_names()}. What simulate "
                    "returns must have the shapes of model_args."
                )
            check_observes(first)
        else:
            _check_data(model, found[k], k)
    if all(_is_same(found[0], other) for other in found[1:]):
        raise ModelError(
            f"simulate returned the same data for all {num} draws of the latents. Expected data "
            "drawn given the latents that it is called with."
        )
    return Simulations(first, truths, found)


def _is_same(one: Arguments, other: Arguments) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs if _is_data(a))


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)


def _log_joint_at(model: Callable[..., Any], arguments: Arguments, index: int) -> LogJoint:
    try:
        return LogJoint(model, *arguments)
    except ModelError as error:
        raise ModelError(f"simulation {index}: {error}") from error


def _check_data(model: Callable[..., Any], arguments: Arguments, index: int) -> None:
    """Refuse data that the model cannot score; what the graph is given, nothing else looks at.

    Raises:
        ModelError: If there are any.
    """
    args, kwargs = arguments
    try:
        check_observed(trace_once(model, arguments), args, kwargs)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise ModelError(f"simulation {index}: {headline(error)}.") from error


def _read(model: Callable[..., Any], given: Any, template: Arguments) -> Arguments:
    """Arguments from what a user's function returned.

    Raises:
        TypeError: If that is neither a tuple nor a mapping from names.
    """
    if isinstance(given, tuple):
        return given, template[1]
    if isinstance(given, Mapping):
        known = list(signature_of(model).parameters)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(
                f"simulate returned an argument {unknown[0]!r}; the model's are {known}."
            )
        return bind(model, template, given)
    raise TypeError(
        "simulate must return a tuple of all the model's positional arguments, such as (x, y), or "
        "a dict of those to replace in model_args, such as {'y': y}; got "
        f"{type(given).__name__}."
    )
