"""Beta factors of latents between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from pyro_mf.families.dirichlet_fit import fit_dirichlet, mean_log_sigmoids
from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma import Gamma
from pyro_mf.families.gamma_function import POSITIVE, digamma_remainder, log_gamma_remainder
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
from pyro_mf.families.weighted_draws import mean_and_sd

_FAR = 600.0  # logits from the mode, where exp does not overflow yet
_RARE = 12.0  # logit beyond which a Beta is a Gamma law of the small side, to 1e-5


@dataclass(frozen=True)
class Beta(NormalNoise):
    r"""Beta factors of latents between 0 and 1, as laws of :math:`u = \mathrm{logit}\, X`.

    The log density on this axis is :math:`a \log\sigma(u) + b \log\sigma(-u) - \log B(a, b)`. The
    transform is the quantile at the noise's own probability: monotone in its standard normal noise,
    exact to rounding for concentrations from 1e-4 to 1e8, also where ``X`` itself is 0 or 1 in
    floating point, and so are its gradients (see :mod:`~pyro_mf.families.log_concave`).

    Example:
        >>> family = Beta()
        >>> params = (torch.tensor([2.0]), torch.tensor([3.0]))
        >>> family.quantile(params, torch.tensor(0.5)).sigmoid()
        tensor([0.3857])
    """

    @property
    def name(self) -> str:
        """``"beta"``."""
        return "beta"

    @property
    def native_to(self) -> str:
        """``"unit_interval"``."""
        return "unit_interval"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("concentration1", "concentration0")``, as in torch: of 1 and of 0."""
        return ("concentration1", "concentration0")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Positive both, stored as logarithms."""
        return (POSITIVE, POSITIVE)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member of least forward divergence from a Normal law of ``logit X``."""
        near = fit_dirichlet(torch.stack(mean_log_sigmoids(loc, scale), -1)).to(loc.dtype)
        rare = Gamma().init(-loc.abs(), scale)
        return _where_rare(loc, scale, rare, near)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability."""
        return value_at_noise(LogitBeta(), noise, *params)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of ``logit X``, in nats."""
        return _log_density(u, *params)

    def entropy(self, params: Params) -> Tensor:
        """Entropy of ``logit X``, in nats."""
        a, b = params

        def part(x: Tensor) -> Tensor:
            return log_gamma_remainder(x) - x * digamma_remainder(x)

        return part(a) + part(b) - part(a + b)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of ``logit X`` below which the probability is ``p``."""
        return quantile_at(LogitBeta(), p, *params)

    def distribution(self, params: Params) -> Distribution:
        """The law of ``logit X``."""
        return FamilyDistribution(self, params, params[0].shape)

    def native(self, params: Params) -> Distribution:
        """A Beta on the unit interval."""
        concentration1, concentration0 = params
        return torch.distributions.Beta(concentration1, concentration0)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted means of ``log X`` and ``log(1 - X)``, the forward KL's optimum."""
        x, weights = u.double(), torch.softmax(log_weights.double(), 0)
        means = torch.stack([weights @ logsigmoid(x), weights @ logsigmoid(-x)], -1)
        near = fit_dirichlet(means).to(u.dtype)
        mean, sd = mean_and_sd(x, log_weights)
        rare = Gamma().fit_weighted(torch.where(mean < 0.0, u, -u), log_weights)
        return _where_rare(mean, sd, rare, near)


def _where_rare(loc: Tensor, scale: Tensor, rare: Params, near: Tensor) -> Params:
    """A Gamma law of the lesser of X and 1 - X where the other is nearly 1, else ``near``."""
    is_rare = loc.abs() > _RARE + 3.0 * scale
    low, high = torch.where(loc < 0.0, rare[0], rare[1]), torch.where(loc < 0.0, rare[1], rare[0])
    return torch.where(is_rare, low, near[..., 0]), torch.where(is_rare, high, near[..., 1])


