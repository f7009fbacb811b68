r"""Linear response of a fit, and whether to believe it rather than the mean-field posterior.

Both are Gaussians on the unconstrained space, and the ELBO ranks any two: it is the log evidence
minus :math:`KL(q \| p)`. Linear response is exact for a Gaussian posterior and then has the higher
ELBO; on a funnel its symmetric tails reach where the density is not, and its ELBO falls below the
mean field's. The ELBO is about all latents at once: a few bad ones can outweigh many that linear
response has mended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import LinearResponseError, ModelError
from pyro_mf.density import Layout
from pyro_mf.density.blocks import Blocks
from pyro_mf.families import Normal
from pyro_mf.fitting.problem import Problem
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.objectives import ForwardKL
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO, estimate_from
from pyro_mf.solvers.linear_response import LinearResponse, linear_response, response_of
from pyro_mf.solvers.minimise import MAX_DENSE
from pyro_mf.solvers.outcome import Outcome

_FORWARD = (
    "it widens the factors of a fit by reverse KL; those of a fit by forward KL are as wide as the "
    "posterior's marginals"
)
_HESSIAN_DRAWS, _DRAWS, _COSTLY_DRAWS = 64, 512, 128


@dataclass(frozen=True, eq=False)
class Response:
    """Linear response of a fit, or why it has none.

    Args:
        found: Location and covariance, ``None`` where there is none.
        refusal: Why there is none, else empty.
        elbo: ELBO of the Gaussian that linear response gives, in nats; minus infinity where it
            reaches out of the density's domain.
        elbo_se: Its standard error.
    """

    found: LinearResponse | None
    refusal: str = ""
    elbo: float = math.nan
    elbo_se: float = math.nan

    def is_better(self, outcome: Outcome) -> bool:
        """Whether to believe its uncertainty rather than that of a mean-field fit.

        Not a test: where the two ELBOs are equal up to their errors, so is what they say.
        """
        return self.found is not None and self.elbo > outcome.elbo


def respond(problem: Problem, outcome: Outcome, *, seed: int) -> Response:
    """Linear response at an optimum, taken from the solver where that has it already.

    Args:
        problem: Model and trained guide.
        outcome: What the solver reported.
        seed: Seed of the draws.
    """
    if isinstance(problem.objective, ForwardKL):
        return Response(None, _FORWARD)
    if outcome.refusal:
        return Response(None, outcome.refusal)
    if outcome.response is None and not outcome.converged:
        refusal = "the fit ended before an optimum, and there is no linear response elsewhere"
        return Response(None, refusal)
    try:
        found = outcome.response or _at_optimum(problem, seed)
    except LinearResponseError as error:
        return Response(None, str(error))
    blocks = Blocks(problem.log_joint)
    num_draws = _COSTLY_DRAWS if blocks.is_costly else _DRAWS
    draws = fixed_draws(num_draws, len(found.loc), seed=seed + 1_000_003)
    loc, covariance = found.loc.double().cpu(), found.covariance.double().cpu()
    elbos = FixedDrawELBO(blocks, draws).response_elbos(LinearResponse(loc, covariance))
    if not bool(torch.isfinite(elbos).all()):
        return Response(found, "", -math.inf, math.nan)
    return Response(found, "", *estimate_from(elbos))


def respond_at(problem: Problem, sites: Sequence[str], *, seed: int) -> LinearResponse:
    """Linear response of chosen sites, by conjugate gradients: for any number of latents.

    Args:
        problem: Model and trained guide.
        sites: Names of latent sites.
        seed: Seed of the draws.

    Raises:
        ValueError: If a site is not a latent of the guide.
        LinearResponseError: If there is none at this optimum.
    """
    elbo, x = _objective(problem, seed)
    return response_of(elbo, x, elements_of(problem.guide.layout, sites))


def elements_of(layout: Layout, sites: Sequence[str]) -> Tensor:
    """Positions of the elements of some sites in the flat vector.

    Raises:
        ValueError: If there is no such site.
    """
    known = [site.name for site in layout.sites]
    unknown = [name for name in sites if name not in known]
    if unknown or isinstance(sites, str) or not sites:
        raise ValueError(f"sites must be a list of some of {known}; got {sites!r}.")
    return torch.cat([torch.arange(layout[name].start, layout[name].stop) for name in sites])


def _at_optimum(problem: Problem, seed: int) -> LinearResponse:
    elbo, x = _objective(problem, seed)
    if elbo.size > MAX_DENSE:
        raise LinearResponseError(
            f"with {elbo.size} latents it is computed for chosen sites only: name them, as in "
            "result.linear_response(['site'])."
        )
    return linear_response(x[: elbo.size], elbo.curvature(x).hessian)


def _objective(problem: Problem, seed: int) -> tuple[FixedDrawELBO, Tensor]:
    """The fixed-draw ELBO of a fit, with its location and log scale.

    Raises:
        LinearResponseError: If the fit is not one of Normal factors to the full data.
    """
    guide = problem.guide
    if not isinstance(guide, FlatGuide) or not isinstance(guide.family, Normal):
        raise LinearResponseError("linear response needs an AutoMeanField of Normal factors.")
    try:
        blocks = Blocks(problem.log_joint)
    except ModelError as error:
        raise LinearResponseError(f"linear response needs the full data: {error}") from error
    loc, scale = (p.detach().double().cpu() for p in guide.flat_params())
    elbo = FixedDrawELBO(blocks, fixed_draws(_HESSIAN_DRAWS, len(loc), seed=seed))
    return elbo, torch.cat([loc, scale.log()])
