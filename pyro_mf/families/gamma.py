"""Gamma factors of positive latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma_function import (
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
from pyro_mf.families.protocol import Params

_LEAST_SPREAD, _MOST_SPREAD = 1e-12, 1e12  # of log X, between which concentrations are found
_NUM_STEPS = 10


@dataclass(frozen=True)
class Gamma:
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
        """Positive both."""
        return (constraints.positive, constraints.positive)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member whose logarithm has mean ``loc`` and standard deviation ``scale``."""
        spread = scale.double().square().clamp(_LEAST_SPREAD, _MOST_SPREAD)
        concentration = inverse_trigamma(spread)
        return _representable(concentration, torch.digamma(concentration) - loc, loc.dtype)

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw standard normal noise."""
        return torch.randn(shape, dtype=dtype, device=device)

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

    def tail(self, u: Tensor, is_left: Tensor, *shape: Tensor, num_nodes: int) -> Tail:
        """Mass of a tail; see :class:`~pyro_mf.families.log_concave.LogConcave`."""
        (a,), x = shape, u.exp()
        integral = _outwards(u, is_left, a, num_nodes)[1].sum(-1)
        ratio = torch.where(is_left, (1.0 + x * integral) / a, integral)
        distance = u - a.log()
        log_density = a * (distance - distance.expm1()) - log_gamma_remainder(a)
        slope = torch.where(is_left, a - x, x - a)
        return Tail(log_density + ratio.log(), ratio, slope)

    def sensitivities(self, u: Tensor, is_left: Tensor, *shape: Tensor) -> tuple[Tensor, ...]:
        """Derivative by the concentration."""
        (a,) = shape
        steps, integrand = _outwards(u, is_left, a, NUM_NODES)
        centred = u - torch.digamma(torch.where(is_left, a + 1.0, a))
        integral = (integrand * (centred[..., None] + steps)).sum(-1)
        return (torch.where(is_left, (centred + u.exp() * integral) / a, -integral),)


def _outwards(u: Tensor, is_left: Tensor, a: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Steps from ``u`` into a tail, and the weighted density there over that at ``u``.

    The left tail is that of concentration ``a + 1``, which has no exponential part of length
    ``1 / a`` that a quadrature would have to reach across: ``P(a, x) = P(a + 1, x) + x f(x) / a``.
    """
    with torch.no_grad():  # where it is cut off does not matter
        length = _length(u, is_left, a)
    nodes, weights = nodes_and_weights(u, num_nodes)
    out = torch.where(is_left, -1.0, 1.0).to(u)
    shape = torch.where(is_left, a + 1.0, a)[..., None]
    steps = (out * length)[..., None] * nodes
    falling = torch.exp(shape * steps - u.exp()[..., None] * steps.expm1())
    return steps, length[..., None] * weights * falling


def _length(u: Tensor, is_left: Tensor, a: Tensor) -> Tensor:
    """Length on which a tail's log density falls by NEGLIGIBLE: a bound, and Newton's method.

    The fall is convex, the sum of a straight line and of a curved part, and is longer for either
    alone; from the right of its root Newton's method stays there.
    """
    x, out = u.exp(), torch.where(is_left, -1.0, 1.0).to(u)
    shape = torch.where(is_left, a + 1.0, a)
    curved = NEGLIGIBLE / x
    root = (2.0 * curved).sqrt()
    bound = torch.where(is_left, curved + root, torch.minimum(root, (2.0 * curved).log1p() + 1.0))
    slope = (out * (x - shape)).clamp_min(torch.finfo(x.dtype).tiny)
    length = torch.minimum(bound, NEGLIGIBLE / slope)
    for _ in range(2):
        fall = x * torch.expm1(out * length) - out * shape * length
        length = length - (fall - NEGLIGIBLE) / (out * (x * torch.exp(out * length) - shape))
    return length
