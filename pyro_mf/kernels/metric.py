"""The covariance that a Hamiltonian kernel takes the density to have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Draws that an earlier variance counts for, where coordinates are taken one by one.
_EARLIER_DRAWS = 10.0


@dataclass(frozen=True, eq=False)
class Metric:
    """An estimate of the target's covariance: the inverse of the mass matrix.

    Positions in its unit have about the identity as their covariance, so that one step size suits
    all directions.

    Args:
        scale: Standard deviations, shape ``(D,)``, or the lower Cholesky factor of a covariance,
            shape ``(D, D)``.

    Raises:
        ValueError: If the shape is neither, or a diagonal entry is not positive and finite.

    Example:
        >>> metric = Metric(torch.tensor([1.0, 10.0]))
        >>> metric.velocity(torch.tensor([[1.0, 1.0]]))
        tensor([[  1., 100.]])
    """

    scale: Tensor

    def __post_init__(self) -> None:
        scale = self.scale
        is_square = scale.dim() == 2 and scale.shape[0] == scale.shape[1]
        if scale.dim() != 1 and not is_square:
            raise ValueError(
                "a metric's scale must have shape (D,), sds, or (D, D), a lower Cholesky factor; "
                f"got {tuple(scale.shape)}."
            )
        diagonal = scale.diagonal() if is_square else scale
        if not bool((torch.isfinite(scale).all()) & (diagonal > 0).all()):
            raise ValueError(
                "a metric's scale must be finite with a positive diagonal. Where a latent has no "
                "known scale, give it 1."
            )

    @property
    def is_dense(self) -> bool:
        """Whether it knows correlations."""
        return self.scale.dim() == 2

    @cached_property
    def covariance(self) -> Tensor:
        """Covariances, shape ``(D, D)``; variances, shape ``(D,)``, where it is diagonal."""
        covariance: Tensor = self.scale @ self.scale.T if self.is_dense else self.scale.square()
        return covariance

    def unwhiten(self, noise: Tensor) -> Tensor:
        """Displacements with this covariance from rows with covariance one, shape ``(N, D)``."""
        return noise @ self.scale.T if self.is_dense else noise * self.scale

    def whiten(self, displacements: Tensor) -> Tensor:
        """The inverse of :meth:`unwhiten`, for any shape ``(..., D)``."""
        if not self.is_dense:
            return displacements / self.scale
        rows = displacements.reshape(-1, len(self.scale))
        solved: Tensor = torch.linalg.solve_triangular(self.scale, rows.T, upper=False).T
        return solved.reshape(displacements.shape)

    def momentum(self, noise: Tensor) -> Tensor:
        """Momenta, whose covariance is this one's inverse, from rows with covariance one."""
        if not self.is_dense:
            return noise / self.scale
        solved: Tensor = torch.linalg.solve_triangular(self.scale.T, noise.T, upper=True).T
        return solved

    def velocity(self, momentum: Tensor) -> Tensor:
        """Velocities of momenta, both of shape ``(N, D)``."""
        return momentum @ self.covariance if self.is_dense else momentum * self.covariance

    def updated(self, draws: Tensor, num_effective: float) -> Metric:
        """The covariance of draws, as far as they know it, and else this one.

        Dense: the sample covariance in this metric's units is shrunk towards the identity by as
        much as its expected error asks for (Ledoit and Wolf), so that fewer draws than latents are
        enough, and a metric that is right already stays as it is. Diagonal: a mean of both.

        Args:
            draws: Shape ``(S, D)``.
            num_effective: How many independent draws they are worth.

        Returns:
            A metric of the same kind.

        References:
            Ledoit and Wolf (2004), A Well-Conditioned Estimator for Large-Dimensional Covariance
            Matrices, Journal of Multivariate Analysis 88(2)
        """
        centred = self.whiten(draws - draws.mean(0))
        if not self.is_dense:
            weight = num_effective / (num_effective + _EARLIER_DRAWS)
            variance = weight * centred.square().mean(0) + (1.0 - weight)
            return Metric(self.scale * variance.sqrt())
        sample = centred.T @ centred / len(centred)
        size = len(sample)
        unit = sample.diagonal().mean()
        identity = torch.eye(size).to(sample)
        distance = (sample - unit * identity).square().sum()
        noise = centred.square().sum(1).square().mean() - sample.square().sum()
        noise = noise / max(num_effective, 1.0)
        if not bool(unit > 0):  # nothing moved
            return self
        shrinkage = (noise / distance).nan_to_num(nan=1.0).clamp(1e-6, 1.0)
        shrunk = shrinkage * unit * identity + (1.0 - shrinkage) * sample
        return Metric(self.scale @ torch.linalg.cholesky(shrunk))
