"""Von Mises factors of angles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.angles import (
    angle_at_noise,
    inverse_spread,
    log_bessel,
    spread_of,
)
from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma_function import POSITIVE
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params

_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class VonMises(NormalNoise):
    r"""Von Mises factors of angles, :math:`q(u) = e^{\kappa\cos(u-\mu)} / (2\pi I_0(\kappa))`.

    The axis is the circle, unrolled: as with torch's own class the density has period 2 pi, any
    value stands for a point of the circle, and the density integrates to one over a turn. That is
    what a model needs that is itself periodic in the angle, wherever its chains or draws wander.
    Draws and quantiles are those of the turn around the location, ``loc - pi`` to ``loc + pi``, not
    wrapped: so they are monotone in the standard normal noise and have means that mean something.
    The native distribution's draws are wrapped to -pi to pi, as torch's.

    Example:
        >>> family = VonMises()
        >>> params = (torch.tensor([3.0]), torch.tensor([2.0]))
        >>> family.quantile(params, torch.tensor([0.1, 0.9]))
        tensor([1.9470, 4.0530])
    """

    @property
    def name(self) -> str:
        """``"von_mises"``."""
        return "von_mises"

    @property
    def native_to(self) -> str:
        """``"circular"``."""
        return "circular"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "concentration")``."""
        return ("loc", "concentration")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real and positive, the latter stored as a logarithm."""
        return (constraints.real, POSITIVE)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member of least forward divergence from a Normal wrapped around the circle."""
        spread = -torch.expm1(-0.5 * scale.double().square())
        return loc, inverse_spread(spread).to(loc.dtype)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability, within pi of the location."""
        loc, concentration = params
        return loc + angle_at_noise(noise, concentration)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats, with period 2 pi."""
        loc, concentration = params
        height = -2.0 * concentration * torch.sin(0.5 * (u - loc)).square()
        return height - log_bessel(concentration) - _LOG_2PI

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element over a turn, in nats."""
        loc, concentration = params
        entropy = _LOG_2PI + log_bessel(concentration) + concentration * spread_of(concentration)
        return entropy.expand(torch.broadcast_shapes(loc.shape, concentration.shape))

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``, from ``loc - pi`` on."""
        loc, concentration = params
        with torch.no_grad():
            noise = torch.special.ndtri(p.double())
            inner = angle_at_noise(torch.where(noise.isinf(), 0.0, noise), concentration)
            angle = torch.where(noise.isinf(), noise.sign() * math.pi, inner)
        return loc + angle.to(loc.dtype)

    def distribution(self, params: Params) -> Distribution:
        """The factors on the unrolled circle."""
        return FamilyDistribution(self, params, params[0].shape)

    def native(self, params: Params) -> Distribution:
        """A VonMises whose draws are differentiable, which torch's own are not."""
        loc, concentration = params
        return PathwiseVonMises(loc, concentration)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted mean direction and its length, the forward KL's optimum."""
        x, weights = u.double(), torch.softmax(log_weights.double(), 0)
        loc = torch.atan2(weights @ x.sin(), weights @ x.cos())
        spread = 2.0 * (weights @ torch.sin(0.5 * (x - loc)).square())
        return loc.to(u), inverse_spread(spread).to(u)


class PathwiseVonMises(torch.distributions.VonMises):
    """Torch's von Mises distribution with exact densities and differentiable draws."""

    has_rsample = True

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw angles from -pi to pi, differentiable in both parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        angle = VonMises().transform((self.loc, self.concentration), noise)
        return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw angles from -pi to pi."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, in nats."""
        return VonMises().log_prob((self.loc, self.concentration), value)

    def entropy(self) -> Tensor:
        """Entropy, in nats."""
        return VonMises().entropy((self.loc, self.concentration))
