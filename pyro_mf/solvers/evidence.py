r"""Bounds on the log evidence, from below by an approximation, from above by posterior draws.

For any normalised q, :math:`\mathrm{ELBO} = \mathbb{E}_q[\log p(x, z) - \log q(z)]` is the log
evidence minus KL(q || p), and :math:`\mathrm{EUBO} = \mathbb{E}_p[\log p(x, z) - \log q(z)]` is the
log evidence plus KL(p || q).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mf.solvers.fixed_draw_elbo import Estimate


class EvidenceBounds(NamedTuple):
    """The log evidence lies between these two, up to their errors.

    Args:
        lower: The best ELBO known, in nats.
        lower_se: Its standard error.
        upper: The best EUBO known, in nats.
        upper_se: Its standard error.
    """

    lower: float
    lower_se: float
    upper: float
    upper_se: float


def bounds_from(elbos: list[Estimate], eubos: list[Estimate]) -> EvidenceBounds:
    """The tightest bounds among estimates, each by an approximation of its own.

    Example:
        >>> bounds_from([Estimate(-2.0, 0.1), Estimate(-1.0, 0.1)], [Estimate(1.0, 0.1)])
        EvidenceBounds(lower=-1.0, lower_se=0.1, upper=1.0, upper_se=0.1)
    """
    lower = max((e for e in elbos if not math.isnan(e.elbo)), default=Estimate(-math.inf, math.nan))
    upper = min((e for e in eubos if not math.isnan(e.elbo)), default=Estimate(math.inf, math.nan))
    return EvidenceBounds(*lower, *upper)


def gaussian_log_prob(z: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Log density of a Gaussian at the rows of ``z``, shape ``(S,)``."""
    gaussian = torch.distributions.MultivariateNormal(
        loc, scale_tril=scale_tril, validate_args=False
    )
    return gaussian.log_prob(z)  # type: ignore[no-any-return]
