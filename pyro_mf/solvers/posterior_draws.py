"""Draws of the posterior, whatever made them, and what they say about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from pyro_mf.weights import normalize

Source: TypeAlias = Literal["importance", "hmc", "smc", "mixture", "given"]
"""Adaptive importance sampling, parallel HMC chains, tempered SMC, importance sampling from a
mixture that was fitted to tempered draws, or draws that were given."""
_NUM_NAMED = 3  # sites in a sentence
NAMES: dict[Source, str] = {
    "importance": "adaptive importance sampling",
    "hmc": "parallel HMC chains",
    "smc": "tempered sequential Monte Carlo",
    "mixture": "importance sampling from a mixture",
    "given": "the draws given",
}


class Expectations(Protocol):
    """Draws that know the Monte Carlo errors of their averages."""

    def expectation(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Averages of functions ``(S, K)`` of the draws, and standard errors, each ``(K,)``."""
        ...


@dataclass(frozen=True, eq=False)
class PosteriorDraws:
    """Weighted draws of the posterior on the unconstrained space.

    Args:
        source: Where they are from.
        z: Draws, shape ``(S, D)``.
        log_weights: Their log weights in nats, shape ``(S,)``; equal for chains.
        log_density: Log joint at each, in nats, shape ``(S,)``.
        mean_error: Standard errors of the means, in posterior sds, shape ``(D,)``.
        sd_error: Relative standard errors of the sds, shape ``(D,)``.
        problems: Why they are not to be trusted, in words; empty where nothing speaks against it.
        diagnostics: Numbers on how they were made: ``khat``, ``ess``, ``rhat``, ``acceptance``, ...
        noncentred: Sites that were drawn in units of their priors' scales, in part at least.
    """

    source: Source
    z: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    log_density: Tensor = field(repr=False)
    mean_error: Tensor = field(repr=False)
    sd_error: Tensor = field(repr=False)
    problems: tuple[str, ...] = ()
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    noncentred: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """How they were made, in words."""
        sites = ", ".join(f"'{name}'" for name in self.noncentred[:_NUM_NAMED])
        more = len(self.noncentred) - _NUM_NAMED
        and_more = f" and {more} more" if more > 0 else ""
        return NAMES[self.source] + (f" ({sites}{and_more} non-centred)" if sites else "")

    @property
    def largest_error(self) -> float:
        """The largest standard error of a mean, in sds, or of an sd, relative."""
        return float(torch.maximum(self.mean_error, self.sd_error).max())

    @property
    def weights(self) -> Tensor:
        """Weights that sum to one, shape ``(S,)``."""
        return normalize(self.log_weights).exp()

    @property
    def mean(self) -> Tensor:
        """Means on the unconstrained space, shape ``(D,)``."""
        return self.weights @ self.z

    @property
    def sd(self) -> Tensor:
        """Standard deviations on the unconstrained space, shape ``(D,)``."""
        return (self.weights @ (self.z - self.mean).square()).sqrt()

    def sample(self, num_draws: int, *, seed: int = 0) -> Tensor:
        """Draw rows by weight, with replacement, shape ``(num_draws, D)``."""
        generator = torch.Generator().manual_seed(seed)
        return self.z[torch.multinomial(self.weights, num_draws, True, generator=generator)]
