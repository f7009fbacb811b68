"""Our own fit of a posterior, with the numbers that the tables show."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import pyro_mf as mf
from benchmarks.posteriors import Posterior
from pyro_mf._errors import LinearResponseError
from pyro_mf.density import LogJoint
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.linear_response import LinearResponse, linear_response


@dataclass(frozen=True, eq=False)
class OurFit:
    """A mean-field fit and what linear response makes of it."""

    loc: Tensor
    sd: Tensor
    response: LinearResponse | None
    no_response: str
    stop_reason: str
    message: str
    notes: tuple[str, ...]
    num_gradients: int
    num_draws: int


def fit_posterior(posterior: Posterior, *, seed: int = 0) -> OurFit:
    """Fit from scratch: capture, optimum, linear response."""
    log_joint = LogJoint(posterior.model, posterior.args)
    guide = mf.AutoMeanField(posterior.model).setup(*posterior.args)
    outcome = solve_deterministic(log_joint, guide, seed=seed)
    loc, sd = (p.detach().clone() for p in guide.flat_params())
    response, reason = None, ""
    try:
        response = linear_response(log_joint, (loc, sd), seed=seed)
    except LinearResponseError as error:
        reason = str(error)
    return OurFit(
        loc=loc,
        sd=sd,
        response=response,
        no_response=reason,
        stop_reason=outcome.stop_reason,
        message=outcome.message,
        notes=outcome.notes,
        num_gradients=outcome.num_gradients,
        num_draws=int(outcome.state.get("num_draws", 0)),
    )
