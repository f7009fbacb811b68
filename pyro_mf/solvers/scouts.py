"""Scouts: points as high as the posterior's typical ones, reached from elsewhere.

Draws that all start at one optimum cannot know of another. Scouts start far away and climb until
the log density is that of typical draws; where they end, draws have to be, too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels import Metric

_BOX = 2.0  # half the side of the box that half of them start in, as in Stan
_SPREAD = 3.0  # sds from the optimum at which the other half start
_MAX_STEPS = 150
_TYPICAL_SDS = 3.0  # by which a typical draw's log density may lie below the average


def send_scouts(
    density: Evaluate,
    loc: Tensor,
    metric: Metric,
    *,
    num: int,
    generator: torch.Generator,
) -> Tensor:
    """Points of typical log density that were reached from dispersed starts.

    Args:
        density: The log density.
        loc: Where the optimum is, shape ``(D,)``.
        metric: Covariance there, in whose unit the climb is.
        num: Number of scouts sent, at least 2.
        generator: Source of randomness.

    Returns:
        The points of those that arrived, shape ``(K, D)`` with K from 0 to ``num``.
    """

    def noise(count: int) -> Tensor:
        return torch.randn(count, len(loc), generator=generator, dtype=loc.dtype)

    typical, _ = density(loc + metric.unwhiten(noise(num)))
    typical = typical[torch.isfinite(typical)]
    if len(typical) < 2:
        return loc.new_zeros(0, len(loc))
    level = float(typical.mean() - _TYPICAL_SDS * typical.std())
    in_box = _BOX * (2.0 * torch.rand(num, len(loc), generator=generator, dtype=loc.dtype) - 1.0)
    starts = torch.cat([in_box[::2], loc + _SPREAD * metric.unwhiten(noise(num // 2))])
    z, values = _climb(density, starts, metric, level)
    return z[values >= level]


def _climb(density: Evaluate, z: Tensor, metric: Metric, level: float) -> tuple[Tensor, Tensor]:
    """Gradient ascent in a metric, each row with a step of its own, up to a level."""
    values, gradients = density(z)
    steps = torch.ones_like(values)
    for _ in range(_MAX_STEPS):
        climbing = (values < level) & (values > -math.inf) & (steps > 1e-12)
        if not bool(climbing.any()):
            break
        ascent = steps[:, None] * metric.velocity(gradients)
        there = torch.where(climbing[:, None], z + ascent, z)
        new_values, new_gradients = density(there)
        is_higher = climbing & (new_values > values)
        z = torch.where(is_higher[:, None], there, z)
        gradients = torch.where(is_higher[:, None], new_gradients, gradients)
        values = torch.where(is_higher, new_values, values)
        steps = torch.where(is_higher, 1.5 * steps, torch.where(climbing, 0.25 * steps, steps))
    return z, values
