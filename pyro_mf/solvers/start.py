"""Where a fit starts: a location and a scale per latent from which the optimum can be reached.

Thirty quasi-Newton steps towards the mode find the right place on a badly scaled model, but run
into the neck of a hierarchical one, whose density has no maximum. So several points of the path
compete, the first among them, each with scales from its curvature and a few steps of optimisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.solvers.blocks import Blocks
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.minimise import lbfgs, natural_gradient

_PATH_STEPS = 30
_RACE_STEPS = 10
# Scales where the curvature says nothing, and the most and the least that a start may have.
_FLAT_SCALE, _MIN_SCALE = 1.0, 1e-8
# Latents up to which the curvature is computed exactly, and probes that estimate it beyond.
_MAX_EXACT, _NUM_PROBES = 256, 16


def find_start(elbo: FixedDrawELBO, *, seed: int, disperse: bool = False) -> Tensor:
    """Location and log scale from which to optimise, shape ``(2 D,)``.

    Args:
        elbo: The objective.
        seed: Seed of random points and probes.
        disperse: Start at a random point rather than at the origin.

    Raises:
        ModelError: If no point with a finite log joint was found.
    """
    blocks = elbo.blocks
    origin = _finite_point(blocks, seed, disperse=disperse)
    path, has_mode = _path_to_mode(blocks, origin)
    picks = [path[-1]] if has_mode else [path[i] for i in _spread(len(path))]
    candidates = [_with_scales(elbo, z, seed) for z in picks]
    if len(candidates) == 1:
        return candidates[0]
    raced = [natural_gradient(elbo, x, max_steps=_RACE_STEPS) for x in candidates]
    return min(raced, key=lambda x: elbo.value_and_gradient(x)[0])


def _spread(num: int) -> list[int]:
    """First, last, and two between, closer to the first."""
    return sorted({0, num // 8, num // 3, num - 1})


def _finite_point(blocks: Blocks, seed: int, *, disperse: bool) -> Tensor:
    """The origin if the log joint is finite there, else the best of random points near it."""
    size, generator = blocks.size, torch.Generator().manual_seed(seed)
    for attempt in range(12):
        radius = 2.0 * 0.5 ** max(0, attempt - 2)
        uniform = torch.rand(blocks.num_rows, size, generator=generator, dtype=torch.float64)
        points = radius * (2.0 * uniform - 1.0)
        if disperse:
            points = points[:1] if attempt == 0 else points
        elif attempt == 0:
            points[0] = 0.0
        values, _ = blocks.value_and_grad(points)
        if attempt == 0 and values[0] > -torch.inf:
            return points[0]
        if values.max() > -torch.inf:
            return points[values.argmax()]
    raise ModelError(
        f"no point with a finite log density and gradient was found among {12 * blocks.num_rows} "
        "random ones near the origin of the unconstrained space. Check priors and data for "
        "combinations that are impossible together."
    )


def _path_to_mode(blocks: Blocks, origin: Tensor) -> tuple[list[Tensor], bool]:
    """Points on the way to the mode, and whether it was reached."""
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
    return path, len(path) <= _PATH_STEPS


def _with_scales(elbo: FixedDrawELBO, z: Tensor, seed: int) -> Tensor:
    """A location with the scales that its curvature suggests, small enough to be finite."""
    curvature = _curvature(elbo.blocks, z, seed)
    known = curvature > 1e-12
    scale = torch.where(known, curvature.clamp_min(1e-12).rsqrt(), _FLAT_SCALE)
    log_scale = scale.clamp(_MIN_SCALE, _FLAT_SCALE * 1e3).log()
    for _ in range(20):
        x = torch.cat([z, log_scale])
        if math.isfinite(elbo.value_and_gradient(x)[0]):
            return x
        log_scale = log_scale - 1.0
    return x


def _curvature(blocks: Blocks, z: Tensor, seed: int) -> Tensor:
    """Diagonal of the negative Hessian at a point, estimated where there are many latents."""
    size = len(z)
    if size <= _MAX_EXACT:
        directions = torch.eye(size, dtype=z.dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        coin = torch.randint(0, 2, (_NUM_PROBES, size), generator=generator)
        directions = 2.0 * coin.to(z) - 1.0
    products = -blocks.hessian_vector(z.expand(len(directions), -1), directions)
    return (products * directions).sum(0) / directions.square().sum(0)
