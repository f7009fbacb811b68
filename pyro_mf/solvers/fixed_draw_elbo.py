r"""The ELBO of a mean-field Normal over fixed draws, as a deterministic function.

With draws :math:`\varepsilon_s` held fixed,

.. math:: F(\mu, \omega) = -\frac1S \sum_s \log p(\mu + e^\omega \varepsilon_s) - \sum_d \omega_d

is a smooth function of the location and the log scale, which any optimiser can minimise to machine
precision. Its derivatives need only gradients of the log joint at the S draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_mf.density.blocks import Blocks

if TYPE_CHECKING:
    from pyro_mf.solvers.linear_response import LinearResponse

_HALF_LOG_2PI_E = 0.5 * math.log(2.0 * math.pi * math.e)


class Estimate(NamedTuple):
    """An ELBO and its standard error, in nats."""

    elbo: float
    se: float


def estimate_from(pairs: Tensor) -> Estimate:
    """Mean and standard error of independent ELBOs."""
    return Estimate(float(pairs.mean()), float(pairs.std()) / len(pairs) ** 0.5)


class Curvature(NamedTuple):
    """Second derivatives at a point.

    Args:
        hessian: Hessian of the negative ELBO by location and log scale, shape ``(2 D, 2 D)``.
        precision: Curvature of the log joint by each latent at each draw, shape ``(S, D)``. At the
            optimum over all draws its mean is the factor's precision (Price's theorem).
    """

    hessian: Tensor
    precision: Tensor


class FixedDrawELBO:
    """Negative ELBO over fixed draws as a function of ``(loc, log_scale)``, one vector ``(2 D,)``.

    Args:
        blocks: The log joint.
        draws: Antithetic standard normal draws, shape ``(S, D)``; the second half is the negative
            of the first.

    References:
        Giordano, Ingram and Broderick (2024), Black Box Variational Inference with a Deterministic
        Objective, https://arxiv.org/abs/2304.05527
    """

    def __init__(self, blocks: Blocks, draws: Tensor) -> None:
        self.blocks = blocks
        self.draws = draws
        self.size = draws.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the density is computed; all else is in double precision."""
        return self.blocks.log_joint.dtype

    @property
    def num_draws(self) -> int:
        """Number of draws S."""
        return len(self.draws)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each ``(D,)``."""
        return x[: self.size], x[self.size :].exp()

    def unit_metric(self, x: Tensor) -> Tensor:
        """Steps in location and log scale that change the factors by about as much, ``(2 D,)``."""
        scale = self.split(x)[1]
        return torch.cat([scale, torch.full_like(scale, 0.5**0.5)])

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Negative ELBO in nats and its gradient; infinite, with gradient zero, off the support."""
        values, gradients = self._at_draws(x)
        value = float(-values.mean() - x[self.size :].sum()) - self.size * _HALF_LOG_2PI_E
        if not math.isfinite(value):
            return math.inf, torch.zeros_like(x)
        return value, self._chain(x, gradients).mean(0)

    def thinned(self, num_draws: int) -> FixedDrawELBO:
        """The ELBO over so many of the draws and their negatives, stretched to unit moments."""
        half = self.draws[: num_draws // 2]
        half = half / half.square().mean(0).sqrt()
        return FixedDrawELBO(self.blocks, torch.cat([half, -half]))

    def pair_elbos(self, x: Tensor) -> Tensor:
        """ELBO over each antithetic pair of draws, shape ``(S / 2,)``."""
        values = self.blocks.values(self._z(x))
        pairs = (values[: self.num_draws // 2] + values[self.num_draws // 2 :]) / 2
        return pairs + x[self.size :].sum() + self.size * _HALF_LOG_2PI_E

    def response_elbos(self, response: LinearResponse) -> Tensor:
        """The same with the Gaussian of linear response in place of the factors, ``(S / 2,)``."""
        factor = response.scale_tril
        values = self.blocks.values(response.loc + self.draws @ factor.T)
        pairs = torch.stack(values.chunk(2)).mean(0)
        return pairs + factor.diagonal().log().sum() + self.size * _HALF_LOG_2PI_E

    def estimate(self, x: Tensor) -> Estimate:
        """ELBO and the standard error that the antithetic pairs give it."""
        return estimate_from(self.pair_elbos(x))

    def pair_gradients(self, x: Tensor) -> Tensor:
        """Gradient contributed by each antithetic pair, shape ``(S / 2, 2 D)``."""
        per_draw = self._chain(x, self._at_draws(x)[1])
        return (per_draw[: self.num_draws // 2] + per_draw[self.num_draws // 2 :]) / 2

    def curvature(self, x: Tensor) -> Curvature:
        """Second derivatives, from 2 D S gradients."""
        size, scale = self.size, self.split(x)[1]
        z, gradients = self._z(x), self._at_draws(x)[1]
        spread = scale * self.draws
        hessian = x.new_zeros(2 * size, 2 * size)
        precision = torch.zeros_like(z)
        for d in range(size):
            direction = torch.zeros_like(z)
            direction[:, d] = scale[d]
            column = -self.blocks.hessian_vector(z, direction) / scale[d]
            precision[:, d] = column[:, d]
            hessian[:size, d] = column.mean(0)
            hessian[size:, d] = (column * spread).mean(0)
            hessian[size:, size + d] = (column * spread * spread[:, d, None]).mean(0)
        hessian[:size, size:] = hessian[size:, :size].T
        hessian.diagonal()[size:] -= (gradients * spread).mean(0)
        return Curvature((hessian + hessian.T) / 2, precision)

    def hessian_vector(self, x: Tensor, vector: Tensor) -> Tensor:
        """Hessian times a vector ``(2 D,)``, from 3 S gradients."""
        scale = self.split(x)[1]
        spread = scale * self.draws
        gradients = self._at_draws(x)[1]
        moved = vector[: self.size] + spread * vector[self.size :]
        length = (moved / scale).abs().max().clamp_min(torch.finfo(x.dtype).tiny)
        product = -length * self.blocks.hessian_vector(self._z(x), moved / length)
        curved = product * spread - gradients * spread * vector[self.size :]
        return torch.cat([product.mean(0), curved.mean(0)])

    def _z(self, x: Tensor) -> Tensor:
        loc, scale = self.split(x)
        return loc + scale * self.draws

    def _at_draws(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.blocks.value_and_grad(self._z(x))

    def _chain(self, x: Tensor, gradients: Tensor) -> Tensor:
        """Gradient by location and log scale of each draw's term, shape ``(S, 2 D)``."""
        spread = self.split(x)[1] * self.draws
        return torch.cat([-gradients, -gradients * spread - 1.0], 1)
