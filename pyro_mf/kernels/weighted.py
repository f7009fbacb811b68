r"""Weighted draws from a posterior, with errors that say how far they can be believed.

Draws come in *units* that are independent of each other: a net of quasi-random points, a run of a
particle filter. Within a unit anything goes. Units come in *strata*, within which they are alike:
the rounds of an adaptive sampler. The error of a self-normalised average is then that of a ratio of
sums over units (the delta method), whatever made the draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_mf.weights import effective_sample_size, normalize

_BISECTIONS = 60


@dataclass(frozen=True, eq=False)
class WeightedDraws:
    r"""Draws :math:`z_s` with importance weights :math:`w_s` against an unnormalised density.

    Args:
        z: Draws on the unconstrained space, shape ``(S, D)``.
        log_weights: Log weights, shape ``(S,)``; the log of their mean is ``log_evidence``.
        log_density: Log of the unnormalised density at the draws, shape ``(S,)``.
        strata: Number of strata; draws are in the order of strata, and there of units.
        units: Number of units in each stratum, all of one size.
        khat: Pareto index of the weights, ``-inf`` where they are constant; ``nan`` where the
            draws are no importance sample, so that it would say nothing.
        num_evaluations: Density evaluations spent.
        problems: Why the draws should not be trusted, in words; empty where they can be.

    Example:
        >>> draws = WeightedDraws(
        ...     z=torch.tensor([[0.0], [1.0]]),
        ...     log_weights=torch.tensor([0.0, 0.0]),
        ...     log_density=torch.zeros(2),
        ...     strata=1,
        ...     units=2,
        ...     khat=0.0,
        ...     num_evaluations=2,
        ... )
        >>> draws.mean, draws.sd
        (tensor([0.5000]), tensor([0.5000]))
    """

    z: Tensor
    log_weights: Tensor
    log_density: Tensor
    strata: int
    units: int
    khat: float
    num_evaluations: int
    problems: tuple[str, ...] = ()

    @property
    def trusted(self) -> bool:
        """Whether no check found anything wrong."""
        return not self.problems

    @cached_property
    def weights(self) -> Tensor:
        """Weights that sum to one, shape ``(S,)``."""
        return normalize(self.log_weights).exp()

    @cached_property
    def mean(self) -> Tensor:
        """Means, shape ``(D,)``."""
        return self.weights @ self.z

    @cached_property
    def covariance(self) -> Tensor:
        """Covariances, shape ``(D, D)``."""
        return weighted_moments(self.z, self.weights)[1]

    @property
    def sd(self) -> Tensor:
        """Standard deviations, shape ``(D,)``."""
        return self.covariance.diagonal().sqrt()

    @property
    def ess(self) -> float:
        """Kish's effective sample size of the weights: that of independent draws."""
        return float(effective_sample_size(self.log_weights))

    @cached_property
    def mean_error(self) -> Tensor:
        """Monte Carlo standard errors of the means, in sds, shape ``(D,)``."""
        return self.expectation(self.z)[1] / self.sd

    @cached_property
    def sd_error(self) -> Tensor:
        """Relative Monte Carlo standard errors of the sds, shape ``(D,)``."""
        squares = (self.z - self.mean).square()
        return self.expectation(squares)[1] / (2.0 * self.sd.square())

    @property
    def log_evidence(self) -> float:
        """Log of the density's integral, in nats."""
        return float(torch.logsumexp(self.log_weights, 0)) - math.log(len(self.log_weights))

    @property
    def log_evidence_se(self) -> float:
        """Monte Carlo standard error of the log evidence; infinite where a stratum is one unit."""
        share = torch.full_like(self.weights, 1.0 / len(self.weights))
        return float(self._spread((self.weights - share)[:, None]))

    def expectation(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior expectations of functions of the draws.

        Args:
            values: The functions' values at the draws, shape ``(S, K)``.

        Returns:
            Estimates and their Monte Carlo standard errors, each of shape ``(K,)``.
        """
        estimate = self.weights @ values
        return estimate, self._spread(self.weights[:, None] * (values - estimate))

    def _spread(self, terms: Tensor) -> Tensor:
        """Standard error of a sum of terms, shape ``(S, K)``, independent by unit."""
        if self.units < 2:
            return terms.new_full(terms.shape[1:], torch.inf)
        sums = terms.reshape(self.strata, self.units, -1, *terms.shape[1:]).sum(2)
        variance: Tensor = self.units * sums.var(1).sum(0)
        return variance.sqrt()


def weighted_moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, shape ``(D,)``, and covariance, ``(D, D)``, under weights that sum to one.

    Args:
        z: Draws, shape ``(S, D)``.
        weights: Shape ``(S,)``.

    Example:
        >>> weighted_moments(torch.tensor([[0.0], [4.0]]), torch.tensor([0.75, 0.25]))
        (tensor([1.]), tensor([[3.]]))
    """
    mean = weights @ z
    centred = z - mean
    return mean, (weights[:, None] * centred).T @ centred


def temper(log_ratio: Tensor, target_ess: float, most: float = 1.0) -> float:
    """The largest power of weights at which they are worth a given number of draws.

    Args:
        log_ratio: Log weights at power one, shape ``(S,)``; ``-inf`` is a weight of zero.
        target_ess: Effective sample size to keep.
        most: Largest power.

    Returns:
        A power above 0 and at most ``most``; next to 0 where nothing else reaches the target.

    Example:
        >>> temper(torch.tensor([0.0, 0.1]), target_ess=1.5)
        1.0
        >>> temper(torch.tensor([0.0, 100.0]), target_ess=1.5) < 0.1
        True
    """
    if float(effective_sample_size(most * log_ratio)) >= target_ess:
        return most
    low, high = 0.0, most
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if float(effective_sample_size(middle * log_ratio)) >= target_ess:
            low = middle
        else:
            high = middle
    return low or high
