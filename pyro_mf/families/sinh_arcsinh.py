"""Sinh-arcsinh factors: a Normal bent to have skew and tails of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_likelihood import maximise_on_own_axis

_LOG_2 = math.log(2.0)
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_REACH = 1.6448536269514722  # the standard normal's 95 % quantile
_ASINH_REACH = math.asinh(_REACH)
# Beyond these the law hardly changes, or nearly all of it is in a spike at the median.
_MAX_SKEW = 0.9999
_MIN_TAIL, _MAX_TAIL = 0.1, 8.0
_FARTHEST = 15.0  # arcsinh of the farthest noise that is squared: the density there is exp(-1e12)
# Nodes of the trapezoidal rule for the entropy, on the arcsinh of the noise.
_STEP, _NUM_STEPS = 0.0625, 46


@dataclass(frozen=True)
class SinhArcsinh(NormalNoise):
    r"""Sinh-arcsinh factors: :math:`u = \mu + \sigma\, c_t\, [\sinh a + k (\cosh a - 1)]`.

    Here :math:`a = t\,\mathrm{arcsinh}\,\varepsilon` for standard normal noise
    :math:`\varepsilon`, with skew :math:`-1 < k < 1` and tail weight :math:`t`: larger than 1 for
    heavier tails than a Normal's. The constant
    :math:`c_t = z / \sinh(t\,\mathrm{arcsinh}\,z)`, where z is the Normal's 95 % quantile, is such
    that for any skew and tail

    - ``loc`` is the median exactly,
    - ``scale`` is the distance between the 5 % and 95 % quantiles, in that of a standard Normal,
    - the quantiles' own skew, :math:`(q_{95} + q_5 - 2\mu) / (q_{95} - q_5)`, is
      :math:`k \tanh(\tfrac12 t\, \mathrm{arcsinh}\, z)`,

    so the parameters hardly push each other about. With skew 0 and tail 1 it is
    :math:`N(\mu, \sigma^2)`. This is the law of Jones and Pewsey with their
    :math:`\epsilon = \mathrm{arctanh}\,k` and :math:`\delta = 1/t`. The log density falls like
    :math:`-|u|^{2/t}`, so up to tail 2 every exponential has a finite expectation. The transform is
    monotone in the noise.

    Example:
        >>> family = SinhArcsinh()
        >>> loc, scale, skew, tail = family.init(torch.zeros(1), torch.ones(1))
        >>> family.quantile((loc, scale, skew, tail), torch.tensor(0.975))
        tensor([1.9600])
        >>> family.quantile((loc, scale, skew + 0.5, tail), torch.tensor(0.5))
        tensor([0.])

    References:
        Jones and Pewsey (2009), Sinh-arcsinh distributions, Biometrika 96(4), 761-780
    """

    @property
    def name(self) -> str:
        """``"sinh_arcsinh"``."""
        return "sinh_arcsinh"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale", "skew", "tail")``."""
        return ("loc", "scale", "skew", "tail")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, positive, between -0.9999 and 0.9999, and between 0.1 and 8."""
        skew = constraints.interval(-_MAX_SKEW, _MAX_SKEW)
        tail = constraints.interval(_MIN_TAIL, _MAX_TAIL)
        return (constraints.real, constraints.positive, skew, tail)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The Normal with this location and scale."""
        return (loc, scale, torch.zeros_like(loc), torch.ones_like(loc))

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Bend, shift and stretch the noise."""
        loc, scale, skew, tail = params
        a = tail * noise.asinh()
        # cosh a - 1 = 2 sinh(a / 2)^2 keeps its digits near the median.
        bent = a.sinh() + 2.0 * skew * (0.5 * a).sinh().square()
        return loc + scale * bent * (_REACH / (tail * _ASINH_REACH).sinh())

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        scale, skew, tail = params[1:]
        v, sinh_shifted = _bent_back(params, u)
        log_stretch = ((tail * _ASINH_REACH).sinh() / (tail * _REACH)).log() - scale.log()
        log_slope = (
            _log_cosh(v)
            - 0.5 * torch.log1p(sinh_shifted.square())
            - 0.5 * torch.log1p(-skew.square())
        )
        return _log_normal_of_sinh(v) + log_slope + log_stretch

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats.

        It is a one-dimensional integral, by the trapezoidal rule, which is exact to 1e-8 nats.
        """
        scale, skew, tail = params[1:]
        index = torch.arange(-_NUM_STEPS, _NUM_STEPS + 1, dtype=scale.dtype, device=scale.device)
        v = _STEP * index
        weights = _STEP * (_log_normal_of_sinh(v) + _log_cosh(v)).exp()
        a = tail[..., None] * v
        up, down = torch.log1p(skew)[..., None], torch.log1p(-skew)[..., None]
        log_slope = _log_sum_exp(a + up, down - a) - _LOG_2 - _log_cosh(v)
        log_stretch = scale.log() + (tail * _REACH / (tail * _ASINH_REACH).sinh()).log()
        return (weights * log_slope).sum(-1) + log_stretch + (0.5 + _HALF_LOG_2PI)

    def cdf(self, params: Params, u: Tensor) -> Tensor:
        """Probability of values up to ``u``."""
        probability: Tensor = torch.special.ndtr(_bent_back(params, u)[0].sinh())
        return probability

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        return self.transform(params, torch.special.ndtri(p.to(params[0].dtype)))

    def distribution(self, params: Params) -> Distribution:
        """The factors as a distribution; torch has no class of its own for them."""
        return FamilyDistribution(self, params, params[0].shape)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood."""
        return maximise_on_own_axis(self, u, log_weights, shapes=[(0.0, 3.0), (0.0, 7.0)])


def _bent_back(params: Params, u: Tensor) -> tuple[Tensor, Tensor]:
    """The arcsinh of the noise behind ``u``, and the sinh of ``a`` shifted by arctanh(skew)."""
    loc, scale, skew, tail = params
    x = (u - loc) / scale * ((tail * _ASINH_REACH).sinh() / _REACH)
    # sinh a + k (cosh a - 1) = sinh(a + arctanh k) / cosh(arctanh k) - k
    sinh_shifted = (x + skew) / (1.0 - skew.square()).sqrt()
    return (sinh_shifted.asinh() - skew.atanh()) / tail, sinh_shifted


def _log_cosh(v: Tensor) -> Tensor:
    return _log_sum_exp(v, -v) - _LOG_2


def _log_sum_exp(a: Tensor, b: Tensor) -> Tensor:
    """Log of exp(a) + exp(b), with derivatives of any order that stay finite far out."""
    return a - logsigmoid(a - b)


def _log_normal_of_sinh(v: Tensor) -> Tensor:
    """Log density of the standard Normal at sinh(v), far out along its tangent: it stays finite."""
    near = v.clamp(-_FARTHEST, _FARTHEST)
    noise = near.sinh()
    return -0.5 * noise.square() - noise * near.cosh() * (v - near) - _HALF_LOG_2PI
