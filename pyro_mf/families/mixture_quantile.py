r"""Quantiles of mixtures of Normals, differentiable in the mixture's parameters.

The distribution function F of a mixture has no inverse in closed form. It is found by halving a
bracket that is known (a quantile of the mixture lies between those of its components) and polished
by Newton's method. Its derivatives follow from those of F by the implicit function theorem: two
Newton steps from the solution change nothing but carry the first and second derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_FAR = -1000.0  # where the next term of the tail's expansion is below rounding
_NUM_HALVINGS = 28
_NUM_POLISHES = 4
_MAX_LOG_SLOPE = 14.0  # of the quantile function: steeper only between modes, where no mass is
_MAX_CURVED = 6.0  # of it, where second derivatives are still given


def mixture_quantile(log_probs: Tensor, locs: Tensor, scales: Tensor, noise: Tensor) -> Tensor:
    r"""The quantile of a mixture at the probability :math:`\Phi(\varepsilon)`.

    It is increasing in the noise and accurate far into both tails.

    Args:
        log_probs: Log probabilities of the components, shape ``(*batch, K)``.
        locs: Their means, the same shape.
        scales: Their standard deviations, the same shape.
        noise: Standard normal scores, shape ``(..., *batch)``.

    Returns:
        Shape ``(..., *batch)``.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> mixture_quantile(half, torch.tensor([-1.0, 1.0]), torch.ones(2), torch.zeros(()))
        tensor(0.)
    """
    # The upper half is the lower half of the mirrored mixture, where probabilities keep digits.
    mirror = torch.where(noise > 0.0, -1.0, 1.0).to(noise.dtype)
    target = -noise.abs()
    mirrored = mirror[..., None] * locs
    fixed = (log_probs.detach(), mirrored.detach(), scales.detach())
    y = _solve(*fixed, target.detach())
    step, is_steep = _newton_step(log_probs, mirrored, scales, target, y)
    once = y - (step - step.detach())
    # Where the slope is next to none its second derivatives overflow, so the first have to do.
    again = torch.where(is_steep, y, once)
    step, _ = _newton_step(log_probs, mirrored, scales, target, again)
    y = once - torch.where(is_steep, 0.0, step - step.detach())
    return torch.where(noise.isinf(), noise, mirror * y)


def _solve(log_probs: Tensor, locs: Tensor, scales: Tensor, target: Tensor) -> Tensor:
    """Where the log of F is that of the normal distribution function at the target."""
    of_components = locs + scales * target[..., None].clamp(min=-1e30)
    low, high = of_components.amin(-1), of_components.amax(-1)
    log_p = torch.special.log_ndtr(target)
    for _ in range(_NUM_HALVINGS):
        middle = 0.5 * (low + high)
        log_cdfs: Tensor = torch.special.log_ndtr((middle[..., None] - locs) / scales)
        is_below = torch.logsumexp(log_probs + log_cdfs, -1) < log_p
        low = torch.where(is_below, middle, low)
        high = torch.where(is_below, high, middle)
    y = 0.5 * (low + high)
    for _ in range(_NUM_POLISHES):
        polished = y - _newton_step(log_probs, locs, scales, target, y)[0]
        y = torch.maximum(low, torch.minimum(polished, high))
    return y


def _newton_step(
    log_probs: Tensor, locs: Tensor, scales: Tensor, target: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual of the log probability over its slope in y, and where that slope is next to none."""
    z = (y[..., None] - locs) / scales
    log_cdf = torch.logsumexp(log_probs + _log_ndtr(z), -1)
    log_density = torch.logsumexp(log_probs - 0.5 * z.square() - scales.log() - _HALF_LOG_2PI, -1)
    log_width = scales.detach().log().amax(-1)
    log_inverse = log_cdf - log_density
    residual: Tensor = log_cdf - torch.special.log_ndtr(target)
    step = residual * torch.minimum(log_inverse, log_width + _MAX_LOG_SLOPE).exp()
    return step, log_inverse > log_width + _MAX_CURVED


def _log_ndtr(z: Tensor) -> Tensor:
    """Log of the normal distribution function; torch's own gradient fails below -1e4 in floats."""
    far = z.clamp(max=_FAR)
    asymptotic = -0.5 * far.square() - (-far).log() - _HALF_LOG_2PI - far.square().reciprocal()
    near: Tensor = torch.special.log_ndtr(z.clamp(min=_FAR))
    return torch.where(z < _FAR, asymptotic, near)
