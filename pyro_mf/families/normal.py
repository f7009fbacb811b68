"""Normal factors: mean-field Gaussian variational inference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_mf.families.location_scale import LocationScale
from pyro_mf.families.protocol import Params

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Normal(LocationScale):
    r"""Normal factors :math:`u = \mu + \sigma\varepsilon` with standard normal noise.

    Example:
        >>> family = Normal()
        >>> params = family.init(torch.zeros(2), torch.ones(2))
        >>> family.quantile(params, torch.tensor(0.975))
        tensor([1.9600, 1.9600])
    """

    @property
    def name(self) -> str:
        """``"normal"``."""
        return "normal"

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Take location and scale as they are."""
        return (loc, scale)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Shift and stretch the noise."""
        loc, scale = params
        return loc + scale * noise

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale = params
        return -0.5 * ((u - loc) / scale).square() - scale.log() - _HALF_LOG_2PI

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        return params[1].log() + (0.5 + _HALF_LOG_2PI)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc, scale = params
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        return loc + scale * standard

    def distribution(self, params: Params) -> Distribution:
        """A Normal with batch shape that of the parameters."""
        loc, scale = params
        return torch.distributions.Normal(loc, scale)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted mean and standard deviation, the forward KL's optimum."""
        weights = torch.softmax(log_weights, 0)[:, None]
        loc = (weights * u).sum(0)
        return loc, (weights * (u - loc).square()).sum(0).sqrt()
