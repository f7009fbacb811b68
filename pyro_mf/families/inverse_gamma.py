"""Inverse Gamma factors of positive latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma import Gamma
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params

_GAMMA = Gamma()


@dataclass(frozen=True)
class InverseGamma(NormalNoise):
    r"""Inverse Gamma factors of positive latents, as laws of :math:`u = \log X`.

    ``1 / X`` is a Gamma variable of the same concentration and rate, so its logarithm is that of
    :class:`~pyro_mf.families.gamma.Gamma` with the sign turned; the transform is monotone.

    Example:
        >>> family = InverseGamma()
        >>> params = (torch.tensor([2.0]), torch.tensor([3.0]))
        >>> family.quantile(params, torch.tensor(0.5)).exp()
        tensor([1.7874])
    """

    @property
    def name(self) -> str:
        """``"inverse_gamma"``."""
        return "inverse_gamma"

    @property
    def native_to(self) -> str:
        """``"positive"``."""
        return "positive"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("concentration", "rate")``."""
        return _GAMMA.param_names

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Positive both."""
        return _GAMMA.constraints

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member whose logarithm has mean ``loc`` and standard deviation ``scale``."""
        return _GAMMA.init(-loc, scale)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """The quantile at the noise's own probability."""
        return -_GAMMA.transform(params, -noise)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of ``log X``, in nats."""
        return _GAMMA.log_prob(params, -u)

    def entropy(self, params: Params) -> Tensor:
        """Entropy of ``log X``, in nats; it does not depend on the rate."""
        return _GAMMA.entropy(params)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of ``log X`` below which the probability is ``p``."""
        return -_GAMMA.quantile(params, 1.0 - p.double())

    def distribution(self, params: Params) -> Distribution:
        """The law of ``log X``."""
        return FamilyDistribution(self, params, params[0].shape)

    def native(self, params: Params) -> Distribution:
        """An InverseGamma on the positive numbers."""
        concentration, rate = params
        return torch.distributions.InverseGamma(concentration, rate)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted means of ``1 / X`` and ``log X``, the forward KL's optimum."""
        return _GAMMA.fit_weighted(-u, log_weights)
