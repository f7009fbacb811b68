r"""The ELBO of a mixture of factorised Normals over fixed draws, as a deterministic function.

With noise :math:`\varepsilon_{ks}` held fixed and :math:`z_{ks} = m_k + s_k \varepsilon_{ks}`,
draws of every component,

.. math:: F = -\sum_k w_k \frac1S \sum_s \bigl[\log p(z_{ks}) - \log q(z_{ks})\bigr]

is a smooth function of locations, log scales and logits of the weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mf.density.blocks import Blocks
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.families.protocol import Params
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.meter import Meter

_LEAST_WEIGHT = 1e-2  # by which steps of a component are measured: they get no longer than that
_SEEDS_APART = 7919  # of the components' noise


class Components(NamedTuple):
    """A mixture's parameters as the solver has them.

    Args:
        loc: Locations, shape ``(D, K)``.
        log_scale: Log scales, shape ``(D, K)``.
        logits: Log weights up to a constant, shape ``(K,)``.
    """

    loc: Tensor
    log_scale: Tensor
    logits: Tensor

    @property
    def weights(self) -> Tensor:
        """Weights, shape ``(K,)``."""
        return torch.softmax(self.logits, 0)

    @property
    def params(self) -> Params:
        """The family's parameters."""
        return self.loc, self.log_scale.exp(), self.logits

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every element under the mixture, each ``(D,)``."""
        mean = self.loc @ self.weights
        spread = (2.0 * self.log_scale).exp() + (self.loc - mean[:, None]).square()
        return mean, (spread @ self.weights).sqrt()


class MixtureELBO:
    """Negative ELBO over fixed noise, as a function of one vector ``(2 D K + K,)``.

    Args:
        blocks: The log joint.
        num_components: Number of components K.
        num_draws: Number of draws S of every component, even.
        seed: Seed of the noise, which is antithetic and orthogonal, with unit second moments.
        meter: Where gradients are counted.
    """

    def __init__(
        self, blocks: Blocks, num_components: int, num_draws: int, *, seed: int, meter: Meter
    ) -> None:
        self.blocks, self.num_draws = blocks, num_draws
        self.num_components = num_components
        self._family = FactorisedMixture(num_components)
        self._meter = meter
        self._noise = torch.stack(
            [
                fixed_draws(num_draws, blocks.size, seed=seed + _SEEDS_APART * k)
                for k in range(num_components)
            ],
            1,
        )  # shape: (S, K, D)
        meter.best = None  # losses over other draws do not compare

    def flatten(self, components: Components) -> Tensor:
        """The parameters as one vector."""
        return torch.cat([part.reshape(-1) for part in components])

    def split(self, x: Tensor) -> Components:
        """The parameters of a vector."""
        num = self.blocks.size * self.num_components
        shape = (self.blocks.size, self.num_components)
        loc, log_scale, logits = x.split([num, num, self.num_components])
        return Components(loc.reshape(shape), log_scale.reshape(shape), logits)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Negative ELBO in nats and its gradient; infinite, with gradient zero, off the support.

        Raises:
            BudgetSpentError: If no more gradients may be computed.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            params = self.split(leaf).params
            z, weights = self._family.strata(params, self._noise)
            log_q = self._family.joint_log_prob(params, z)
            values, gradients = self.blocks.value_and_grad(z.detach())
            # A function with the density's value and gradient at the draws.
            log_p = values + (gradients * (z - z.detach())).sum(-1)
            loss = (weights * (log_q - log_p)).sum()
            value = float(loss.detach())
            if math.isfinite(value):
                (gradient,) = torch.autograd.grad(loss, leaf)
                value = value if bool(torch.isfinite(gradient).all()) else math.inf
        self._meter.count(self.num_draws, x, value if math.isfinite(value) else math.inf)
        if not math.isfinite(value):
            return math.inf, torch.zeros_like(x)
        return value, gradient

    @torch.no_grad()
    def pair_elbos(self, x: Tensor) -> Tensor:
        """ELBO over each antithetic pair of draws of all components, shape ``(S / 2,)``."""
        components = self.split(x)
        z, _ = self._family.strata(components.params, self._noise)
        terms = self.blocks.values(z) - self._family.joint_log_prob(components.params, z)
        by_draw = terms.reshape(self.num_draws, -1) @ components.weights
        return torch.stack(by_draw.chunk(2)).mean(0)

    def unit_metric(self, x: Tensor) -> Tensor:
        """Steps that change the mixture by about as much, were its components apart."""
        components = self.split(x)
        weights = components.weights.clamp(_LEAST_WEIGHT, 1.0 - _LEAST_WEIGHT)
        root = weights.sqrt()
        return torch.cat(
            [
                (components.log_scale.exp() / root).reshape(-1),
                (0.5**0.5 / root).expand(components.loc.shape).reshape(-1),
                1.0 / (weights * (1.0 - weights)).sqrt(),
            ]
        )
