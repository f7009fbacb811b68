"""Laplace factors: a peak at the median and exponential tails."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_mf.families.location_scale import LocationScale
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_draws import centre_and_width
from pyro_mf.families.weighted_likelihood import LEAST_SCALE

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Laplace(LocationScale):
    r"""Laplace factors, with density :math:`e^{-|u - \mu|/s} / (2 s)`.

    The transform is monotone in its standard normal noise.

    Example:
        >>> family = Laplace()
        >>> params = family.init(torch.zeros(2), torch.ones(2))  # mean 0, standard deviation 1
        >>> family.quantile(params, torch.tensor(0.975))
        tensor([2.1183, 2.1183])
    """

    @property
    def name(self) -> str:
        """``"laplace"``."""
        return "laplace"

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member with mean ``loc`` and standard deviation ``scale``."""
        return (loc, scale * math.sqrt(0.5))

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability."""
        loc, scale = params
        distance: Tensor = -_LOG_2 - torch.special.log_ndtr(-noise.abs())
        return loc + scale * noise.sign() * distance

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale = params
        return -((u - loc) / scale).abs() - scale.log() - _LOG_2

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        return params[1].log() + (1.0 + _LOG_2)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc, scale = params
        p = p.to(loc.dtype)
        distance = -(2.0 * torch.minimum(p, 1.0 - p)).log()
        return loc + scale * (p - 0.5).sign() * distance

    def distribution(self, params: Params) -> Distribution:
        """A Laplace with batch shape that of the parameters."""
        loc, scale = params
        return torch.distributions.Laplace(loc, scale)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Weighted median and mean distance from it, which maximise the weighted likelihood."""
        median, width = centre_and_width(u, log_weights)
        distance = torch.softmax(log_weights.double(), 0) @ (u - median).abs()
        return median.to(u), torch.maximum(distance, LEAST_SCALE * width).to(u)
