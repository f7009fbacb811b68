"""What is judged: an approximation of the posterior, as draws with their log density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf.convert.guide_draws import draw_guide
from pyro_mf.density import LogJoint
from pyro_mf.diagnostics.khat import marginal_log_prob
from pyro_mf.diagnostics.proposals import Proposal, guide_proposal, response_proposal
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.posterior_draws import PosteriorDraws


@dataclass(frozen=True, eq=False)
class Claim:
    """An approximation that claims to be the posterior.

    Args:
        name: What it is, in a word or two.
        draw: Independent draws ``(num, D)`` on the unconstrained space, from a number and a seed.
        proposal: The same with its density; ``None`` where it has none.
        elementwise: Log density of each latent's marginal at rows ``(S, D)``, NaN where it is not
            known.
    """

    name: str
    draw: Callable[[int, int], Tensor]
    proposal: Proposal | None = None
    elementwise: Callable[[Tensor], Tensor] | None = None


def claim_of_guide(guide: Any, log_joint: LogJoint) -> Claim:
    """The claim of a trained guide.

    Raises:
        TypeError: If it cannot be called.
        GuideNotSetUpError: If it has never seen its model run.
        GuideMismatchError: If it is a guide of another model, or of other data; from ``draw`` if it
            is none of ours.
    """
    proposal = guide_proposal(guide, log_joint)
    args, kwargs = log_joint.model_args, log_joint.model_kwargs

    def draw(num: int, seed: int) -> Tensor:
        z = draw_guide(guide, args, kwargs, log_joint.layout, num, seed).z
        return z.detach().double().cpu()

    if not isinstance(guide, FlatGuide):
        return Claim("the guide", draw, proposal)

    def elementwise(z: Tensor) -> Tensor:
        own = guide.layout.pack(log_joint.layout.unpack(z))
        known = marginal_log_prob(guide, own.to(guide.flat_leaves()[0])).double().cpu()
        return log_joint.layout.pack(guide.layout.unpack(known))

    return Claim("the guide", draw, proposal, elementwise)


def claim_of_response(response: LinearResponse) -> Claim:
    """The claim of the Gaussian that linear response gives."""
    exact = LinearResponse(response.loc.double().cpu(), response.covariance.double().cpu())
    marginals = torch.distributions.Normal(exact.loc, exact.sd, validate_args=False)

    def draw(num: int, seed: int) -> Tensor:
        return exact.sample(num, seed=seed)

    return Claim("linear response", draw, response_proposal(exact), marginals.log_prob)


def claim_of_draws(draws: PosteriorDraws) -> Claim:
    """The claim of draws that were made of the posterior."""

    def draw(num: int, seed: int) -> Tensor:
        return draws.sample(num, seed=seed)

    return Claim("the draws", draw)
