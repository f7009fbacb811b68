"""Whether a fixed-draw optimum is one, and how far its draws have moved it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import LinearResponseError
from pyro_mf.solvers.fixed_draw_elbo import Curvature, Estimate, FixedDrawELBO
from pyro_mf.solvers.linear_response import LinearResponse, linear_response

# Nats that the optimum may still be away, and standard errors by which two ELBOs may differ.
_MAX_DECREMENT, _MAX_Z = 1e-4, 4.0
# Factor between two estimates of one curvature; below 1.5 on all smooth posteriors that were tried.
_MAX_CURVATURE_RATIO = 4.0
# Factor on the tolerance of locations where the sds they are measured in are known to be too small
# for most latents.
_SLACK = 2.5


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is known of a point that a solver takes for the optimum.

    Args:
        decrement: Newton decrement: nats that the objective could still fall, by its quadratic
            model; infinite where the Hessian is not positive definite.
        noise: Standard error that the fixed draws put on each location and on each log scale,
            shape ``(2 D,)``; NaN where the Hessian is not positive definite.
        sd: Standard deviations of the latents as they are believed to be, shape ``(D,)``: what the
            noise of a location is measured in.
        optimism: Nats by which the ELBO over the draws it was optimised over is expected to exceed
            that over fresh ones.
        gap: By how many nats it does.
        gap_se: Standard error of the gap.
        max_decrement: Largest decrement that rounding explains, and that nobody would notice.
        response: The linear response.
        refusal: Why there is none.
        is_believed: Whether the Gaussian of linear response is closer to the posterior than the
            factors are; then ``sd`` is that of linear response, else the smaller of the two.
    """

    decrement: float
    noise: Tensor
    sd: Tensor
    optimism: float
    gap: float
    gap_se: float
    max_decrement: float
    response: LinearResponse | None
    refusal: str
    is_believed: bool = False

    @property
    def loc_noise(self) -> float:
        """Largest standard error of a location, in the sds that are believed."""
        return float((self.noise.chunk(2)[0] / self.sd).max())

    @property
    def scale_noise(self) -> float:
        """Largest relative standard error of a scale."""
        return float(self.noise.chunk(2)[1].max())

    def complaints(self, tolerance: float) -> list[str]:
        """What is wrong with the point, in words with the numbers.

        Args:
            tolerance: Error that the draws may cause, of a location in posterior sds, and of a
                scale relative to it.
        """
        if not math.isfinite(self.gap):
            return [
                "the posterior has hard walls that its supports do not state: the factors put some "
                "mass where the density is zero, so the ELBO is minus infinity"
            ]
        found = []
        if math.isinf(self.decrement):
            found.append("the Hessian is not positive definite, so it is no strict optimum")
        elif not self.decrement < self.max_decrement:
            found.append(f"it is {self.decrement:.2g} nats from an optimum")
        else:
            found += self._noise_complaints(tolerance)
        if not self.gap < 2.0 * self.optimism + _MAX_Z * self.gap_se:
            found.append(
                f"on fresh draws the ELBO is {self.gap:.3g} nats lower, "
                f"where {self.optimism:.2g} \u00b1 {self.gap_se:.2g} is expected"
            )
        return found

    def _noise_complaints(self, tolerance: float) -> list[str]:
        found = []
        if not self.loc_noise <= tolerance * (1.0 if self.is_believed else _SLACK):
            found.append(f"the draws move a location by {self.loc_noise:.2g} posterior sds")
        if not self.scale_noise <= tolerance:
            found.append(f"the draws change a scale by {100.0 * self.scale_noise:.2g} %")
        return found


def certify(
    elbo: FixedDrawELBO, x: Tensor, curvature: Curvature | None, fresh: Estimate
) -> Certificate:
    """Examine a point.

    Args:
        elbo: The objective.
        x: Location and log scale, shape ``(2 D,)``.
        curvature: Second derivatives there; ``None`` where there are too many latents for a matrix.
        fresh: ELBO over fresh draws.

    Returns:
        The certificate. The noise is that of the sandwich formula: the covariance of the optimum
        over draws is the inverse Hessian times the covariance of the gradient times the inverse
        Hessian, with antithetic pairs as the independent units.
    """
    size, pairs = elbo.size, elbo.pair_gradients(x)
    gradient = pairs.mean(0)
    own = elbo.estimate(x)
    epsilon = torch.finfo(elbo.dtype).eps
    shared: dict[str, Any] = {
        "gap": own.elbo - fresh.elbo,
        "gap_se": math.hypot(own.se, fresh.se),
        "max_decrement": max(_MAX_DECREMENT, 100.0 * epsilon * abs(own.elbo)),
    }
    scatter = len(pairs) * (len(pairs) - 1)
    if curvature is None:
        return _certify_by_diagonal(elbo, x, pairs, shared)
    hessian, scale = curvature.hessian, x[size:].exp()
    try:
        response = linear_response(x[:size], hessian)
    except LinearResponseError as error:
        nowhere = torch.full_like(x, torch.nan)
        return Certificate(
            math.inf, nowhere, scale, 0.0, **shared, response=None, refusal=str(error)
        )
    centred = (pairs - gradient).T
    moved = torch.linalg.solve(hessian, centred)
    noise = (moved.square().sum(1) / scatter).sqrt()
    return Certificate(
        decrement=0.5 * float(gradient @ torch.linalg.solve(hessian, gradient)),
        noise=noise,
        sd=torch.minimum(response.sd, scale),
        optimism=float((moved * centred).sum()) / scatter,
        **shared,
        response=response,
        refusal="",
    )


def describe_kinks(x: Tensor, curvature: Curvature) -> str:
    """Why second derivatives do not describe the density, empty if they do.

    Price's theorem equates a factor's precision with the mean second derivative. It fails at kinks,
    which have all their curvature in one point.

    Args:
        x: Location and log scale at the optimum, shape ``(2 D,)``.
        curvature: Second derivatives there.
    """
    ratio = curvature.precision.mean(0) * (2.0 * x[len(x) // 2 :]).exp()
    worst = float(torch.where(ratio < 1.0, 1.0 / ratio.clamp_min(1e-12), ratio).max())
    if worst < _MAX_CURVATURE_RATIO:
        return ""
    return (
        f"the second derivatives at the draws are off by a factor of {worst:.2g} from the "
        "curvature that the gradients show, so there is no linear response: the log density has "
        "kinks or jumps"
    )


def _certify_by_diagonal(
    elbo: FixedDrawELBO, x: Tensor, pairs: Tensor, shared: dict[str, Any]
) -> Certificate:
    """The same with the Hessian that independent latents would have.

    At the optimum the expected curvature by a location is the precision of its factor, and that by
    its log scale is two.
    """
    scale = x[elbo.size :].exp()
    inverse = torch.cat([scale.square(), torch.full_like(scale, 0.5)])
    gradient = pairs.mean(0)
    variance = (pairs - gradient).square().sum(0) / (len(pairs) * (len(pairs) - 1))
    return Certificate(
        decrement=0.5 * float((inverse * gradient.square()).sum()),
        noise=inverse * variance.sqrt(),
        sd=scale,
        optimism=float((inverse * variance).sum()),
        **shared,
        response=None,
        refusal=(
            f"with {elbo.size} latents it is computed for chosen sites only: name them, as in "
            "result.linear_response(['site'])"
        ),
    )
