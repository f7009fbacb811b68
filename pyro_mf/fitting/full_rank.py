"""A Gaussian over the unconstrained latents as a guide of Pyro's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value

from pyro_mf import _pyro
from pyro_mf.fitting.problem import Problem
from pyro_mf.solvers.linear_response import LinearResponse


def full_rank_guide(problem: Problem, response: LinearResponse) -> Any:
    """Make an ``AutoMultivariateNormal`` with the location and covariance of linear response.

    Args:
        problem: The model and its arguments, on full data.
        response: Location and covariance in our flat layout.

    Returns:
        The guide, set up, with parameters under a name of its own in Pyro's store.
    """
    prototype = problem.log_joint.program.prototype
    layout = prototype.layout
    loc = response.loc.to(dtype=prototype.dtype, device=prototype.device)
    # A start given by value draws nothing, so improper priors are fine.
    start = init_to_value(values=layout.constrain(loc))
    guide: Any = AutoMultivariateNormal(_plain(problem), init_loc_fn=start)
    _pyro.name_anew(guide, "LinearResponse")
    with poutine.block(), torch.random.fork_rng(), torch.no_grad():
        guide(*problem.model_args, **problem.model_kwargs)
    order = torch.cat(
        [
            torch.arange(layout[name].start, layout[name].stop)
            for name, _ in guide.prototype_trace.iter_stochastic_nodes()
        ]
    )
    # In the guide's order of the sites, factorised in the precision that it came in.
    factor = torch.linalg.cholesky(response.covariance[order][:, order]).to(loc)
    with torch.no_grad():
        guide.loc.copy_(loc[order.to(loc.device)])
    guide.scale = factor.diagonal()
    guide.scale_tril = factor / factor.diagonal()[:, None]
    return guide


def _plain(problem: Problem) -> Callable[..., Any]:
    """The model as Pyro's autoguides take it: no discrete latents, no sequential plates."""
    discrete = list(problem.log_joint.program.prototype.discrete)
    model = poutine.block(problem.model, hide=discrete) if discrete else problem.model

    def leave_sequential_plates(msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        msg["cond_indep_stack"] = tuple(frame for frame in frames if frame.vectorized)

    def plain(*args: Any, **kwargs: Any) -> Any:
        with _pyro.substitute(leave_sequential_plates):
            return model(*args, **kwargs)

    return plain
