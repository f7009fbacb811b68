"""The captured density as a sampler sees it: one point in, a value and a gradient out, no crash."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# What a density raises where it does not exist: a matrix that is not positive definite, a
# parameter that overflowed out of its support.
NUMERICAL_ERRORS = (
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]
    ValueError,
    ArithmeticError,
)


class Density(Protocol):
    """What a sampler needs of a :class:`~pyro_mf.LogJoint`."""

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(S,)`` and gradients ``(S, D)`` at the rows of ``z``, shape ``(S, D)``."""


class Target:
    """Value and gradient at one point, every numerical failure reported as a value of NaN.

    A sampler's integrator walks to points where a density overflows or does not exist. Both
    backends take a value that is not finite for a divergence and turn back; neither survives an
    exception, or a NaN in the gradient of a finite value.

    Args:
        density: The log joint.
    """

    def __init__(self, density: Density) -> None:
        self._density = density
        self.evaluations = 0

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Value, a scalar, and gradient at ``z``, shape ``(D,)``; NaN and zero where it fails."""
        self.evaluations += 1
        try:
            value, gradient = self._density.value_and_grad(z.unsqueeze(0))
        except NUMERICAL_ERRORS:
            return z.new_full((), torch.nan), torch.zeros_like(z)
        # One number tells of all: an infinity or a NaN survives the sum.
        if not torch.isfinite(value[0] + gradient.sum()):
            return z.new_full((), torch.nan), torch.zeros_like(z)
        return value[0], gradient[0]
