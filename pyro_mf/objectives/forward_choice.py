"""Which estimator forward KL uses for a model and a guide, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.capture import Backend
from pyro_mf.density.checks import is_discrete
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.prototype import run_prototype
from pyro_mf.density.recorder import map_tensors

Fn = Callable[..., Any]

# Points and step of the comparison of gradients with differences.
_NUM_POINTS, _STEP, _TOLERANCE = 6, 1e-5, 1e-2


class Choice(NamedTuple):
    """An estimator, and the density for it.

    Args:
        name: The estimator's name.
        reason: Why this one.
        log_joint: The density that it draws from; ``None`` if it runs model and guide as they are.
    """

    name: str
    reason: str
    log_joint: LogJoint | None


def choose(
    asked: str | None,
    model: Fn,
    guide: Fn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    backend: Backend,
) -> Choice:
    """Find an estimator that is right for the model, or hold the one asked for to it.

    Args:
        asked: An estimator's name, or ``None``.
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments.
        backend: Backend of the log joint.

    Raises:
        ModelError: If the model or its data are bad, or the estimator asked for cannot be right.
    """
    if asked == "prior":
        return Choice("prior", "asked for", None)
    obstacle = _obstacle(model, guide, args, kwargs)
    if obstacle is not None:
        if asked not in {None, "snis"}:
            raise ModelError(
                f"estimator='{asked}' needs the model's density as a function of continuous "
                f"latents given all data, and {obstacle}. Use estimator='snis', which runs model "
                "and guide as they are."
            )
        return Choice("snis", f"{obstacle}, so model and guide are run as they are", None)
    # Copies: chains are those of these numbers, also if the caller's tensors change in place.
    args, kwargs = map_tensors((args, dict(kwargs)), lambda x: x.detach().clone())
    log_joint = LogJoint(model, args, kwargs, backend=backend)
    if asked not in {None, "hmc"}:
        return Choice(str(asked), "asked for", log_joint)
    fault = gradient_fault(log_joint)
    if asked == "hmc":
        if fault is not None:
            raise ModelError(
                f"estimator='hmc' follows the gradient of the log density, and {fault}. Use "
                "torch operations that autograd knows, outside torch.no_grad(), or "
                "estimator='imh', which needs no gradient."
            )
        return Choice("hmc", "asked for", log_joint)
    if fault is not None:
        return Choice("imh", f"{fault}, so chains are proposed to by the guide", log_joint)
    return Choice("hmc", "the model's density has a gradient and sees all data", log_joint)


def gradient_fault(log_joint: LogJoint) -> str | None:
    """Say how the log joint's gradient contradicts its values; ``None`` where it does not."""
    blocks = Blocks(log_joint)
    generator = torch.Generator().manual_seed(0)
    z = 0.5 * torch.randn(_NUM_POINTS, log_joint.size, generator=generator, dtype=torch.float64)
    direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    step = _STEP if log_joint.dtype == torch.float64 else 1e-2
    both = torch.cat([z + step * direction, z - step * direction])
    try:
        values = blocks.values(both)
        gradient = blocks.value_and_grad(z)[1]
    except RuntimeError as error:  # nothing in the model requires a gradient
        return f"the model has none ({str(error).splitlines()[0]})"
    difference = (values[:_NUM_POINTS] - values[_NUM_POINTS:]) / (2 * step)
    slope = (gradient * direction).sum(-1)
    known = torch.isfinite(difference) & (gradient != 0).any(-1)
    relative = (difference - slope).abs() / (difference.abs() + slope.abs() + 1e-3)
    tolerance = _TOLERANCE if log_joint.dtype == torch.float64 else 0.2
    # A kink or a jump now and then is no obstacle to a Markov chain.
    if int(known.sum()) == 0 or float((relative[known] < tolerance).double().mean()) >= 0.5:
        return None
    worst = int(torch.where(known, relative, -1.0).argmax())
    return (
        f"that of this model contradicts its values: along one direction they change by "
        f"{float(difference[worst]):.4g} and the gradient says {float(slope[worst]):.4g}, as if "
        "a part of the model were hidden from autograd"
    )


def _obstacle(model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why the log density of one flat vector would not be what is wanted."""
    handlers = _pyro.handlers_around()
    if handlers:
        return f"the step runs inside effect handlers ({type(handlers[0]).__name__})"
    endless = _endless(model, args, kwargs)
    if endless is not None:
        return f"latent site '{endless}' is discrete and cannot be summed out"
    prototype = run_prototype(model, args, kwargs)
    if prototype.subsampled:
        return f"the model subsamples plate '{prototype.subsampled[0]}'"
    if prototype.has_side_effects:
        return "the model changes its own state when it runs (as BatchNorm does in training)"
    if prototype.has_foreign_gradients:
        return (
            "the model uses tensors that require gradients and are not parameters of Pyro's "
            "(register modules with pyro.module or make them PyroModules)"
        )
    if prototype.discrete:
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        sampled = [name for name in prototype.discrete if name in trace]
        if sampled:
            return f"the guide samples the discrete latents {sampled}"
        if not prototype.layout.sites:
            return "every latent of the model is discrete"
    return None


def _endless(model: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """A latent site that is discrete with an infinite support."""
    found = []

    def look(msg: Any) -> None:
        if _pyro.is_subsample(msg) or msg["is_observed"]:
            return
        if is_discrete(msg["fn"]) and not msg["fn"].has_enumerate_support:
            found.append(msg["name"])

    try:
        with torch.no_grad(), poutine.block(), _pyro.substitute(look):
            model(*args, **kwargs)
    except (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError):
        pass  # what is wrong with the model is said by its prototype
    return found[0] if found else None
