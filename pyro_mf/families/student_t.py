"""Student-t factors, with degrees of freedom that are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.options import check_within
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_likelihood import maximise_on_own_axis

_START_DF = 10.0  # tails that draws can tell from a Normal's: from far above, nothing pulls down
_MAX_DF = 1000.0  # a Normal, for any purpose: the two are 2.5e-7 nats apart
# log Gamma(a + 1/2) - log Gamma(a) = log(a) / 2 + sum of c a^-k, for large a.
_STEP_SERIES = {1: -1 / 8, 3: 1 / 192, 5: -1 / 640, 7: 17 / 14336, 9: -31 / 18432}
_STEP_SHIFT = 16  # the recurrence lifts a by so much first: the series then is exact to 1e-16
# Double exponential quadrature over (0, inf) at exp(k h - exp(-k h)), of what falls like exp(-y).
_TAIL_STEP = 0.125
_TAIL_NODES = range(-29, 32)
_NEWTON_STEPS = 4


@dataclass(frozen=True)
class StudentT:
    r"""Student-t factors :math:`u = \mu + \sigma T`, with :math:`\nu` degrees of freedom.

    Draws are Bailey's: for two standard normal numbers :math:`\varepsilon` and
    :math:`\varepsilon'` of noise,

    .. math:: T = \varepsilon \sqrt{\frac{e^r - 1}{r}}, \qquad
       r = \frac{\varepsilon^2 + \varepsilon'^2}{\nu},

    which is exact, monotone in the first number, smooth in the degrees of freedom too, and becomes
    :math:`\varepsilon` as they grow.

    The reverse KL needs a posterior whose tails are a power law's too. Where its log density falls
    exponentially, as for the log of a Gamma variable, the expectation under a Student-t is minus
    infinity, however many the degrees of freedom. The forward KL has no such condition.

    Args:
        min_df: Fewest degrees of freedom, at least 1 and less than 10. By default 3, where the
            standard deviation is 1.7 scales. With 2 or fewer there is none, and just above it is
            in draws so rare that no average over draws finds it.

    Raises:
        ValueError: If ``min_df`` is out of range.

    Example:
        >>> family = StudentT()
        >>> loc, scale, df = family.init(torch.zeros(1), torch.ones(1))
        >>> df
        tensor([10.])
        >>> family.quantile((loc, scale, df), torch.tensor(0.975))
        tensor([1.9929])

    References:
        Bailey (1994), Polar generation of random variates with the t-distribution, Mathematics of
        Computation 62(206), 779-781
    """

    min_df: float = 3.0

    def __post_init__(self) -> None:
        check_within("min_df", self.min_df, 1.0, _START_DF - 1e-6)

    @property
    def name(self) -> str:
        """``"student_t"``."""
        return "student_t"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale", "df")``."""
        return ("loc", "scale", "df")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, positive, and between ``min_df`` and 1000."""
        degrees = constraints.interval(self.min_df, _MAX_DF)
        return (constraints.real, constraints.positive, degrees)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The one of 10 degrees of freedom with mean ``loc`` and standard deviation ``scale``."""
        shrink = math.sqrt((_START_DF - 2.0) / _START_DF)
        return (loc, scale * shrink, torch.full_like(loc, _START_DF))

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw standard normal noise, two numbers for each value, shape ``(*shape, 2)``."""
        return torch.randn((*shape, 2), dtype=dtype, device=device)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Stretch the first of two normal numbers by what their distance from zero says."""
        loc, scale, df = params
        # At zero noise the stretch is one, not 0 / 0.
        r = (noise.square().sum(-1) / df).clamp_min(torch.finfo(noise.dtype).tiny)
        return loc + scale * noise[..., 0] * (torch.expm1(r) / r).sqrt()

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale, df = params
        x = (u - loc) / scale
        return _log_peak(df) - 0.5 * (df + 1.0) * torch.log1p(x.square() / df) - scale.log()

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        _, scale, df = params
        return 0.5 * (df + 1.0) * _digamma_step(0.5 * df) - _log_peak(df) + scale.log()

    def cdf(self, params: Params, u: Tensor) -> Tensor:
        """Probability of values up to ``u``, to rounding."""
        loc, scale, df = (p.double() for p in params)
        x = (u.double() - loc) / scale
        tail = _log_tail((x.abs() / df.sqrt()).asinh(), df)[0].exp()
        return torch.where(x < 0.0, tail, 1.0 - tail).to(params[0])

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``, to rounding; without a gradient."""
        loc, scale, df = (x.detach().double() for x in params)
        p = p.double()
        least = torch.minimum(p, 1.0 - p)
        # Wallace's approximation turns the Normal's quantile into a start. From there Newton's
        # steps cannot fail: the log of the tail is concave in s = arcsinh(t / sqrt(df)).
        normal: Tensor = torch.special.ndtri(least) * (8.0 * df + 3.0) / (8.0 * df + 1.0)
        half = 0.5 * normal.square() / df
        s = half + torch.log1p((-torch.expm1(-2.0 * half)).sqrt())
        for _ in range(_NEWTON_STEPS):
            log_tail, ratio = _log_tail(s, df)
            s = (s + (log_tail - least.log()) * ratio).clamp_min(0.0)
        return (loc + scale * (p - 0.5).sign() * df.sqrt() * s.sinh()).to(params[0])

    def distribution(self, params: Params) -> Distribution:
        """A StudentT with batch shape that of the parameters."""
        loc, scale, df = params
        return torch.distributions.StudentT(df, loc, scale)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood."""
        return maximise_on_own_axis(self, u, log_weights, shapes=[(self.min_df + 1.0,)])


def _log_peak(df: Tensor) -> Tensor:
    """Log density at the location, for scale one."""
    return _log_gamma_step(0.5 * df) - 0.5 * (math.pi * df).log()


def _log_gamma_step(a: Tensor) -> Tensor:
    """Log Gamma(a + 1/2) - log Gamma(a), without the difference of two large numbers."""
    series = sum(
        (c * (a + _STEP_SHIFT) ** -k for k, c in _STEP_SERIES.items()), torch.zeros_like(a)
    )
    return 0.5 * (a + _STEP_SHIFT).log() + series - torch.log1p(0.5 / _lifted(a)).sum(-1)


def _digamma_step(a: Tensor) -> Tensor:
    """The derivative of that by a: digamma(a + 1/2) - digamma(a)."""
    x = a + _STEP_SHIFT
    series = sum((-k * c * x ** -(k + 1) for k, c in _STEP_SERIES.items()), torch.zeros_like(a))
    lifted = _lifted(a)
    return 0.5 / x + series + (0.5 / (lifted * (lifted + 0.5))).sum(-1)


def _lifted(a: Tensor) -> Tensor:
    return a[..., None] + torch.arange(_STEP_SHIFT, dtype=a.dtype, device=a.device)


def _log_tail(s: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log probability of :math:`T > \sqrt\nu \sinh s`, and minus the inverse of its slope by s.

    In terms of s the density is :math:`\cosh^{-\nu} s`, so the tail over the density is the
    integral over y of :math:`(\cosh y + \tanh s \sinh y)^{-\nu}`. In units of where that has
    fallen to 1 / e it is between a Normal's tail and an exponential, and one rule integrates it.
    """
    slope = df * s.tanh()
    width = 2.0 / (slope + (slope.square() + 2.0 * df).sqrt())
    ratio = torch.zeros_like(width + s)
    for k in _TAIL_NODES:
        shrink = math.exp(-k * _TAIL_STEP)
        node = math.exp(k * _TAIL_STEP - shrink)
        y = node * width
        growth = torch.log1p(2.0 * (0.5 * y).sinh().square() + s.tanh() * y.sinh())
        ratio = ratio + _TAIL_STEP * (1.0 + shrink) * node * (-df * growth).exp()
    ratio = ratio * width
    log_cosh = s + torch.log1p(0.5 * torch.expm1(-2.0 * s))
    return _log_peak(df) + 0.5 * df.log() - df * log_cosh + ratio.log(), ratio
