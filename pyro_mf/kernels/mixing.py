r"""Whether parallel chains agree, and how well their draws know means and standard deviations.

Everything is batched over the elements of a draw: chains have the shape ``(T, N, P)`` for T
iterations of N chains. Nothing is ranked: what is asked is how well the mean and the sd are known,
and those are averages of z and of its squares.

References:
    Gelman et al. (2013), Bayesian Data Analysis, third edition, section 11.4
    Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-Normalization, Folding, and
    Localization: An Improved R-hat, https://arxiv.org/abs/1903.08008
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_ITERATIONS = 4
_CHUNK_ELEMENTS = 2**21  # of a Fourier transform, so that long wide chains need little memory
_OUTLYING = 8.0  # robust sds of a chain's mean from the other chains': not by chance
_IDLE = 0.1  # of the median chain's moves


@dataclass(frozen=True, eq=False)
class Mixing:
    """What chains say about themselves, per element of a draw; see :func:`measure_mixing`.

    Args:
        rhat: Split R-hat of z, shape ``(P,)``.
        rhat_squares: Split R-hat of the squares around the mean, shape ``(P,)``.
        ess: Effective sample size for the mean, shape ``(P,)``.
        ess_squares: Effective sample size for the variance, shape ``(P,)``.
        mcse_mean: Monte Carlo standard error of the mean in sds, shape ``(P,)``.
        mcse_sd: Relative Monte Carlo standard error of the sd, shape ``(P,)``.
        stuck: Chains that hardly move, or stay away from the others, positions ``(k,)``.
    """

    rhat: Tensor
    rhat_squares: Tensor
    ess: Tensor
    ess_squares: Tensor
    mcse_mean: Tensor
    mcse_sd: Tensor
    stuck: Tensor

    @property
    def worst_rhat(self) -> float:
        """The largest R-hat of all elements and of their squares."""
        return max(float(self.rhat.max()), float(self.rhat_squares.max()))


def measure_mixing(chains: Tensor) -> Mixing:
    """Agreement of chains, and the Monte Carlo errors of their means and sds.

    Args:
        chains: Shape ``(T, N, P)``, at least four iterations.

    Returns:
        The numbers per element. Where chains do not agree the errors are too small by an unknown
        factor: look at R-hat first.

    Raises:
        ValueError: If there are fewer than four iterations, or no three dimensions.

    Example:
        >>> found = measure_mixing(torch.randn(100, 8, 2))
        >>> found.worst_rhat < 1.1, len(found.stuck)
        (True, 0)
    """
    _check(chains)
    squares = (chains - chains.mean((0, 1))).square()
    variance = squares.mean((0, 1))
    ess, ess_squares = effective_sample_size(chains), effective_sample_size(squares)
    # The sd's relative error is half of the variance's.
    spread = squares.var((0, 1)).sqrt() / torch.where(variance > 0, variance, 1.0)
    return Mixing(
        rhat=split_rhat(chains),
        rhat_squares=split_rhat(squares),
        ess=ess,
        ess_squares=ess_squares,
        mcse_mean=ess.rsqrt(),
        mcse_sd=0.5 * spread * ess_squares.rsqrt(),
        stuck=stuck_chains(chains),
    )


def split_rhat(chains: Tensor) -> Tensor:
    """Potential scale reduction of chains, each cut into halves.

    Args:
        chains: Shape ``(T, N, P)``, at least four iterations.

    Returns:
        Shape ``(P,)``: near 1 where all halves agree; exactly 1 for a constant.

    Raises:
        ValueError: If there are fewer than four iterations, or no three dimensions.

    Example:
        >>> apart = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1) + torch.tensor([[0.0], [9]])
        >>> split_rhat(apart)
        tensor([7.3824])
    """
    _check(chains)
    half = len(chains) // 2
    halves = torch.cat([chains[:half], chains[-half:]], 1)
    within = halves.var(0).mean(0)
    between = halves.mean(0).var(0)
    ratio = between / within
    ratio = torch.where((within == 0) & (between == 0), torch.zeros_like(ratio), ratio)
    return ((half - 1) / half * (within > 0) + (within == 0) + ratio).clamp(min=1.0).sqrt()


def effective_sample_size(chains: Tensor) -> Tensor:
    """How many independent draws know the mean as well as the chains do.

    Geyer's initial positive sequence: autocorrelations are summed in pairs, up to a negative pair.
    They are taken around the mean of all chains, so that chains that stay apart count as
    correlated.

    Args:
        chains: Shape ``(T, N, P)``.

    Returns:
        Shape ``(P,)``, between 1 and T N; T N for a constant.

    Raises:
        ValueError: If there are fewer than four iterations, or no three dimensions.

    Example:
        >>> effective_sample_size(torch.tensor([0.0, 1.0]).repeat(16).reshape(32, 1, 1))
        tensor([32.])

    References:
        Geyer (1992), Practical Markov Chain Monte Carlo, Statistical Science 7(4)
    """
    _check(chains)
    length, num_chains, size = chains.shape
    width = max(1, _CHUNK_ELEMENTS // (length * num_chains))
    covariance = torch.cat([_autocovariance(part) for part in chains.split(width, 2)], 1)
    variance = covariance[0]
    scale = chains.square().mean((0, 1))
    is_constant = variance <= torch.finfo(chains.dtype).eps ** 2 * scale
    correlation = covariance / torch.where(is_constant, torch.ones_like(variance), variance)
    pairs = correlation[0 : length - 1 : 2] + correlation[1:length:2]
    kept = pairs * (pairs > 0).cumprod(0)
    time = (2.0 * kept.sum(0) - 1.0).clamp(min=1.0)
    count = float(length * num_chains)
    return torch.where(is_constant, count, count / time).clamp(min=1.0)


def stuck_chains(chains: Tensor) -> Tensor:
    """Chains that hardly move, or whose mean is far from where those of the others are.

    Args:
        chains: Shape ``(T, N, P)``, at least four iterations.

    Returns:
        Their positions, shape ``(k,)``. Chains that fall into two large groups are not named
        here: R-hat shows them.

    Raises:
        ValueError: If there are fewer than four iterations, or no three dimensions.

    Example:
        >>> chains = torch.randn(100, 8, 2)
        >>> chains[:, 3] = chains[0, 3]
        >>> stuck_chains(chains)
        tensor([3])
    """
    _check(chains)
    moves = (chains[1:] != chains[:-1]).any(-1).double().mean(0)
    is_idle = (moves == 0) | (moves < _IDLE * moves.median())
    means = chains.mean(0)
    deviation = (means - means.median(0).values).abs()
    spread = 1.4826 * deviation.median(0).values
    is_outlying = (deviation > _OUTLYING * spread).any(-1) & (len(means) > 2)
    return (is_idle | is_outlying).nonzero().squeeze(1)


def _autocovariance(
    chains: Tensor,  # shape: (T, N, P)
) -> Tensor:
    """Autocovariances at lags 0 to T - 1 around the mean of all, shape ``(T, P)``."""
    length = len(chains)
    centred = chains - chains.mean((0, 1))
    spectrum = torch.fft.rfft(centred, n=2 * length, dim=0).abs().square().mean(1)
    covariance: Tensor = torch.fft.irfft(spectrum, n=2 * length, dim=0)[:length] / length
    return covariance


def _check(chains: Tensor) -> None:
    if chains.dim() != 3 or len(chains) < _MIN_ITERATIONS:
        raise ValueError(
            "expected chains of shape (T, N, P), with at least 4 iterations T of N chains; got "
            f"shape {tuple(chains.shape)}."
        )
