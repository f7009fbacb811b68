"""Whether two samples of one target agree, where one knows what the other may have missed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_mf.kernels.weighted import WeightedDraws

# A difference that counts: in standard errors, which chance does not make; and, as few runs know
# their own error badly, in sds of a mean and in variances.
_Z, _MEAN, _SQUARE = 4.0, 0.1, 0.2
_ROUGH = 0.08  # error of a mean in sds, or of an sd, above which the other draws prove nothing
_UNSEEN = 0.002  # mass that may be out of the draws' reach


class Reference(Protocol):
    """Draws of a target from elsewhere: of tempered SMC, or of chains ``(T, N)``."""

    @property
    def z(self) -> Tensor:
        """Draws, shape ``(..., D)``."""
        ...

    @property
    def log_density(self) -> Tensor:
        """Log of the unnormalised density there, shape ``(...)``."""
        ...

    def expectation(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Averages of functions ``(S, K)`` of the draws, in one row, and standard errors."""
        ...


def find_disagreement(
    draws: WeightedDraws, log_prob: Callable[[Tensor], Tensor], reference: Reference
) -> list[str]:
    r"""Compare an importance sample with draws from elsewhere.

    Next to means and squares it looks at what share of the other draws lies where one of these
    would weigh as much as all S of them, :math:`p > S q`. So few fall there that it is less than
    one in the mean, and no weight tells of a mode or neck that is missed.

    Args:
        draws: The importance sample.
        log_prob: Log density of its proposals' mixture at rows.
        reference: The other draws.

    Returns:
        What differs by more than four standard errors and a tenth of an sd, or is missed, in words;
        empty where nothing is.

    Example:
        >>> def normal(n):
        ...     return torch.randn(n, 1, generator=torch.Generator().manual_seed(n)).double()
        >>> def sample(z):
        ...     zeros = torch.zeros(len(z)).double()
        ...     return WeightedDraws(z, zeros, -0.5 * z.square().sum(1), 1, 100, 0.0, len(z))
        >>> log_prob = lambda z: -0.5 * z.square().sum(1)
        >>> find_disagreement(sample(normal(1000)), log_prob, sample(normal(2000)))
        []
        >>> len(find_disagreement(sample(normal(1000)), log_prob, sample(normal(2000) + 1.0)))
        1
    """
    size = draws.z.shape[1]

    def values(z: Tensor) -> Tensor:
        white = (z.reshape(-1, size) - draws.mean) / draws.sd
        return torch.cat([white, white.square()], 1)

    own = values(draws.z)
    mean, error = draws.expectation(own)
    spread = (draws.weights @ (own - mean).square()).sqrt()
    other, other_error = reference.expectation(values(reference.z))
    # Few units know their own error badly: none is taken to be below that of all functions.
    typical = (other_error / spread).square().mean().sqrt() * spread
    error = (error.square() + torch.maximum(other_error, typical).square()).sqrt()
    difference = (mean - other).abs()
    material = torch.tensor([_MEAN] * size + [_SQUARE] * size).to(difference)
    excess = float(torch.where(difference > material, difference / error, 0.0).max())
    found = []
    rough = float(torch.maximum(other_error[:size], 0.5 * other_error[size:]).max())
    if not rough <= _ROUGH:
        found.append(
            f"the draws that they are compared with are too rough for that: they know a mean or sd "
            f"to {rough:.2f} only"
        )
    if excess > _Z:
        found.append(
            "they differ from the draws that they are compared with by "
            f"{excess:.1f} standard errors of a mean or square: one of the two misses something"
        )
    normalised = reference.log_density.reshape(-1) - draws.log_evidence
    ratio = normalised - log_prob(reference.z.reshape(-1, size))
    beyond = (ratio > math.log(len(draws.z))).to(own)[:, None]
    unseen = float(reference.expectation(beyond)[0])
    if unseen > _UNSEEN:
        found.append(
            f"{unseen:.1%} of the draws that they are compared with lie where the proposal hardly "
            "goes: there is a mode or a neck that no weight tells of"
        )
    return found
