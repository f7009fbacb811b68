r"""Linear response: covariances that a mean-field optimum implies but does not hold.

How the optimum's locations move when the log density is tilted by a linear term is, at the exact
posterior, its covariance. At a mean-field optimum this derivative corrects variances that are too
small and gives the correlations: :math:`\mathrm{Cov} = [\nabla^2 F]^{-1}` in the block of the
locations, where F is the negative ELBO. It is exact for a Gaussian posterior, for every set of
fixed draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import LinearResponseError
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO

_MAX_CG = 1000


@dataclass(frozen=True, eq=False)
class LinearResponse:
    """A Gaussian on the unconstrained space with the linear-response covariance.

    Args:
        loc: Means, shape ``(D,)``: those of the mean-field optimum.
        covariance: Covariances, shape ``(D, D)``.

    References:
        Giordano, Broderick and Jordan (2018), Covariances, Robustness, and Variational Bayes,
        https://arxiv.org/abs/1709.02536
    """

    loc: Tensor
    covariance: Tensor

    @property
    def sd(self) -> Tensor:
        """Standard deviations on the unconstrained space, shape ``(D,)``."""
        sd: Tensor = self.covariance.diagonal().sqrt()
        return sd

    @property
    def correlation(self) -> Tensor:
        """Correlations, shape ``(D, D)``."""
        correlation: Tensor = self.covariance / torch.outer(self.sd, self.sd)
        return correlation

    @cached_property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of the covariance, shape ``(D, D)``."""
        factor: Tensor = torch.linalg.cholesky(self.covariance)
        return factor

    def at(self, elements: Tensor) -> LinearResponse:
        """The response of some elements alone, positions ``(k,)`` in the flat vector."""
        return LinearResponse(self.loc[elements], self.covariance[elements][:, elements])

    def sample(self, num_draws: int, *, seed: int = 0) -> Tensor:
        """Draw flat unconstrained vectors, shape ``(num_draws, D)``."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_draws, len(self.loc), generator=generator, dtype=torch.float64)
        draws: Tensor = self.loc + noise.to(self.loc) @ self.scale_tril.T
        return draws


def linear_response(loc: Tensor, hessian: Tensor) -> LinearResponse:
    """Invert the Hessian of the negative ELBO at an optimum.

    Args:
        loc: Locations at the optimum, shape ``(D,)``.
        hessian: Second derivatives by location and log scale, shape ``(2 D, 2 D)``.

    Raises:
        LinearResponseError: If the Hessian is not finite or not positive definite.
    """
    size = len(loc)
    if not bool(torch.isfinite(hessian).all()):
        raise LinearResponseError(
            "the Hessian of the ELBO is not finite at the optimum, so there is no linear response. "
            "The log density is not twice differentiable at some of the draws."
        )
    # In units of its diagonal, so that badly scaled latents do not look singular.
    root = hessian.diagonal().abs().clamp_min(torch.finfo(hessian.dtype).tiny).sqrt()
    round_hessian = hessian / (root[:, None] * root)
    try:
        smallest = float(torch.linalg.eigvalsh(round_hessian)[0])
    except RuntimeError:  # LinAlgError, so ill-conditioned that the algorithm gives up
        smallest = -math.inf
    if smallest <= 1e-10:
        raise LinearResponseError(
            f"the Hessian of the ELBO is not positive definite (smallest eigenvalue {smallest:.2g} "
            "in units of its diagonal), so there is no linear response: the point is no strict "
            "optimum, or the posterior leaves a direction undetermined."
        )
    inverse = torch.linalg.inv(round_hessian) / (root[:, None] * root)
    covariance = inverse[:size, :size]
    return LinearResponse(loc, (covariance + covariance.T) / 2)


def response_of(elbo: FixedDrawELBO, x: Tensor, elements: Tensor) -> LinearResponse:
    """Linear response of chosen latents, without the Hessian as a matrix.

    Every latent takes one solution of a linear system by conjugate gradients, with the Hessian that
    independent latents would have as the preconditioner; each of its iterations takes three
    gradients.

    Args:
        elbo: The objective.
        x: Location and log scale at its optimum, shape ``(2 D,)``.
        elements: Positions k of the latents in the flat vector, shape ``(k,)``.

    Returns:
        The response of these latents alone.

    Raises:
        LinearResponseError: If a system has no solution: the Hessian is not positive definite.
    """
    from scipy.sparse.linalg import LinearOperator, cg  # late, as in minimise.py

    size = elbo.size
    metric = elbo.unit_metric(x)

    def product(y: Any) -> Any:
        vector = metric * torch.as_tensor(y, dtype=x.dtype)
        return (metric * elbo.hessian_vector(x, vector)).numpy()

    operator = LinearOperator((2 * size, 2 * size), matvec=product, dtype=float)
    columns = []
    for element in elements.tolist():
        right = torch.zeros_like(x)
        right[element] = metric[element]
        solution, failed = cg(operator, right.numpy(), rtol=1e-6, maxiter=_MAX_CG)
        column = metric * torch.as_tensor(solution, dtype=x.dtype)
        if failed or not float(column[element]) > 0.0:
            raise LinearResponseError(
                f"conjugate gradients found no linear response for latent {element} of the flat "
                f"vector in {_MAX_CG} iterations: the Hessian of the ELBO is not positive definite "
                "or nearly singular there."
            )
        columns.append(column[elements])
    covariance = torch.stack(columns)
    return LinearResponse(x[elements], (covariance + covariance.T) / 2)