def _log_density(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Log density of logit X, from the mode's, so that large terms cancel before they are rounded.

    With t the distance from the mode, ``log sigmoid(u)`` is there ``-log1p(q expm1(-t))`` above its
    value at the mode, where ``X = 1 - q``.
    """
    distance, p, q = u - (a.log() - b.log()), a / (a + b), b / (a + b)
    near = distance.clamp(-1.0, 1.0)
    small = -a * torch.log1p(q * torch.expm1(-near)) - b * torch.log1p(p * near.expm1())
    large = a * (logsigmoid(u) - p.log()) + b * (logsigmoid(-u) - q.log())
    height = log_gamma_remainder(a + b) - log_gamma_remainder(a) - log_gamma_remainder(b)
    return torch.where(distance.abs() < 1.0, small, large) + height


@dataclass(frozen=True)
class LogitBeta:
    """The law of the logit of a Beta variable, by its tails; the right one is the mirror's left."""

    def mode(self, *shape: Tensor) -> Tensor:
        """Where the density of the logit is highest."""
        a, b = shape
        return a.log() - b.log()

    def side(self, is_left: Tensor, *shape: Tensor) -> LogitBetaSide:
        """Left sides or right ones; see :class:`~pyro_mf.families.log_concave.LogConcave`."""
        a, b = shape
        return LogitBetaSide(torch.where(is_left, a, b), torch.where(is_left, b, a))

    def sensitivities(self, u: Tensor, is_left: Tensor, *shape: Tensor) -> tuple[Tensor, ...]:
        """Derivatives by both concentrations."""
        side = self.side(is_left, *shape)
        u, a, b = torch.where(is_left, u, -u), side.a, side.b
        log_x, log_y, integrand = side.leftwards(u, NUM_NODES)
        total = torch.digamma(a + b + 1.0)
        in_x = logsigmoid(u) - torch.digamma(a + 1.0)
        in_y = logsigmoid(-u) - torch.digamma(b)
        by_a = (integrand * (log_x + (in_x + total)[..., None])).sum(-1)
        by_b = (integrand * (log_y + (in_y + total)[..., None])).sum(-1)
        ahead, edge = u.sigmoid() * (a + b), torch.digamma(a + b)
        by_a, by_b = (in_x + edge + ahead * by_a) / a, (in_y + edge + ahead * by_b) / a
        return torch.where(is_left, by_a, -by_b), torch.where(is_left, by_b, -by_a)


class LogitBetaSide:
    """The left side of the law of the logit of a Beta variable.

    The density to the left is taken to be that of concentration ``a + 1``, which has no exponential
    part of length ``1 / a``: ``I_x(a, b) = I_x(a + 1, b) + f(u) / a``.

    Args:
        a: Concentration of 1, positive, in doubles.
        b: Concentration of 0.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b, self._both = a, b, a + b
        self._mode = a.log() - b.log()
        self._is_low = a < b  # whichever of X and 1 - X is near 1 has the small logarithm
        self._minor = torch.minimum(a, b) / self._both
        self._linear = torch.where(self._is_low, a, -b)
        whole = log_gamma_remainder(self._both)
        self._height = whole - log_gamma_remainder(a) - log_gamma_remainder(b)

    def mode(self) -> Tensor:
        """Where the density is highest."""
        return self._mode

    def tail(self, u: Tensor, num_nodes: int) -> Tail:
        """Mass of a tail; see :class:`~pyro_mf.families.log_concave.Side`."""
        distance = self._mode - u
        near = distance.clamp_max(_FAR)
        small = torch.log1p(self._minor * torch.where(self._is_low, -near, near).expm1())
        small = small + torch.where(self._is_low, 0.0, distance - near)
        fall = self._both * small + self._linear * distance
        p = u.sigmoid()
        integral = self.leftwards(u, num_nodes)[-1].sum(-1)
        ratio = (1.0 + p * self._both * integral) / self.a
        return Tail(self._height - fall + ratio.log(), ratio, self.a - self._both * p)

    def leftwards(self, u: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """``log X`` and ``log(1 - X)`` left of ``u`` less those at it, and the weighted density."""
        with torch.no_grad():  # where the tail is cut off does not matter
            length = self._length(u)
        nodes, weights = nodes_and_weights(u, num_nodes)
        steps = length[..., None] * nodes
        is_low = u < 0.0
        out = torch.where(is_low, -1.0, 1.0).to(u)[..., None]
        small = torch.log1p(torch.sigmoid(-u.abs())[..., None] * torch.expm1(out * steps))
        linear = (out * torch.where(is_low, self.a + 1.0, self.b)[..., None]) * steps
        fall = (self._both + 1.0)[..., None] * small - linear
        integrand = length[..., None] * weights * torch.exp(-fall)
        log_y = torch.where(is_low[..., None], -small, steps - small)
        return log_y - steps, log_y, integrand

    def _length(self, u: Tensor) -> Tensor:
        """A bound, hardly too long, on the length on which the log density falls by NEGLIGIBLE.

        The fall at distance r is a straight line in r and ``a + 1 + b`` times
        ``log(p + q e^r) - q r``, both convex, so that it takes longer for either alone.
        """
        p, q = u.sigmoid(), torch.sigmoid(-u)
        curved = NEGLIGIBLE / (self._both + 1.0)
        length = (2.0 * curved / (p * q)).sqrt() + curved / p
        length = torch.minimum(length, (curved - logsigmoid(-u)) / p)
        slope = ((self.a + 1.0) * q - self.b * p).clamp_min(torch.finfo(u.dtype).tiny)
        length = torch.minimum(length, NEGLIGIBLE / slope)
        return torch.minimum(length, torch.log1p(torch.expm1(curved + q * length) / q))
