"""Draws of the data: given posterior draws of the latents, or from the prior, or from a user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.convert.datasets import Axes, to_numpy
from pyro_mf.convert.vectorise import Run, run_many
from pyro_mf.density.checks import is_data


def draw_observed(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    latents: Mapping[str, Tensor],
    sites: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """Draw the observed sites anew, once for each draw of the latents.

    Discrete latents are drawn from the model as well. What the model computes from its arguments,
    data included, stays as it is.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        latents: For each continuous latent site its draws, shape ``(S, *shape)``.
        sites: The observed sites.
        seed: Seed of the draws.

    Returns:
        For each site a tensor ``(S, *shape)``.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 0.001), obs=x)
        >>> loc = torch.tensor([-50.0, 50.0])
        >>> draw_observed(model, (torch.tensor(1.0),), {}, latents={"loc": loc}, sites=["x"],
        ...               seed=0)["x"].round()
        tensor([-50., 50.])
    """
    run = _free_run(model, args, kwargs, sites)
    return run_many(run, len(next(iter(latents.values()))), latents, seed=seed)


def draw_prior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    num: int,
    sites: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """Draw everything from the model, data included.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        num: Number of draws S.
        sites: The sites to return.
        seed: Seed of the draws.

    Returns:
        For each site a tensor ``(S, *shape)``.

    Raises:
        ModelError: If some prior cannot be sampled.
    """
    run = _free_run(model, args, kwargs, sites)
    try:
        return run_many(run, num, {}, seed=seed)
    except NotImplementedError as error:
        raise ModelError(
            f"the prior cannot be sampled ({error or 'an improper distribution'}). Leave `prior` "
            "out, or give every latent site a proper prior."
        ) from error


def _free_run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    sites: Sequence[str],
) -> Run:
    """The model with data drawn instead of observed, at given values of some latents.

    ``poutine.uncondition`` would draw ``pyro.deterministic`` sites as well, with the wrong shape.
    """

    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def at_sample(msg: Any) -> None:
            if msg["name"] in values:
                msg["value"], msg["done"] = values[msg["name"]], True
            elif is_data(msg):
                msg["value"], msg["done"], msg["is_observed"] = None, False, False

        with _pyro.substitute(at_sample):
            trace: Any = poutine.trace(model).get_trace(*args, **kwargs)
        return {name: trace.nodes[name]["value"] for name in sites}

    return run


def shape_given(
    arrays: Mapping[str, Tensor | np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    num: int,
    group: str,
) -> dict[str, np.ndarray]:
    """Give a user's draws the model's shapes; Pyro's ``Predictive`` pads them with axes of size 1.

    Args:
        arrays: For each site its draws, the draws first.
        shapes: For each site the shape of one value in the model.
        num: Number of draws.
        group: What the draws are for, to be named in errors.

    Returns:
        For each site an array ``(num, *shape)``.

    Raises:
        ValueError: If a name is no site, or the shape cannot be mended.
    """
    shaped = {}
    for name, value in arrays.items():
        if name not in shapes:
            raise ValueError(f"{group} has '{name}', which is no site; expected {sorted(shapes)}.")
        array = to_numpy(value)
        if array.shape[:1] != (num,) or array.size != num * math.prod(shapes[name]):
            raise ValueError(
                f"{group} has '{name}' of shape {array.shape}; expected {(num, *shapes[name])}: "
                "one value per draw, in the order of the chains."
            )
        shaped[name] = array.reshape(num, *shapes[name])
    return shaped


def shape_predictions(
    arrays: Mapping[str, Tensor | np.ndarray],
    num_dims: Mapping[str, int],
    num: int,
    axes: Axes,
) -> tuple[dict[str, np.ndarray], Axes]:
    """The same for predictions, whose plates may have other sizes than the data's.

    Args:
        arrays: For each site its draws, the draws first.
        num_dims: For each site of the model the number of axes of one value.
        num: Number of posterior draws.
        axes: Names and labels in the other groups.

    Returns:
        The draws without padding, and the axes with plates of their sizes and the labels that fit.

    Raises:
        ValueError: If there is not one value per posterior draw.
    """
    shaped, plates, sizes = {}, dict(axes.plates), set()
    for name, value in arrays.items():
        array = to_numpy(value)
        if array.shape[:1] != (num,):
            raise ValueError(
                f"predictions has '{name}' of shape {array.shape}; expected ({num}, ...): one "
                "value per posterior draw, in the order of the chains."
            )
        shape = array.shape[1:]
        excess = max(0, len(shape) - num_dims.get(name, len(shape)))
        shape = shape[excess:] if all(n == 1 for n in shape[:excess]) else shape
        shaped[name] = array.reshape(num, *shape)
        batch = shape[: len(shape) - axes.event_dims.get(name, len(shape))]
        plates[name] = tuple(
            replace(p, size=batch[p.dim]) if -p.dim <= len(batch) else p
            for p in axes.plates.get(name, ())
        )
        sizes |= set(shape)
    fitting = {dim: labels for dim, labels in axes.coords.items() if len(labels) in sizes}
    return shaped, replace(axes, plates=plates, coords=fitting)
