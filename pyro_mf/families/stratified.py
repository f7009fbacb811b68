"""Draws of a family with gradients that are right: pathwise ones, or those of all its strata.

A draw of a mixture chooses a component, which has no derivative in the mixture's weights. Its
strata are its components: draws of each, weighted, have all derivatives. Families without strata
have draws of equal weight.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from pyro_mf.families.protocol import Family, Params


class Stratified(Protocol):
    """A family whose draws come in strata."""

    def strata_noise(
        self,
        num_draws: int,
        size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise for S draws of every stratum, shape ``(S, K, D)``."""
        ...

    def strata(self, params: Params, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws ``(S K, D)`` and weights ``(S K,)`` that sum to one, both differentiable."""
        ...


def has_strata(family: object) -> TypeGuard[Stratified]:
    """Whether a family's gradients come from its strata."""
    return hasattr(type(family), "strata")


def noise_like(family: Family, num_draws: int, size: int, like: Tensor) -> Tensor:
    """Noise for S draws of flat vectors, or of every stratum.

    Args:
        family: The family.
        num_draws: Number of draws S.
        size: Length D of a vector.
        like: A tensor whose dtype and device it gets.
    """
    if has_strata(family):
        return family.strata_noise(num_draws, size, dtype=like.dtype, device=like.device)
    return family.noise((num_draws, size), dtype=like.dtype, device=like.device)


def weighted_draws(family: Family, params: Params, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws ``(N, D)`` from the noise of :func:`noise_like`, and their weights.

    Args:
        family: The family.
        params: Its parameters.
        noise: The noise.

    Returns:
        The draws, and weights ``(N,)`` that sum to one.

    Example:
        >>> from pyro_mf.families import Normal
        >>> params = (torch.zeros(1), torch.ones(1))
        >>> weighted_draws(Normal(), params, torch.tensor([[1.0], [2.0]]))[1]
        tensor([0.5000, 0.5000])
    """
    if has_strata(family):
        return family.strata(params, noise)
    draws = family.transform(params, noise)
    return draws, draws.new_full((len(draws),), 1.0 / len(draws))
