"""The von Mises law around 0: its constants, quantiles and their exact gradients.

Half of the circle is one tail: its mass over the density at its boundary is an integral that a
fixed Gauss-Legendre rule gives to rounding, as in :mod:`~pyro_mf.families.log_concave`. The log
density is not concave behind a right angle, so Newton's method is kept within a bracket here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_mf.families.log_concave import NEGLIGIBLE, NUM_NODES, log_tails, nodes_and_weights

_LARGE = 200.0  # from here on the asymptotic series are exact to rounding
_LEAST_SPREAD, _MOST_SPREAD = 1e-12, 1.0 - 1e-7
_NUM_STEPS = 10
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log_bessel(concentration: Tensor) -> Tensor:
    """Log of ``exp(-k) I_0(k)``.

    Args:
        concentration: Positive numbers k.

    Example:
        >>> log_bessel(torch.tensor([0.1, 1.0, 1e6]))
        tensor([-0.0975, -0.7641, -7.8267])
    """
    small, large = concentration.clamp_max(_LARGE), concentration.clamp_min(_LARGE)
    r = 0.125 / large
    series = r * (1.0 + r * (9 / 2 + r * (75 / 2 + r * (3675 / 8 + r * 59535 / 8))))
    return torch.where(
        concentration < _LARGE,
        torch.special.i0e(small).log(),
        series.log1p() - 0.5 * large.log() - _HALF_LOG_2PI,
    )


def spread_of(concentration: Tensor) -> Tensor:
    """One minus the mean cosine, ``1 - I_1(k) / I_0(k)``: the circular variance.

    Args:
        concentration: Positive numbers k.

    Example:
        >>> spread_of(torch.tensor([1e-6, 1.0, 1e6]))
        tensor([1.0000e+00, 5.5361e-01, 5.0000e-07])
    """
    small, large = concentration.clamp_max(_LARGE), concentration.clamp_min(_LARGE)
    r = 1.0 / large
    series = r * (1 / 2 + r * (1 / 8 + r * (1 / 8 + r * (25 / 128 + r * 13 / 32))))
    ratio = torch.special.i1e(small) / torch.special.i0e(small)
    return torch.where(concentration < _LARGE, 1.0 - ratio, series)


def inverse_spread(spread: Tensor) -> Tensor:
    """The concentration with this circular variance.

    Newton's method in the mean cosine over the circular variance, which is nearly straight.

    Args:
        spread: Circular variances, in doubles, cut off short of 0 and 1.

    Example:
        >>> inverse_spread(torch.tensor([5e-7, 0.55361], dtype=torch.float64))
        tensor([1.0000e+06, 1.0000e+00], dtype=torch.float64)
    """
    spread = spread.clamp(_LEAST_SPREAD, _MOST_SPREAD)
    odds = (1.0 - spread) / spread
    concentration = odds * (2.0 + 0.5 * odds) / (1.0 + odds)  # twice small odds, half of large ones
    for _ in range(_NUM_STEPS):
        own = spread_of(concentration)
        slope = own * (2.0 - own) - (1.0 - own) / concentration  # of the mean cosine
        step = (odds - (1.0 - own) / own) * own.square() / slope
        concentration = torch.maximum(concentration + step, 0.1 * concentration)
    return concentration


def angle_at_noise(noise: Tensor, concentration: Tensor) -> Tensor:
    """The quantile of the law around 0 at standard normal noise's own probability.

    Args:
        noise: Standard normal noise.
        concentration: Positive numbers, which broadcast against the noise.

    Returns:
        Angles from -pi to pi with the parameter's dtype, increasing in the noise, differentiable
        any number of times in the concentration, not in the noise.
    """
    noise, concentration_ = torch.broadcast_tensors(noise.detach().double(), concentration.double())
    found: Tensor = _Angle.apply(noise, concentration_)  # type: ignore[no-untyped-call]
    return found.to(concentration.dtype)


class _Angle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(noise: Tensor, concentration: Tensor) -> Tensor:
        return noise.sign() * _solve(noise, concentration)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        angle, concentration = ctx.saved_tensors
        haversines, integrand = _outwards(angle.abs(), concentration)
        mean = spread_of(concentration)
        by_concentration = (integrand * (mean[..., None] - 2.0 * haversines)).sum(-1)
        return None, gradients[0] * angle.sign() * by_concentration


def _solve(noise: Tensor, concentration: Tensor) -> Tensor:
    """Distance from 0 behind which the law has the mass that the noise has behind it."""
    target = torch.minimum(*log_tails(noise))
    low, high = torch.zeros_like(noise), torch.full_like(noise, math.pi)
    height = -log_bessel(concentration) - 2.0 * _HALF_LOG_2PI
    angle = torch.minimum(
        noise.abs() / (concentration + 0.1).sqrt(), math.pi * (1.0 - 2.0 * target.exp())
    )
    for _ in range(_NUM_STEPS):
        ratio = _outwards(angle, concentration)[1].sum(-1)
        log_density = height - 2.0 * concentration * torch.sin(0.5 * angle).square()
        excess = log_density + ratio.log() - target
        low, high = torch.where(excess > 0.0, angle, low), torch.where(excess > 0.0, high, angle)
        slope = concentration * angle.sin() * ratio - 1.0
        bold = angle + excess * ratio / (1.0 - 0.5 * excess * slope).clamp_min(0.3)  # Halley's
        # Newton's step in the mass itself, which is convex, never goes too far out.
        safe = torch.where(excess > 0.0, angle - ratio * torch.expm1(-excess), 0.5 * (low + high))
        angle = torch.where((bold >= low) & (bold <= high), bold, safe)
    return angle


def _outwards(angle: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of half sines from an angle outwards, and the density over that at the angle."""
    here = torch.sin(0.5 * angle).square()
    with torch.no_grad():  # where the density is negligible, or at the far side
        end = (here + 0.5 * NEGLIGIBLE / concentration).clamp_max(1.0)
        end = 2.0 * torch.asin(end.sqrt())
    length = (end - angle).clamp_min(0.0)
    nodes, weights = nodes_and_weights(angle, NUM_NODES)
    steps = length[..., None] * nodes
    half = torch.sin(0.5 * steps)
    rise = torch.sin(angle[..., None] + 0.5 * steps) * half  # sin^2((t + r)/2) - sin^2(t/2)
    integrand = length[..., None] * weights * torch.exp(-2.0 * concentration[..., None] * rise)
    return here[..., None] + rise, integrand
