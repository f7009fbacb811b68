"""Whether a fixed-draw optimum is one, and how far its draws have moved it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import LinearResponseError
from pyro_mf.solvers.fixed_draw_elbo import Estimate, FixedDrawELBO
from pyro_mf.solvers.linear_response import LinearResponse, linear_response

# Nats that the optimum may still be away, and standard errors by which two ELBOs may differ.
_MAX_DECREMENT, _MAX_Z = 1e-4, 4.0


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known of a point that a solver takes for the optimum.

    Args:
        decrement: Newton decrement: nats that the objective could still fall, by its quadratic
            model; infinite where the Hessian is not positive definite.
        noise: Per latent, error that the fixed draws put on its location, in posterior sds (those
            of linear response), shape ``(D,)``; NaN where the Hessian is not positive definite.
        optimism: Nats by which the ELBO over the draws it was optimised over is expected to exceed
            that over fresh ones.
        gap: By how many nats it does.
        gap_se: Standard error of the gap.
        response: The linear response.
        refusal: Why there is none.
    """

    decrement: float
    noise: Tensor
    optimism: float
    gap: float
    gap_se: float
    response: LinearResponse | None
    refusal: str

    @property
    def is_stationary(self) -> bool:
        """Whether the point is an optimum over its draws."""
        return self.decrement < _MAX_DECREMENT

    @property
    def agrees_on_fresh_draws(self) -> bool:
        """Whether the ELBO over fresh draws is what it should be if the draws were enough."""
        return self.gap < 2.0 * self.optimism + _MAX_Z * self.gap_se

    def is_precise(self, tolerance: float) -> bool:
        """Whether no location is off by more than ``tolerance`` sds because of the draws."""
        return bool((self.noise <= tolerance).all())


def certify(elbo: FixedDrawELBO, x: Tensor, hessian: Tensor, fresh: Estimate) -> Certificate:
    """Examine a point.

    Args:
        elbo: The objective.
        x: Location and log scale, shape ``(2 D,)``.
        hessian: Its Hessian there.
        fresh: ELBO over fresh draws.

    Returns:
        The certificate. The noise is that of the sandwich formula: the covariance of the optimum
        over draws is the inverse Hessian times the covariance of the gradient times the inverse
        Hessian, with antithetic pairs as the independent units.
    """
    pairs = elbo.pair_gradients(x)
    gradient = pairs.mean(0)
    value, _ = elbo.value_and_gradient(x)
    own = elbo.estimate(x)
    gap, gap_se = -value - fresh.elbo, (own.se**2 + fresh.se**2) ** 0.5
    try:
        response = linear_response(x[: elbo.size], hessian)
    except LinearResponseError as error:
        nowhere = torch.full_like(x[: elbo.size], torch.nan)
        return Certificate(float("inf"), nowhere, 0.0, gap, gap_se, None, str(error))
    step = torch.linalg.solve(hessian, gradient)
    moved = torch.linalg.solve(hessian, (pairs - gradient).T)  # (2 D, pairs)
    scatter = len(pairs) * (len(pairs) - 1)
    noise = (moved.square().sum(1) / scatter).sqrt()[: elbo.size]
    optimism = float((moved * (pairs - gradient).T).sum()) / scatter
    decrement = 0.5 * float(gradient @ step)
    return Certificate(decrement, noise / response.sd, optimism, gap, gap_se, response, "")
