"""What is judged: an approximation of the posterior, as draws with their log density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf.convert.guide_draws import GuideDraws, check_ready, draw_guide
from pyro_mf.density import LogJoint
from pyro_mf.families.protocol import event_dim_of
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.evidence import gaussian_log_prob
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.posterior_draws import PosteriorDraws


@dataclass(frozen=True, eq=False)
class Claim:
    """An approximation that claims to be the posterior.

    Args:
        name: What it is, in a word or two: ``"mean field"``.
        draw: Draws of the latents and their log density, from a number and a seed.
        elementwise: Log density of each latent's marginal at rows ``(S, D)``, where it is known.
    """

    name: str
    draw: Callable[[int, int], GuideDraws]
    elementwise: Callable[[Tensor], Tensor] | None = None


def claim_of_guide(guide: Any, log_joint: LogJoint) -> Claim:
    """The claim of a trained guide.

    Raises:
        TypeError: If it cannot be called.
        GuideNotSetUpError: If it has never seen its model run.
        GuideMismatchError: From ``draw``, if it is a guide of another model, or of other data.
    """
    check_ready(guide)
    args: tuple[Any, ...] = log_joint.model_args
    kwargs: Mapping[str, Any] = log_joint.model_kwargs

    def draw(num: int, seed: int) -> GuideDraws:
        found = draw_guide(guide, args, kwargs, log_joint.layout, num, seed)
        log_q = None if found.log_q is None else found.log_q.detach().double().cpu()
        return GuideDraws(found.z.detach().double().cpu(), log_q, found.why_no_log_q)

    elementwise = None
    if isinstance(guide, FlatGuide) and not event_dim_of(guide.family):
        params = tuple(p.detach().double().cpu() for p in guide.flat_params())

        def elementwise(z: Tensor) -> Tensor:
            log_prob: Tensor = guide.family.log_prob(params, z)
            return log_prob

    return Claim("the guide", draw, elementwise)


def claim_of_response(response: LinearResponse) -> Claim:
    """The claim of the Gaussian that linear response gives."""
    exact = LinearResponse(response.loc.double().cpu(), response.covariance.double().cpu())

    def draw(num: int, seed: int) -> GuideDraws:
        z = exact.sample(num, seed=seed)
        return GuideDraws(z, gaussian_log_prob(z, exact.loc, exact.scale_tril), "")

    marginals = torch.distributions.Normal(exact.loc, exact.sd, validate_args=False)
    return Claim("linear response", draw, marginals.log_prob)


def claim_of_draws(draws: PosteriorDraws) -> Claim:
    """The claim of draws that were made of the posterior."""

    def draw(num: int, seed: int) -> GuideDraws:
        return GuideDraws(draws.sample(num, seed=seed), None, "they are draws, without a density")

    return Claim("the draws", draw)
