"""Truths and data of a calibration, and what its two ways to make data share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.convert.predictive import draw_prior
from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.density import LogJoint
from pyro_mf.density.checks import headline
from pyro_mf.density.data_sets import Arguments

_MAX_LOST = 0.01  # share of draws that may lie at infinity on the unconstrained axis


@dataclass(frozen=True, eq=False)
class Simulations:
    """Truths and data.

    Args:
        log_joint: The model at the template's data.
        truths: Flat unconstrained vectors, shape ``(R, D)``, in double precision.
        arguments: Positional and keyword arguments of the model for each.
    """

    log_joint: LogJoint
    truths: Tensor
    arguments: list[Arguments]


def draw_sites(
    model: Callable[..., Any], arguments: Arguments, num: int, names: list[str], seed: int
) -> dict[str, Tensor]:
    """Joint draws of some sites, latent and observed.

    Raises:
        ModelError: If the model fails, or has no such site.
    """
    try:
        return draw_prior(model, *arguments, num=num, sites=names, seed=seed)
    except KeyError as error:
        raise ModelError(f"the model has no sample site {error.args[0]!r}.") from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the model fails at a draw from its prior: {headline(error)}.") from error


def draw_jointly(
    model: Callable[..., Any],
    arguments: Arguments,
    log_joint: LogJoint,
    num: int,
    names: list[str],
    seed: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Joint draws by site, and the latents as flat vectors ``(R, D)``, none of them at infinity.

    Raises:
        ModelError: If too many are.
    """
    spare = 2 + int(_MAX_LOST * num)
    draws = draw_sites(model, arguments, num + spare, names, seed)
    z = log_joint.layout.unconstrain(draws).double().cpu()
    kept = torch.isfinite(z).all(1).nonzero().reshape(-1)[:num]
    if len(kept) < num:
        raise ModelError(
            f"more than {spare} of {num + spare} draws from the prior lie at infinity on the "
            "unconstrained axis: at the edge of their support, where draws under- or overflow. Use "
            "priors that keep away from the edge."
        )
    return {name: x[kept.to(x.device)] for name, x in draws.items()}, z[kept]


def bind(model: Callable[..., Any], arguments: Arguments, new: Mapping[str, Any]) -> Arguments:
    """Arguments with some replaced by name."""
    bound = signature_of(model).bind_partial(*arguments[0], **arguments[1])
    bound.arguments.update(new)
    return bound.args, bound.kwargs


def signature_of(model: Callable[..., Any]) -> inspect.Signature:
    """What a model takes."""
    return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)


def trace_once(model: Callable[..., Any], arguments: Arguments, seed: int = 0) -> Any:
    """Run a model once, hidden from handlers around us."""
    with forked_seed(seed), torch.no_grad(), poutine.block():
        return poutine.trace(model).get_trace(*arguments[0], **arguments[1])


def check_observes(log_joint: LogJoint) -> None:
    """Refuse a model without data.

    Raises:
        ModelError: If it has neither an observed site nor a factor.
    """
    if log_joint.program.prototype.observed:
        return
    trace = trace_once(log_joint.model, (log_joint.model_args, log_joint.model_kwargs))
    if not any(_pyro.is_factor(n) for n in trace.nodes.values() if n["type"] == "sample"):
        raise ModelError(
            "the model observes nothing with these arguments: no pyro.sample statement has data. "
            "Pass data in model_args, or, if the model draws them where an argument is None, name "
            "site and argument, as in simulate={'y': 'y'}."
        )
