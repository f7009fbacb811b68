"""Whether two samples of one target agree, where one knows what the other may have missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_mf.kernels.weighted import WeightedDraws

# A difference that counts: in standard errors, which chance does not make; and, as few runs know
# their own error badly, in sds of a mean, in variances, and in half of the mass that is missed.
_Z, _MEAN, _SQUARE, _COVERED = 4.0, 0.1, 0.2, 0.02


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

    Next to means and squares it looks at :math:`q / (q + p)`, where q is the proposal and p the
    target normalised by the importance sample. It is near zero wherever the proposal hardly goes,
    so its average shows a mode or a neck that no weight tells of.

    Args:
        draws: The importance sample.
        log_prob: Log density of its proposals' mixture at rows.
        reference: The other draws.

    Returns:
        What differs by more than four standard errors and a tenth of an sd, in words; empty where
        nothing does.

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

    def values(z: Tensor, log_density: Tensor) -> Tensor:
        z = z.reshape(-1, size)
        covered = torch.sigmoid(log_prob(z) - log_density.reshape(-1) + draws.log_evidence)
        white = (z - draws.mean) / draws.sd
        return torch.cat([white, white.square(), covered[:, None]], 1)

    own = values(draws.z, draws.log_density)
    mean, error = draws.expectation(own)
    spread = (draws.weights @ (own - mean).square()).sqrt()
    other, other_error = reference.expectation(values(reference.z, reference.log_density))
    # Few units know their own error badly: none is taken to be below that of all functions.
    typical = (other_error / spread).square().mean().sqrt() * spread
    error = (error.square() + torch.maximum(other_error, typical).square()).sqrt()
    difference = (mean - other).abs()
    difference[-1] = mean[-1] - other[-1]  # a proposal may well be high where its draws were
    material = torch.tensor([_MEAN] * size + [_SQUARE] * size + [_COVERED]).to(difference)
    excess = torch.where(difference > material, difference / error, 0.0)
    worst = int(excess.argmax())
    if float(excess[worst]) <= _Z:
        return []
    what = "a mean" if worst < size else "a square" if worst < 2 * size else "where the draws lie"
    return [
        f"they differ from the draws that the proposal was fitted to ({what}, by "
        f"{float(excess[worst]):.1f} standard errors): there is a mode or a neck that the draws "
        "miss, or the others were wrong"
    ]
