"""What remains of the gamma function beside Stirling's leading terms, exact for large arguments.

Densities of Gamma and Beta factors are differences of large terms that cancel where they are
narrow. Written with these remainders, only small terms are left, in single precision too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

# Concentrations and rates range over powers of ten, so they are stored as logarithms: guides store
# what is constrained to be `positive` through softplus, where Adam takes ages from 100 to 10.
POSITIVE = constraints.greater_than(0.0)

_LARGE = 16.0  # from here on the asymptotic series are exact to rounding
_NUM_STEPS = 8
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def log_gamma_remainder(x: Tensor) -> Tensor:
    """``lgamma(x) - x log(x) + x``.

    Args:
        x: Positive numbers.

    Example:
        >>> log_gamma_remainder(torch.tensor([1.0, 1e8]))
        tensor([ 1.0000, -8.2914])
    """
    small, large = x.clamp_max(_LARGE), x.clamp_min(_LARGE)
    r = 1.0 / (large * large)
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r / 1188)))) / large
    return torch.where(
        x < _LARGE,
        torch.lgamma(small) - small * small.log() + small,
        _HALF_LOG_2PI - 0.5 * large.log() + series,
    )


def digamma_remainder(x: Tensor) -> Tensor:
    """``digamma(x) - log(x)``, the derivative of :func:`log_gamma_remainder`.

    Args:
        x: Positive numbers.

    Example:
        >>> digamma_remainder(torch.tensor([1.0, 1e6]))
        tensor([-5.7722e-01, -5.0000e-07])
    """
    small, large = x.clamp_max(_LARGE), x.clamp_min(_LARGE)
    r = 1.0 / (large * large)
    series = r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r * (1 / 132)))))
    return torch.where(x < _LARGE, torch.digamma(small) - small.log(), -0.5 / large - series)


def inverse_trigamma(y: Tensor) -> Tensor:
    """The positive number whose trigamma function is ``y``.

    Newton's method in the function's reciprocal, which is nearly straight and convex, from a bound:
    trigamma is less than ``1 / x + 1 / x^2``.

    Args:
        y: Positive numbers.

    Example:
        >>> inverse_trigamma(torch.tensor([1e-4, 1.6449, 1e4]))
        tensor([1.0000e+04, 1.0000e+00, 1.0000e-02])
    """
    y_ = y.double()
    x = (0.5 + (0.25 + y_).sqrt()) / y_
    for _ in range(_NUM_STEPS):
        trigamma = torch.polygamma(1, x)
        x = x + trigamma * (1.0 - trigamma / y_) / torch.polygamma(2, x)
    return x.to(y)
