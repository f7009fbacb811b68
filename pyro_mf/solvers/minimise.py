"""Minimising the fixed-draw ELBO: natural-gradient steps far away, L-BFGS and Newton near by."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_mf.solvers.fixed_draw_elbo import Curvature, FixedDrawELBO

ValueAndGradient = Callable[[Tensor], tuple[float, Tensor]]

# An infinite value would spoil the interpolation of a line search; so many nats above the last
# finite one make it go back as well.
_WALL = 1e3
_MAX_ITERATIONS = 300
# Renewals of the Hessian, and how many scales of a factor the optimum may be from where it was
# computed.
_MAX_POLISHES, _SAME_POINT = 4, 0.03
# Latents up to which the Hessian is computed as a matrix, and over how many draws at most, where
# draws are cheap and where they are costly: it only has to be known to a few percent.
MAX_DENSE, _HESSIAN_DRAWS, _COSTLY_HESSIAN_DRAWS = 400, 128, 16
# Largest gradient in coordinates in which the Hessian is about the identity: what is left of it
# after rounding.
_GRADIENT = {torch.float64: 1e-5, torch.float32: 3e-3}


def lbfgs(
    function: ValueAndGradient,
    start: Tensor,
    metric: Tensor,
    *,
    max_iterations: int,
    gradient_tolerance: float,
    value_tolerance: float = 0.0,
    callback: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Minimise with L-BFGS in coordinates that a metric makes round.

    Args:
        function: Value and gradient; infinite where it is not defined.
        start: Where it is finite, shape ``(n,)``.
        metric: ``start + metric * y``, or ``start + metric @ y`` for a matrix, is the point with
            coordinates ``y``.
        max_iterations: Most iterations.
        gradient_tolerance: Stop where no coordinate of the gradient by ``y`` is larger.
        value_tolerance: Stop where an iteration gains less than this, relative to the value.
        callback: Called with the point after each iteration.

    Returns:
        The best point, shape ``(n,)``.
    """
    from scipy import optimize  # SciPy changes the warning filters when it is imported

    is_matrix = metric.dim() == 2
    last_finite = [0.0]
    best_value, best = math.inf, start

    def point(y: np.ndarray) -> Tensor:
        moved = torch.as_tensor(y, dtype=start.dtype)
        return start + (metric @ moved if is_matrix else metric * moved)

    def evaluate(y: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best_value, best
        x = point(y)
        value, gradient = function(x)
        if not math.isfinite(value):
            return last_finite[0] + _WALL, np.zeros_like(y)
        last_finite[0] = value
        if value < best_value:
            best_value, best = value, x
        return value, (metric.T @ gradient if is_matrix else metric * gradient).numpy()

    optimize.minimize(
        evaluate,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        callback=None if callback is None else lambda y: callback(point(y)),
        options={
            "maxiter": max_iterations,
            "maxfun": 2 * max_iterations,
            "maxcor": 30,
            "gtol": gradient_tolerance,
            "ftol": value_tolerance,
        },
    )
    return best


def natural_gradient(
    elbo: FixedDrawELBO, x: Tensor, *, max_steps: int, tolerance: float = 1e-2
) -> Tensor:
    r"""Natural-gradient steps: precisions follow the expected curvature, locations Newton's step.

    By Price's theorem the expected curvature is a by-product of the gradient,
    :math:`-E[\partial_{dd} \log p] = -E[\varepsilon_d \partial_d \log p] / \sigma_d`. A step moves
    a location by at most a few sds and a precision by at most a factor; one that raises the
    objective is taken back and shortened. On a Gaussian target the first full step is exact.

    Args:
        elbo: The objective.
        x: Location and log scale, shape ``(2 D,)``, where the objective is finite.
        max_steps: Most steps, one gradient each.
        tolerance: Stop where a step promises less than this, in nats.

    Returns:
        The best point.

    References:
        Khan and Rue (2023), The Bayesian Learning Rule, https://arxiv.org/abs/2107.04562
    """
    size, rate = elbo.size, 0.5
    value, gradient = elbo.value_and_gradient(x)
    for _ in range(max_steps):
        by_loc, by_log_scale = gradient[:size], gradient[size:]
        variance = (2.0 * x[size:]).exp()
        # by_log_scale + 1 is the expected curvature in units of the precision.
        ratio = (by_log_scale + 1.0).clamp(0.05, 20.0)
        promise = 0.5 * float((by_loc.square() * variance / ratio).sum())
        promise += 0.5 * float(ratio.log().square().sum())
        if promise < tolerance:
            break
        scale = x[size:].exp()
        shift = (-rate * by_loc * variance / ratio).clamp(-3.0 * scale, 3.0 * scale)
        proposal = x + torch.cat([shift, -0.5 * rate * ratio.log()])
        new_value, new_gradient = elbo.value_and_gradient(proposal)
        if new_value < value + 1e-9 * abs(value):
            x, value, gradient = proposal, new_value, new_gradient
            rate = min(1.0, 1.5 * rate)
        else:
            rate *= 0.3
        if rate < 1e-3:
            break
    return x


def descend(elbo: FixedDrawELBO, x: Tensor) -> Tensor:
    """Come close to the optimum: natural-gradient steps, then L-BFGS in units of the scales.

    Args:
        elbo: The objective.
        x: Location and log scale, shape ``(2 D,)``, where the objective is finite.
    """
    x = natural_gradient(elbo, x, max_steps=30)
    return lbfgs(
        elbo.value_and_gradient,
        x,
        elbo.unit_metric(x),
        max_iterations=_MAX_ITERATIONS,
        gradient_tolerance=1e-3,
        value_tolerance=max(1e-10, 10.0 * torch.finfo(elbo.dtype).eps),
    )


def polish(elbo: FixedDrawELBO, x: Tensor) -> tuple[Tensor, Curvature | None]:
    """Go to the optimum, with the Hessian as the metric, renewed where the point has moved.

    Args:
        elbo: The objective.
        x: Where :func:`descend` has come to.

    Returns:
        The optimum, and the curvature there or so close by that it is the same; ``None`` where
        there are too many latents for a matrix.
    """
    tolerance = _GRADIENT[elbo.dtype]
    if elbo.size > MAX_DENSE:
        metric = elbo.unit_metric(x)
        x = lbfgs(
            elbo.value_and_gradient, x, metric, max_iterations=1000, gradient_tolerance=tolerance
        )
        return x, None
    enough = _COSTLY_HESSIAN_DRAWS if elbo.blocks.is_costly else _HESSIAN_DRAWS
    sample = elbo.thinned(enough) if elbo.num_draws > enough else elbo
    curvature = sample.curvature(x)
    for _ in range(_MAX_POLISHES):
        if not bool(torch.isfinite(curvature.hessian).all()):
            break
        metric, start = _inverse_root(curvature.hessian), x
        x = lbfgs(
            elbo.value_and_gradient, x, metric, max_iterations=30, gradient_tolerance=tolerance
        )
        if ((x - start) / elbo.unit_metric(x)).abs().max() < _SAME_POINT:
            break
        curvature = sample.curvature(x)
    if sample is not elbo and not _is_positive_definite(curvature.hessian):
        curvature = elbo.curvature(x)  # that of other draws is no evidence against these
    return x, curvature


def _is_positive_definite(matrix: Tensor) -> bool:
    return bool(torch.isfinite(matrix).all()) and int(torch.linalg.cholesky_ex(matrix).info) == 0


def _inverse_root(hessian: Tensor) -> Tensor:
    """A matrix in whose coordinates the Hessian is the identity, up to signs."""
    root = hessian.diagonal().abs().clamp_min(torch.finfo(hessian.dtype).tiny).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(hessian / (root[:, None] * root))
    inverse_root: Tensor = vectors / eigenvalues.abs().clamp_min(1e-8).sqrt()
    return inverse_root / root[:, None]
