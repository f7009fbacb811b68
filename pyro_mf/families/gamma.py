"""Gamma factors of positive latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma_function import (
    POSITIVE,
    digamma_remainder,
    inverse_trigamma,
    log_gamma_remainder,
)
from pyro_mf.families.log_concave import (
    NEGLIGIBLE,
    NUM_NODES,
    Tail,
    nodes_and_weights,
    quantile_at,
    value_at_noise,
)
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params

_LEAST_SPREAD, _MOST_SPREAD = 1e-12, 1e12  # of log X, between which concentrations are found
_NUM_STEPS = 10


@dataclass(frozen=True)
class Gamma(NormalNoise):
    r"""Gamma factors of positive latents, as laws of :math:`u = \log X`.

    The log density on this axis is :math:`a(u + \log b) - b e^u - \log\Gamma(a)`. The transform is
    the quantile at the noise's own probability: monotone in its standard normal noise, exact to
    rounding for concentrations from 1e-4 to 1e8, also where ``X`` itself underflows, and so are its
    gradients (see :mod:`~pyro_mf.families.log_concave`). The rate is stored as such: a rate outside
    of the floating-point numbers, as of laws wider than some 700 on this axis, is cut off.

    Example:
        >>> family = Gamma()
        >>> params = (torch.tensor([2.0]), torch.tensor([3.0]))
        >>> family.quantile(params, torch.tensor(0.5)).exp()
        tensor([0.5594])
    """

    @property
    def name(self) -> str:
        """``"gamma"``."""
        return "gamma"

    @property
    def native_to(self) -> str:
        """``"positive"``."""
        return "positive"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("concentration", "rate")``."""
        return ("concentration", "rate")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Positive both, stored as logarithms."""
        return (POSITIVE, POSITIVE)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member whose logarithm has mean ``loc`` and standard deviation ``scale``."""
        spread = scale.double().square().clamp(_LEAST_SPREAD, _MOST_SPREAD)
        concentration = inverse_trigamma(spread)
        return _representable(concentration, torch.digamma(concentration) - loc, loc.dtype)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability."""
        concentration, rate = params
        return value_at_noise(LogGamma(), noise, concentration) - rate.log()

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of ``log X``, in nats.

        Far right of all mass, where ``exp`` would overflow, it goes on in a straight line.
        """
        concentration, rate = params
        distance = u + rate.log() - concentration.log()  # from the mode
        highest = 0.5 * math.log(torch.finfo(u.dtype).max)
        inner = distance.clamp_max(highest)
        growth = inner.expm1() + inner.exp() * (distance - inner)
        return concentration * (distance - growth) - log_gamma_remainder(concentration)

    def entropy(self, params: Params) -> Tensor:
        """Entropy of ``log X``, in nats; it does not depend on the rate."""
        concentration, rate = params
        entropy = log_gamma_remainder(concentration)
        entropy = entropy - concentration * digamma_remainder(concentration)
        return entropy.expand(torch.broadcast_shapes(concentration.shape, rate.shape))

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of ``log X`` below which the probability is ``p``."""
        concentration, rate = params
        return quantile_at(LogGamma(), p, concentration) - rate.log()

    def distribution(self, params: Params) -> Distribution:
        """The law of ``log X``."""
        return FamilyDistribution(self, params, params[0].shape)

    def native(self, params: Params) -> Distribution:
        """A Gamma on the positive numbers."""
        concentration, rate = params
        return torch.distributions.Gamma(concentration, rate)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted means of ``X`` and ``log X``, the forward KL's optimum.

        References:
            Minka, Estimating a Gamma distribution, 2002.
        """
        x = u.double()
        log_weights = log_weights.double().log_softmax(0)[:, None]
        mean = (log_weights.exp() * x).sum(0)
        gap = (x - mean + log_weights).logsumexp(0).clamp(_LEAST_SPREAD, _MOST_SPREAD)
        start = (3.0 - gap + ((gap - 3.0).square() + 24.0 * gap).sqrt()) / (12.0 * gap)
        inverse = 1.0 / start.clamp_min(0.5 / gap)
        for _ in range(_NUM_STEPS):  # Newton's method in a function that is nearly straight
            a = 1.0 / inverse
            curvature = a * a * (inverse - torch.polygamma(1, a))
            inverse = inverse - (gap + digamma_remainder(a)) / curvature
        concentration = 1.0 / inverse
        return _representable(concentration, concentration.log() - mean - gap, u.dtype)


