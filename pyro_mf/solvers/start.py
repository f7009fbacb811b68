"""Where a fit starts: a location and a scale per latent from which the optimum can be reached.

Thirty quasi-Newton steps towards the mode find the right place on a badly scaled model, but run
into the neck of a hierarchical one, whose density has no maximum. Where no mode is reached, several
points of the path are to be tried, the first among them, each with scales from its curvature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density.blocks import STEPS, Blocks
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.minimise import lbfgs

_PATH_STEPS = 30
_ELSEWHERE = 500_009  # added to a seed for a random point that is not the origin's
_ATTEMPTS = 12
# Scales where the curvature says nothing, and the most and the least that a start may have.
_FLAT_SCALE, _MIN_SCALE = 1.0, 1e-8
# Latents up to which the curvature is computed exactly, and probes that estimate it beyond.
_MAX_EXACT, _NUM_PROBES = 256, 16


def find_starts(elbo: FixedDrawELBO, origin: Tensor | None, *, seed: int) -> Iterator[Tensor]:
    """Points from which to optimise, each location and log scale, shape ``(2 D,)``.

    Args:
        elbo: The objective.
        origin: Where the way to the mode starts, shape ``(D,)``; ``None`` for a random point.
        seed: Seed of random points and probes.

    Yields:
        One point where the density has a mode that was reached. Else several, each from elsewhere:
        the first of the way, a random one, two more of the way, and its end.

    Raises:
        ModelError: If no point with a finite log joint was found.
    """
    blocks = elbo.blocks
    path = _path_to_mode(blocks, _finite_point(blocks, origin, seed))
    end, precision = path[-1], curvature(blocks, path[-1], seed)
    found = 0
    if not _is_near_mode(blocks, end, precision):
        first, *rest = [path[i] for i in _spread(len(path))] or [end]
        for z in (first, _finite_point(blocks, None, seed + _ELSEWHERE), *rest):
            x = _with_scales(elbo, z, curvature(blocks, z, seed))
            if math.isfinite(elbo.value_and_gradient(x)[0]):
                found += 1
                yield x
    x = _with_scales(elbo, end, precision)
    if math.isfinite(elbo.value_and_gradient(x)[0]):
        yield x
    elif not found:
        raise ModelError(
            "the log density is finite at a point but not around it, however close: no Normal "
            "factors fit there. Check the model for constraints that its supports do not state."
        )


def describe_wrong_gradient(elbo: FixedDrawELBO, x: Tensor) -> str | None:
    """Hold the gradient against differences of the values.

    Rounding to integers, comparisons and values that leave torch have no derivative, or lose it;
    the optimum that such a gradient leads to is none. Averages over draws show jumps, too.

    Args:
        elbo: The objective.
        x: Where to look, shape ``(2 D,)``.

    Returns:
        By how much they differ, in words; ``None`` where they agree, or there is no density.
    """
    step = STEPS[elbo.dtype]
    generator = torch.Generator().manual_seed(0)
    metric = elbo.unit_metric(x)
    value, by_x = elbo.value_and_gradient(x)
    gradient = by_x * metric
    for _ in range(2 if math.isfinite(value) else 0):
        sign = 2.0 * torch.randint(0, 2, (len(x),), generator=generator).to(x) - 1.0
        move = step * metric * sign
        ahead, behind = elbo.estimate(x + move).elbo, elbo.estimate(x - move).elbo
        if not math.isfinite(ahead - behind):
            continue
        slope, promised = (behind - ahead) / (2.0 * step), float(gradient @ sign)
        rounding = 100.0 * torch.finfo(elbo.dtype).eps * abs(ahead) / step
        if abs(slope - promised) > rounding + 0.05 * (1.0 + float(gradient.norm())):
            return (
                f"along a random direction its slope is {slope:.4g} and automatic differentiation "
                f"says {promised:.4g}, as with rounding, comparisons, .detach(), .item() or NumPy "
                "between a latent and a density"
            )
    return None


def _spread(num: int) -> list[int]:
    """The first of so many, and two of those behind it."""
    return sorted({0, num // 8, num // 3} - {num - 1})


def _is_near_mode(blocks: Blocks, z: Tensor, precision: Tensor) -> bool:
    """Whether the density has a maximum less than about one nat above a point."""
    if not bool((precision > 0).all()):
        return False
    gradient = blocks.value_and_grad(z[None])[1][0]
    return float((gradient.square() / precision).sum()) < 2.0


def _finite_point(blocks: Blocks, wanted: Tensor | None, seed: int) -> Tensor:
    """The point wanted if the log joint is finite there, else a random one near the origin.

    Raises:
        ModelError: If it is finite at none of many.
    """
    size, generator = blocks.size, torch.Generator().manual_seed(seed)
    for attempt in range(_ATTEMPTS):
        radius = 2.0 * 0.5 ** max(0, attempt - 2)
        uniform = torch.rand(blocks.num_rows, size, generator=generator, dtype=torch.float64)
        points = radius * (2.0 * uniform - 1.0)
        if wanted is not None and attempt == 0:
            points[0] = wanted
        values, _ = blocks.value_and_grad(points)
        if attempt == 0 and values[0] > -torch.inf:
            return points[0]
        if values.max() > -torch.inf:
            return points[values.argmax()]
    raise ModelError(
        f"no point with a finite log density and gradient was found among "
        f"{_ATTEMPTS * blocks.num_rows} "
        "random ones near the origin of the unconstrained space. Check priors and data for "
        "combinations that are impossible together."
    )


def _path_to_mode(blocks: Blocks, origin: Tensor) -> list[Tensor]:
    """Points on the way to the mode."""
    path = [origin]

    def negative(z: Tensor) -> tuple[float, Tensor]:
        values, gradients = blocks.value_and_grad(z[None])
        return float(-values[0]), -gradients[0]

    lbfgs(
        negative,
        origin,
        torch.ones_like(origin),
        max_iterations=_PATH_STEPS,
        gradient_tolerance=1e-3,
        value_tolerance=1e-6,
        callback=path.append,
    )
    return path


def _with_scales(elbo: FixedDrawELBO, z: Tensor, precision: Tensor) -> Tensor:
    """A location with the scales that its curvature suggests, small enough to be finite."""
    known = precision > 1e-12
    scale = torch.where(known, precision.clamp_min(1e-12).rsqrt(), _FLAT_SCALE)
    log_scale = scale.clamp(_MIN_SCALE, _FLAT_SCALE * 1e3).log()
    for _ in range(20):
        x = torch.cat([z, log_scale])
        if math.isfinite(elbo.value_and_gradient(x)[0]):
            return x
        log_scale = log_scale - 1.0
    return x


def curvature(blocks: Blocks, z: Tensor, seed: int) -> Tensor:
    """Diagonal of the negative Hessian at a point, estimated where there are many latents.

    Args:
        blocks: The log joint.
        z: The point, shape ``(D,)``.
        seed: Seed of the probes that estimate it.
    """
    size = len(z)
    if size <= _MAX_EXACT:
        directions = torch.eye(size, dtype=z.dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        coin = torch.randint(0, 2, (_NUM_PROBES, size), generator=generator)
        directions = 2.0 * coin.to(z) - 1.0
    products = -blocks.hessian_vector(z.expand(len(directions), -1), directions)
    return (products * directions).sum(0) / directions.square().sum(0)
