"""Scouts: points of the posterior that were reached from elsewhere than its optimum.

Draws that all start at one optimum cannot know of another. Scouts start far away, climb until the
log density is that of typical draws or they find nothing higher, and settle there as chains do;
where they end, draws have to be, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.density.prior import Prior
from pyro_mf.kernels import Metric, ParallelHMC

_BOX = 2.0  # half the side of the box that a quarter of them start in, as in Stan
_SPREADS = (3.0, 10.0, 30.0)  # sds from the optimum at which the other half start
_MAX_STEPS = 150
_FIRST_STEP = 1e-3  # of a Newton step at the optimum: a longer one leaves a narrower mode's basin
_TYPICAL_SDS = 3.0  # by which a typical draw's log density may lie below the average
# Nats, and nats per latent, by which another mode may be lower: being wider, it has as much mass.
LOWER, LOWER_EACH = 10.0, 1.0
_SETTLING = 40  # transitions
_NUM_NEAR, _NUM_HELD_OUT = 1000, 200  # draws among which a neighbour is looked for, and by which
_FARTHER = 1.0  # sds that a scout may be farther from all draws than any of these is


class Climbed(NamedTuple):
    """Where climbs from dispersed starts ended.

    Args:
        z: Shape ``(N, D)``.
        values: Log densities there, minus infinity where a start had none, shape ``(N,)``.
        lowest: Log density from which on a point may be in a mode.
    """

    z: Tensor
    values: Tensor
    lowest: float


def send_scouts(
    density: Evaluate,
    loc: Tensor,
    metric: Metric,
    *,
    num: int,
    generator: torch.Generator,
    prior: Prior | None = None,
) -> Tensor:
    """Points of the posterior that were reached from dispersed starts.

    Args:
        density: The log density.
        loc: Where the optimum is, shape ``(D,)``.
        metric: Covariance there, in whose unit the climb is.
        num: Number of scouts sent.
        generator: Source of randomness.
        prior: Where a quarter of them start, if it can be drawn from.

    Returns:
        Where those are that arrived, shape ``(K, D)`` with K from 0 to ``num``.
    """
    climbed = climb_from_afar(density, loc, metric, num=num, generator=generator, prior=prior)
    z = climbed.z[climbed.values >= climbed.lowest]
    settled, values = settle(density, z, metric, generator=generator)
    return settled[values >= climbed.lowest]


def settle(
    density: Evaluate, z: Tensor, metric: Metric, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Go on from points by a few transitions of chains, which leave what is no mode.

    Args:
        density: The log density.
        z: The points, shape ``(K, D)``.
        metric: Covariance of a Gaussian near the posterior.
        generator: Source of randomness.

    Returns:
        Where they are then, shape ``(K, D)``, and their log densities, ``(K,)``.
    """
    try:
        if len(z) < 2:
            return z, density(z)[0]
        chains = ParallelHMC(density, z, metric, generator=generator)
    except NonFiniteError:  # the density is there, and its gradient is not
        return z, z.new_full((len(z),), math.inf)
    chains.warm_up(_SETTLING)
    return chains.state.z, chains.state.log_density


def climb_from_afar(
    density: Evaluate,
    loc: Tensor,
    metric: Metric,
    *,
    num: int,
    generator: torch.Generator,
    prior: Prior | None = None,
) -> Climbed:
    """Climb the log density from dispersed starts, with or without arriving anywhere.

    Args:
        density: The log density.
        loc: Where the optimum is, shape ``(D,)``.
        metric: Covariance there, in whose unit the climb is.
        num: Number of starts.
        generator: Source of randomness.
        prior: Where a quarter of them are, if it can be drawn from.

    Returns:
        All ends; none where the density is not finite around the optimum.
    """

    def noise(count: int) -> Tensor:
        return torch.randn(count, len(loc), generator=generator, dtype=loc.dtype)

    typical, _ = density(loc + metric.unwhiten(noise(num)))
    typical = typical[torch.isfinite(typical)]
    if len(typical) < 2:
        return Climbed(loc.new_zeros(0, len(loc)), loc.new_zeros(0), math.inf)
    level = float(typical.mean() - _TYPICAL_SDS * typical.std())
    uniform = torch.rand(num // 2, len(loc), generator=generator, dtype=loc.dtype)
    starts = _BOX * (2.0 * uniform - 1.0)
    if prior is not None:
        starts[::2] = prior.sample(len(starts[::2]), generator)
    spread = loc.new_tensor(_SPREADS).repeat(num)[: num // 2, None]
    starts = torch.cat([starts, loc + spread * metric.unwhiten(noise(num // 2))])
    z, values = _climb(density, starts, metric, level)
    return Climbed(z, values, level - LOWER - LOWER_EACH * len(loc))


def count_astray(scouts: Tensor, draws: Tensor) -> int:
    """How many scouts are where no draw is.

    Args:
        scouts: Where they are, shape ``(K, D)``.
        draws: Equally weighted draws of the posterior, shape ``(S, D)``, with or without
            repetitions.

    Returns:
        The number that is farther from all draws than any draw is from the others.
    """
    draws = torch.unique(draws, dim=0)
    draws = draws[:: max(1, len(draws) // (_NUM_NEAR + _NUM_HELD_OUT))]
    if not len(scouts) or len(draws) < 2 * _NUM_HELD_OUT:
        return 0
    centred = draws - draws.mean(0)
    covariance = centred.T @ centred / len(draws)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    unit = Metric(covariance.diagonal().sqrt() if int(failed) else factor)
    held_out = torch.arange(len(draws)) % (len(draws) // _NUM_HELD_OUT) == 0
    near = unit.whiten(draws[~held_out])
    allowed = torch.cdist(unit.whiten(draws[held_out]), near).min(1).values.max() + _FARTHER
    return int((torch.cdist(unit.whiten(scouts), near).min(1).values > allowed).sum())


def _climb(density: Evaluate, z: Tensor, metric: Metric, level: float) -> tuple[Tensor, Tensor]:
    """Gradient ascent in a metric, each row with a step of its own, up to a level."""
    values, gradients = density(z)
    steps = torch.full_like(values, _FIRST_STEP)
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
        steps = torch.where(is_higher, 2.0 * steps, torch.where(climbing, 0.25 * steps, steps))
    return z, values
