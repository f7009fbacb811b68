r"""The ELBO of factors of any family over fixed draws, as a deterministic function.

With noise :math:`\varepsilon_s` held fixed and :math:`z_s = T(\lambda, \varepsilon_s)`,

.. math:: F(\lambda) = -\frac1S \sum_s \log p(z_s) - H(\lambda)

is a smooth function of the stored parameters. Only gradients of the log joint at the S draws are
asked for; the rest of the chain is the family's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf.density.blocks import Blocks
from pyro_mf.families import Family
from pyro_mf.families.product import Product
from pyro_mf.families.protocol import Params
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.objectives.non_finite import LinAlgError
from pyro_mf.solvers.draws import stratified_draws
from pyro_mf.solvers.meter import Meter
from pyro_mf.solvers.units import score_information

_WEIGHT = 8.0  # of the shape of a Normal, in draws
_LEAST_INFORMATION = 1e-2  # so that no unit is longer than ten


class FamilyELBO:
    """Negative ELBO over fixed noise, as a function of the stored parameters, one vector ``(P,)``.

    Few draws know little of a factor's tails, and a flexible one would follow their noise. Shape
    parameters are therefore held to those of the member nearest to a Normal, with the weight of
    several draws, which vanishes as the draws are doubled.

    Args:
        blocks: The log joint.
        guide: A guide, set up; its family and how it stores the parameters are used.
        num_draws: Number of draws S, even.
        seed: Seed of the noise, which is antithetic and a net.
        meter: Where gradients are counted.
    """

    def __init__(
        self, blocks: Blocks, guide: FactorisedGuide, num_draws: int, *, seed: int, meter: Meter
    ) -> None:
        self.blocks = blocks
        self.num_draws = num_draws
        self._family: Family = guide.family
        self._constraints = guide.param_constraints
        self._shapes = [leaf.shape for leaf in guide.flat_leaves()]
        self._meter = meter
        shape = self._family.noise((0, blocks.size)).shape[1:]
        noise = stratified_draws(num_draws, shape.numel(), seed=seed)
        self._noise = noise.reshape(num_draws, *shape)
        self._held_to, self._is_shape = self._shapes_of_normal(blocks.size)
        meter.best = None  # losses over other draws do not compare

    def flatten(self, params: Params) -> Tensor:
        """The stored parameters as one vector, from the constrained ones."""
        stored = [
            transform_to(c).inv(p.detach().to("cpu", torch.float64))
            for c, p in zip(self._constraints, params, strict=True)
        ]
        return torch.cat([x.reshape(-1) for x in stored])

    def params(self, x: Tensor) -> Params:
        """The constrained parameters at a point."""
        return self._constrain(self._stored(x))

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Negative ELBO in nats and its gradient; infinite, with gradient zero, off the support.

        Raises:
            BudgetSpentError: If no more gradients may be computed.
        """
        with torch.enable_grad():
            stored = tuple(s.detach().requires_grad_() for s in self._stored(x))
            params = self._constrain(stored)
            try:
                z = self._family.transform(params, self._noise)
                entropy = self._entropy(params, z).mean()
            except LinAlgError:  # parameters too far out for their covariance
                self._meter.count(self.num_draws, x, math.inf)
                return math.inf, torch.zeros_like(x)
            values, gradients = self.blocks.value_and_grad(z.detach())
            bend = self._is_shape * (torch.cat([s.reshape(-1) for s in stored]) - self._held_to)
            penalty = 0.5 * _WEIGHT / self.num_draws * bend.square().sum()
            value = float(-values.mean() - entropy.detach() + penalty.detach())
            if not math.isfinite(value):
                self._meter.count(self.num_draws, x, math.inf)
                return math.inf, torch.zeros_like(x)
            surrogate = penalty - (gradients * z).sum() / self.num_draws - entropy
            found = torch.autograd.grad(
                surrogate, stored, allow_unused=True, materialize_grads=True
            )
        gradient = torch.cat([g.reshape(-1) for g in found])
        is_finite = bool(torch.isfinite(gradient).all())
        value = value if is_finite else math.inf
        self._meter.count(self.num_draws, x, value)
        return value, gradient if is_finite else torch.zeros_like(x)

    @torch.no_grad()
    def draws(self, x: Tensor) -> Tensor:
        """The draws of the factors at a point, shape ``(S, D)``."""
        return self._family.transform(self.params(x), self._noise)

    @torch.no_grad()
    def pair_elbos(self, x: Tensor) -> Tensor:
        """ELBO over each antithetic pair of draws, shape ``(S / 2,)``.

        By -log q at the draws and not by the entropy: the nearer q is to the posterior, the less do
        they vary, and where it is the posterior they are all the log evidence.
        """
        params = self.params(x)
        z = self._family.transform(params, self._noise)
        values = self.blocks.values(z) - self._family.log_prob(params, z).sum(-1)
        return torch.stack(values.chunk(2)).mean(0)

    @torch.no_grad()
    def unit_metric(self, x: Tensor) -> Tensor:
        """Steps in the stored parameters that change the factors by about as much, ``(P,)``."""
        stored = self._stored(x)
        draws = self._family.transform(self._constrain(stored), self._noise)
        found = score_information(self._family, self._constraints, stored, draws)
        information = torch.cat([i.reshape(-1) for i in found])
        return information.nan_to_num(nan=1.0).clamp_min(_LEAST_INFORMATION).rsqrt()

    def _shapes_of_normal(self, size: int) -> tuple[Tensor, Tensor]:
        """Stored parameters of standard Normal members, and where the shapes are among them."""
        ones = torch.ones(size, dtype=torch.float64)
        params = self._family.init(torch.zeros_like(ones), ones)
        is_shape = [
            torch.full((p.numel(),), float(is_shape), dtype=torch.float64)
            for p, is_shape in zip(params, _are_shapes(self._family), strict=True)
        ]
        return self.flatten(params), torch.cat(is_shape)

    def _entropy(self, params: Params, z: Tensor) -> Tensor:
        """Entropy of all factors; where it has no closed form, at every draw."""
        exact = self._family.entropy(params)
        if exact is not None:
            return exact.sum().expand(self.num_draws)
        return -self._family.log_prob(params, z).sum(-1)

    def _stored(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.split([shape.numel() for shape in self._shapes])
        return tuple(p.reshape(shape) for p, shape in zip(parts, self._shapes, strict=True))

    def _constrain(self, stored: tuple[Tensor, ...]) -> Params:
        return tuple(transform_to(c)(s) for c, s in zip(self._constraints, stored, strict=True))


def _are_shapes(family: Family) -> list[bool]:
    """Which parameters of a family are neither location nor scale, where it has those."""
    if isinstance(family, Product):
        return [shape for part in family.parts for shape in _are_shapes(part.family)]
    names = family.param_names
    is_plain = names[:2] == ("loc", "scale")
    return [is_plain and index > 1 for index in range(len(names))]
