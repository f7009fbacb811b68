"""Logistic factors: a little more weight in the tails than a Normal, as smooth as one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.location_scale import LocationScale
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_likelihood import maximise_on_own_axis

_SD = math.pi / math.sqrt(3.0)  # standard deviation of the standard logistic distribution


@dataclass(frozen=True)
class Logistic(LocationScale):
    r"""Logistic factors, with distribution function :math:`1 / (1 + e^{-(u - \mu)/s})`.

    On the logit axis the one with location 0 and scale 1 is the uniform distribution. The transform
    is monotone in its standard normal noise.

    Example:
        >>> family = Logistic()
        >>> params = family.init(torch.zeros(2), torch.ones(2))  # mean 0, standard deviation 1
        >>> family.quantile(params, torch.tensor(0.975))
        tensor([2.0198, 2.0198])
    """

    @property
    def name(self) -> str:
        """``"logistic"``."""
        return "logistic"

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member with mean ``loc`` and standard deviation ``scale``."""
        return (loc, scale / _SD)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability."""
        loc, scale = params
        standard: Tensor = torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)
        return loc + scale * standard

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale = params
        x = (u - loc) / scale
        return logsigmoid(x) + logsigmoid(-x) - scale.log()

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        return params[1].log() + 2.0

    def cdf(self, params: Params, u: Tensor) -> Tensor:
        """Probability of values up to ``u``."""
        loc, scale = params
        return torch.sigmoid((u - loc) / scale)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc, scale = params
        return loc + scale * torch.logit(p.to(loc.dtype))

    def distribution(self, params: Params) -> Distribution:
        """The factors as a distribution; torch has no class of its own for them."""
        return FamilyDistribution(self, params, params[0].shape)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood, which has one optimum."""
        return maximise_on_own_axis(self, u, log_weights)
