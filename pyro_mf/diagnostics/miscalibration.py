r"""By how much posteriors are off, from probabilities that should be uniform.

With the truth :math:`\theta_0` of every simulation, its approximate posterior q gives the
probability :math:`p = q(\theta < \theta_0)`. If q's location is too high by b and its sd is r times
what it should be, both in units of the sd that it should have, then for Gaussians
:math:`p = \Phi((\varepsilon - b) / r)` with a standard normal :math:`\varepsilon`, and

.. math:: E[p] = \Phi(h), \quad h = -b / \sqrt{1 + r^2}, \qquad
          E[p^2] = \Phi(h) - 2\,T(h, r / \sqrt{2 + r^2})

with Owen's T. Mean and variance of p therefore give b and r, and since p is bounded no outlier
spoils them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyro_mf.diagnostics.uniformity import uniformity_test

# Variance that the sample variance of uniform numbers has, times their number.
_VARIANCE_OF_VARIANCE = 1.0 / 180.0
_BISECTIONS = 60
_MIN_RATIO, _MAX_RATIO = 1e-3, 1e3
_STEP = 1e-4  # of finite differences of bias and sd ratio by mean and variance


@dataclass(frozen=True, eq=False)
class Miscalibration:
    """How far the posteriors of each parameter are off, each field of shape ``(P,)``.

    Args:
        bias: By how much the location is too high, in sds as they should be.
        bias_se: Its standard error.
        sd_ratio: The sd over what it should be.
        log_sd_ratio_se: Standard error of its logarithm.
        p_bias: p-value of no bias: is the histogram symmetric in the mean?
        p_sd: p-value of the right sd, given the bias.
        p_uniform: p-value of uniformity as a whole.
    """

    bias: np.ndarray
    bias_se: np.ndarray
    sd_ratio: np.ndarray
    log_sd_ratio_se: np.ndarray
    p_bias: np.ndarray
    p_sd: np.ndarray
    p_uniform: np.ndarray


def measure(probabilities: np.ndarray) -> Miscalibration:
    """Estimate bias and sd ratio, and test each, and uniformity.

    Args:
        probabilities: Independent from row to row, in [0, 1], shape ``(N, P)``.

    Example:
        >>> from scipy.stats import norm
        >>> error = np.random.default_rng(0).normal(size=(4000, 1))
        >>> found = measure(norm.cdf((error - 0.5) / 0.7))
        >>> round(found.bias.item(), 1), round(found.sd_ratio.item(), 1)
        (0.5, 0.7)

    References:
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
        Inference, https://arxiv.org/abs/1802.02538 (the test of symmetry)
    """
    from scipy.stats import norm, t

    num = len(probabilities)
    mean = probabilities.mean(0).clip(0.25 / num, 1.0 - 0.25 / num)
    centred = probabilities - probabilities.mean(0)
    variance = centred.var(0, ddof=1)
    bias, log_ratio = _effects(mean, variance)
    by_mean = [d / (2 * _STEP) for d in _change(_effects, mean, variance, _STEP, 0.0)]
    by_variance = [d / (2 * _STEP) for d in _change(_effects, mean, variance, 0.0, _STEP)]
    square = centred**2 - variance
    bias_se, log_ratio_se = (
        np.std(a * centred + b * square, axis=0, ddof=1) / num**0.5
        for a, b in zip(by_mean, by_variance, strict=True)
    )
    spread = np.maximum(np.sqrt(variance), 1e-9)
    p_bias = 2.0 * t.sf(np.abs(probabilities.mean(0) - 0.5) * num**0.5 / spread, num - 1)
    slope = (_variance_at(mean + _STEP, 1.0) - _variance_at(mean - _STEP, 1.0)) / (2 * _STEP)
    scatter = np.maximum((square - slope * centred).var(0, ddof=1), _VARIANCE_OF_VARIANCE)
    z_sd = (variance - _variance_at(mean, 1.0)) * np.sqrt(num / scatter)
    return Miscalibration(
        bias=bias,
        bias_se=bias_se,
        sd_ratio=np.exp(log_ratio),
        log_sd_ratio_se=log_ratio_se,
        p_bias=p_bias,
        p_sd=2.0 * norm.sf(np.abs(z_sd)),
        p_uniform=uniformity_test(probabilities),
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjust p-values for their number, so that those below a level are false with that chance.

    Whatever the dependence between the tests: the chance that any true hypothesis is rejected at a
    level is at most that level.

    Args:
        p_values: Of any shape.

    Example:
        >>> holm(np.array([0.01, 0.2, 0.04])).tolist()
        [0.03, 0.2, 0.08]

    References:
        Holm (1979), A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal
        of Statistics 6
    """
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")
    adjusted = np.empty_like(flat)
    scaled = flat[order] * np.arange(len(flat), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.reshape(p_values.shape)


def _variance_at(mean: np.ndarray, ratio: np.ndarray | float) -> np.ndarray:
    """Variance of p at a mean and an sd ratio."""
    from scipy.special import ndtri, owens_t

    mean = np.clip(mean, 1e-12, 1.0 - 1e-12)
    ratio = np.asarray(ratio)
    overlap = 2.0 * owens_t(ndtri(mean), ratio / np.sqrt(2.0 + ratio**2))
    found: np.ndarray = mean - mean**2 - overlap
    return found


def _effects(mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bias and log sd ratio at a mean and a variance of p."""
    from scipy.special import ndtri

    mean = np.clip(mean, 1e-12, 1.0 - 1e-12)
    low = np.full_like(mean, np.log(_MIN_RATIO))
    high = np.full_like(mean, np.log(_MAX_RATIO))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        is_above = _variance_at(mean, np.exp(middle)) > variance  # so the ratio is larger
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    log_ratio = (low + high) / 2.0
    return -ndtri(mean) * np.sqrt(1.0 + np.exp(2.0 * log_ratio)), log_ratio


def _change(
    function: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    mean: np.ndarray,
    variance: np.ndarray,
    step: float,
    other: float,
) -> list[np.ndarray]:
    """By how much results change from behind a point to ahead of it."""
    ahead = function(mean + step, variance + other)
    behind = function(mean - step, variance - other)
    return [a - b for a, b in zip(ahead, behind, strict=True)]
