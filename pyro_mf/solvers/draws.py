"""Fixed standard normal draws with better moments than independent ones have.

The optimum over fixed draws carries their error: with S independent ones the mean of a Gaussian
posterior is off by 1 / sqrt(S) posterior sds. Draws in pairs of opposite sign have mean zero
exactly, so for a quadratic log density the mean is exact; orthogonal directions cover all
coordinates evenly; a second moment of one per coordinate removes most of the error of the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

_EDGE = 1e-12
_MANY = 8


def fixed_draws(num_draws: int, size: int, *, seed: int = 0) -> Tensor:
    """Antithetic, orthogonal standard normal draws with unit second moment per coordinate.

    Args:
        num_draws: Number of draws S, even and at least 2.
        size: Dimension D, at least 1.
        seed: Seed of the directions and of the radii; the global generator is not touched.

    Returns:
        Draws in double precision, shape ``(S, D)``; row ``S / 2 + i`` is the negative of row ``i``.

    Raises:
        ValueError: If ``num_draws`` is odd or less than 2.

    Example:
        >>> draws = fixed_draws(8, 3)
        >>> torch.allclose(draws.mean(0), torch.zeros(3, dtype=torch.float64))
        True
        >>> torch.allclose(draws.square().mean(0), torch.ones(3, dtype=torch.float64))
        True

    References:
        Giordano, Ingram and Broderick (2024), Black Box Variational Inference with a Deterministic
        Objective, https://arxiv.org/abs/2304.05527 (with independent draws)
    """
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"num_draws must be even and at least 2; got {num_draws}.")
    generator = torch.Generator().manual_seed(seed)
    half = num_draws // 2
    directions = torch.cat(
        [_orthogonal(min(size, half - i), size, generator) for i in range(0, half, size)]
    )
    radii = torch.randn(half, size, generator=generator, dtype=torch.float64).norm(dim=1)
    draws = directions * radii[:, None]
    draws = draws / draws.square().mean(0).sqrt()
    return torch.cat([draws, -draws])


def stratified_draws(num_draws: int, size: int, *, seed: int = 0) -> Tensor:
    """Antithetic standard normal draws that fill every coordinate evenly, tails included.

    Half of them are a scrambled Sobol net, so that averages of functions of one coordinate are
    nearly exact: what shapes of factors are fitted to. Orthogonal directions would be better for
    functions that are nearly quadratic, and leave more to chance in the tails.

    Args:
        num_draws: Number of draws S, even and at least 2.
        size: Dimension D, at least 1; beyond 21,201, where nets end, draws are :func:`fixed_draws`.
        seed: Seed of the scrambling; the global generator is not touched.

    Returns:
        Draws in double precision, shape ``(S, D)``, with unit second moments and, where they are
        eight times as many as dimensions, without correlations; row ``S / 2 + i`` is the negative
        of row ``i``.

    Raises:
        ValueError: If ``num_draws`` is odd or less than 2.

    References:
        Buchholz, Wenzel and Mandt (2018), Quasi-Monte Carlo Variational Inference,
        https://arxiv.org/abs/1807.01604
    """
    if size > SobolEngine.MAXDIM:
        return fixed_draws(num_draws, size, seed=seed)
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"num_draws must be even and at least 2; got {num_draws}.")
    net = SobolEngine(size, scramble=True, seed=seed).draw(num_draws // 2, dtype=torch.float64)
    draws = torch.special.ndtri(net.clamp(_EDGE, 1.0 - _EDGE))
    if num_draws >= _MANY * size:  # enough that decorrelating them hardly moves any
        second = draws.T @ draws / len(draws)
        values, vectors = torch.linalg.eigh(second)
        draws = draws @ (vectors * values.rsqrt()) @ vectors.T
    draws = draws / draws.square().mean(0).sqrt()
    return torch.cat([draws, -draws])


def _orthogonal(num: int, size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal unit vectors in random directions, shape ``(num, size)``."""
    gaussian = torch.randn(size, num, generator=generator, dtype=torch.float64)
    vectors, upper = torch.linalg.qr(gaussian)
    rotated: Tensor = vectors * upper.diagonal().sign()  # signs make the rotation uniform
    return rotated.T
