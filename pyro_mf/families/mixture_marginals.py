"""Mixtures of Normals, element by element, by their components' own parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.mixture_fit import fit_mixture
from pyro_mf.families.mixture_quantile import mixture_quantile
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_draws import centre_and_width

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_APART = 0.5  # half the sds between the outermost components at the start


@dataclass(frozen=True)
class MixtureMarginals(NormalNoise):
    """Elements of a :class:`~pyro_mf.families.factorised_mixture.FactorisedMixture` by themselves.

    Parameters have shape ``(*batch, K)`` and are the components' own: for reading a fit. To
    fit a mixture to an element by itself there is
    :class:`~pyro_mf.families.normal_mixture.NormalMixture`.

    Args:
        num_components: Number of components K.

    Example:
        >>> family = MixtureMarginals(2)
        >>> params = (torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), torch.zeros(1, 2))
        >>> family.quantile(params, torch.tensor(0.5))
        tensor([0.])
    """

    num_components: int = 2

    @property
    def name(self) -> str:
        """``"mixture_marginals"``."""
        return "mixture_marginals"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale", "logits")``."""
        return ("loc", "scale", "logits")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, but for the scales."""
        return (constraints.real, constraints.positive, constraints.real)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Equal components close to each other, which are nearly the Normal."""
        steps = torch.linspace(-_APART, _APART, self.num_components).to(loc)
        steps = steps if self.num_components > 1 else 0.0 * steps
        locs = loc[..., None] + scale[..., None] * steps
        return locs, scale[..., None].expand(locs.shape).clone(), torch.zeros_like(locs)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Quantiles at the noise's probabilities: increasing in the noise."""
        loc, scale, logits = params
        return mixture_quantile(torch.log_softmax(logits, -1), loc, scale, noise)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale, logits = params
        scores = (u[..., None] - loc) / scale
        log_densities = -0.5 * scores.square() - scale.log() - _HALF_LOG_2PI
        return torch.logsumexp(torch.log_softmax(logits, -1) + log_densities, -1)

    def entropy(self, params: Params) -> None:
        """``None``: a mixture's entropy has no closed form."""

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc = params[0]
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        shape = torch.broadcast_shapes(standard.shape, loc.shape[:-1])
        return self.transform(params, standard.expand(shape))

    def distribution(self, params: Params) -> Distribution:
        """Mixtures with batch shape ``(*batch,)``."""
        loc, scale, logits = params
        return MixtureSameFamily(Categorical(logits=logits), torch.distributions.Normal(loc, scale))

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood by expectation maximisation, element by element."""
        centre, width = (x[:, None] for x in centre_and_width(u, log_weights))
        z = (u.double() - centre[:, 0]) / width[:, 0]
        log_probs, means, sds = fit_mixture(z, log_weights.double(), self.num_components)
        fitted = (centre + width * means, width * sds, log_probs)
        loc, scale, logits = (x.to(u.dtype) for x in fitted)
        return loc, scale, logits
