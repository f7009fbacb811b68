r"""Whether the iterates of a stochastic optimiser have stopped drifting, and how well they average.

At a fixed learning rate the iterates are a Markov chain. Once it is stationary their mean is the
answer and their autocorrelation gives its Monte Carlo error, as for MCMC; before, the halves of the
series disagree. Everything is batched over parameters: series have the shape ``(T, P)``.

References:
    Dhaka et al. (2020), Robust, Accurate Stochastic Optimization for Variational Inference,
    https://arxiv.org/abs/2009.00666
    Welandawe et al. (2022), Robust, Automated, and Accurate Black-box Variational Inference,
    https://arxiv.org/abs/2203.15945
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from pyro_mf.kernels import mixing


def split_rhat(series: Tensor) -> Tensor:
    """Potential scale reduction of one chain cut into halves.

    Args:
        series: Shape ``(T, P)``, at least four rows.

    Returns:
        Shape ``(P,)``: near 1 where the halves agree; exactly 1 for a constant.

    Raises:
        ValueError: If there are fewer than four rows.

    Example:
        >>> split_rhat(torch.tensor([[0.0, 5.0], [1.0, 5.0], [10.0, 5.0], [11.0, 5.0]]))
        tensor([10.0..., 1.0000])

    References:
        Gelman et al. (2013), Bayesian Data Analysis, third edition, section 11.4
    """
    if len(series) < 4:
        raise ValueError(f"split_rhat needs at least 4 rows; got {len(series)}.")
    return mixing.split_rhat(series[:, None])


def rhat_by_chance(num_series: int, length: int, probability: float = 0.05) -> float:
    """The split R-hat that the largest of many independent series exceeds by chance.

    Args:
        num_series: Number of series P looked at.
        length: Their length T.
        probability: Chance that a limit at this value raises a false alarm.

    Returns:
        A limit above 1 that falls towards 1 as series become longer.

    Example:
        >>> rhat_by_chance(10, 100) < rhat_by_chance(1000, 100)
        True
    """
    half = length // 2
    z = -NormalDist().inv_cdf(probability / (2 * num_series))
    return math.sqrt(max((half - 1 + z * z) / half, 1.0))


def effective_sample_size(series: Tensor) -> Tensor:
    """How many independent values know the mean as well as the series does.

    Geyer's initial positive sequence: autocorrelations are summed in pairs, up to a negative pair.

    Args:
        series: Shape ``(T, P)``.

    Returns:
        Shape ``(P,)``, between 1 and T; T for a constant.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0], [1.0], [0.0], [1.0]]).repeat(8, 1))
        tensor([32.])

    References:
        Geyer (1992), Practical Markov Chain Monte Carlo, Statistical Science 7(4)
    """
    return mixing.effective_sample_size(series[:, None])


def mc_error(series: Tensor) -> Tensor:
    """Standard error of a stationary series' mean.

    Args:
        series: Shape ``(T, P)``.

    Returns:
        Shape ``(P,)``, in the unit of the series.

    Example:
        >>> bool(mc_error(torch.randn(100, 1)) < 0.3)
        True
    """
    return (series.var(0) / effective_sample_size(series)).sqrt()


def leading_components(series: Tensor, num_components: int = 3) -> Tensor:
    """The directions along which a series moves most, as series of their own.

    A slow common drift of many parameters hides in each of them below its own fast noise, but is
    the first thing that a principal component shows.

    Args:
        series: Shape ``(T, P)``, in units that make parameters comparable.
        num_components: How many to return, fewer where T or P is smaller.

    Returns:
        Shape ``(T, num_components)``, each of length one.

    Example:
        >>> time = torch.linspace(-1.0, 1.0, 50)
        >>> drift = leading_components(time[:, None] * torch.ones(50, 100), 1).squeeze(1)
        >>> bool(torch.allclose(drift.abs(), (time / time.norm()).abs(), atol=1e-5))
        True
    """
    centred = series - series.mean(0)
    num_components = min(num_components, *series.shape)
    vectors: Tensor = torch.linalg.eigh(centred @ centred.T).eigenvectors
    return vectors[:, -num_components:]