def _representable(concentration: Tensor, log_rate: Tensor, dtype: torch.dtype) -> Params:
    limits = torch.finfo(dtype)
    log_rate = log_rate.clamp(math.log(limits.tiny), 0.99 * math.log(limits.max))
    return concentration.to(dtype), log_rate.exp().to(dtype)


@dataclass(frozen=True)
class LogGamma:
    """The law of the logarithm of a standard Gamma variable, by its tails."""

    def mode(self, *shape: Tensor) -> Tensor:
        """Where the density of the logarithm is highest."""
        return shape[0].log()

    def side(self, is_left: Tensor, *shape: Tensor) -> LogGammaSide:
        """Left sides or right ones; see :class:`~pyro_mf.families.log_concave.LogConcave`."""
        return LogGammaSide(is_left, shape[0])

    def sensitivities(self, u: Tensor, is_left: Tensor, *shape: Tensor) -> tuple[Tensor, ...]:
        """Derivative by the concentration."""
        side = LogGammaSide(is_left, shape[0])
        steps, integrand = side.outwards(u.exp(), NUM_NODES)
        centred = u - torch.digamma(side.shape)
        integral = (integrand * (centred[..., None] + steps)).sum(-1)
        return (torch.where(is_left, (centred + u.exp() * integral) / shape[0], -integral),)


class LogGammaSide:
    """One side of the law of the logarithm of a standard Gamma variable.

    The left tail is that of concentration ``a + 1``, which has no exponential part of length
    ``1 / a`` that a quadrature would have to reach across: ``P(a, x) = P(a + 1, x) + x f(x) / a``.

    Args:
        is_left: Where the side is the left one.
        concentration: Positive numbers a, in doubles.
    """

    def __init__(self, is_left: Tensor, concentration: Tensor) -> None:
        self.is_left = is_left
        self.concentration = concentration
        self.out = torch.where(is_left, -1.0, 1.0).to(concentration)
        self.shape = torch.where(is_left, concentration + 1.0, concentration)
        self._log = concentration.log()
        self._height = -log_gamma_remainder(concentration)

    def mode(self) -> Tensor:
        """Where the density is highest, on the mirrored axis."""
        return -self.out * self._log

    def tail(self, u: Tensor, num_nodes: int) -> Tail:
        """Mass of a tail; see :class:`~pyro_mf.families.log_concave.Side`."""
        u, a = -self.out * u, self.concentration
        x = u.exp()
        integral = self.outwards(x, num_nodes)[1].sum(-1)
        ratio = torch.where(self.is_left, (1.0 + x * integral) / a, integral)
        distance = u - self._log
        log_density = a * (distance - distance.expm1()) + self._height
        return Tail(log_density + ratio.log(), ratio, self.out * (x - a))

    def outwards(self, x: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
        """Steps from ``log x`` into the tail, and the weighted density there over that at x."""
        with torch.no_grad():  # where it is cut off does not matter
            length = self._length(x)
        nodes, weights = nodes_and_weights(x, num_nodes)
        steps = (self.out * length)[..., None] * nodes
        falling = torch.exp(self.shape[..., None] * steps - x[..., None] * steps.expm1())
        return steps, length[..., None] * weights * falling

    def _length(self, x: Tensor) -> Tensor:
        """A bound, hardly too long, on the length on which the log density falls by NEGLIGIBLE.

        The fall is the sum of a straight line and of a convex part, and takes longer for either
        alone.
        """
        curved = NEGLIGIBLE / x
        root = (2.0 * curved).sqrt()
        bound = torch.where(
            self.is_left, curved + root, torch.minimum(root, (2.0 * curved).log1p() + 1.0)
        )
        slope = (self.out * (x - self.shape)).clamp_min(torch.finfo(x.dtype).tiny)
        return torch.minimum(bound, NEGLIGIBLE / slope)
