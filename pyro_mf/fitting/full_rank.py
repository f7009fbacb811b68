"""A Gaussian over the unconstrained latents as a guide of Pyro's own."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf.fitting.problem import Problem


def full_rank_guide(problem: Problem, loc: Tensor, scale_tril: Tensor) -> Any:
    """Make an ``AutoMultivariateNormal`` with a given location and covariance.

    Args:
        problem: The model and its arguments, on full data.
        loc: Location in our flat layout, shape ``(D,)``.
        scale_tril: Cholesky factor of the covariance in our flat layout, shape ``(D, D)``.

    Returns:
        The guide, set up, with parameters under a name of its own in Pyro's store.
    """
    prototype = problem.log_joint.program.prototype
    layout, model = prototype.layout, problem.model
    if prototype.discrete:  # summed out, so none of the guide's
        model = poutine.block(model, hide=list(prototype.discrete))
    # A start given by value draws nothing, so improper priors are fine.
    start = init_to_value(values=layout.constrain(loc))
    guide: Any = AutoMultivariateNormal(model, init_loc_fn=start)
    _pyro.name_anew(guide, "LinearResponse")
    with poutine.block(), torch.random.fork_rng(), torch.no_grad():
        guide(*problem.model_args, **problem.model_kwargs)
    order = torch.cat(
        [
            torch.arange(layout[name].start, layout[name].stop, device=loc.device)
            for name, _ in guide.prototype_trace.iter_stochastic_nodes()
        ]
    )
    covariance = scale_tril @ scale_tril.mT
    factor = torch.linalg.cholesky(covariance[order][:, order])
    with torch.no_grad():
        guide.loc.copy_(loc[order])
    guide.scale = factor.diagonal()
    guide.scale_tril = factor / factor.diagonal()[:, None]
    return guide
