r"""A mixture of factorised Normals over a whole vector: several modes, and dependence through them.

.. math:: q(u) = \sum_k w_k \prod_d N(u_d; m_{dk}, s_{dk})

Within a component elements are independent; over all components they are not, so the mixture is
one distribution of the vector and no product of factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    constraints,
)
from torch.distributions.constraints import Constraint

from pyro_mf.families.factorised_fit import fit_components
from pyro_mf.families.mixture_marginals import MixtureMarginals
from pyro_mf.families.protocol import Params

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_APART = 0.3  # sds between components at the start: equal ones would get equal gradients


@dataclass(frozen=True)
class FactorisedMixture:
    """Mixtures of K factorised Normals, over flat vectors ``(..., D)``.

    Parameters are the components' locations and scales, ``(D, K)`` each, and their ``logits``,
    ``(K,)``, whose softmax are the weights. Densities come as D contributions that sum to the
    vector's own, by the chain rule: each is the element's density given the elements before it.

    A draw chooses a component, which has no derivative. Gradients come from :meth:`strata`
    instead: draws of every component, weighted.

    Args:
        num_components: Number of components K, at least 1.

    Raises:
        TypeError: If it is no integer.
        ValueError: If there is no component.

    Example:
        >>> family = FactorisedMixture(2)
        >>> loc = torch.tensor([[-3.0, 3.0], [0.0, 1.0]])
        >>> params = (loc, torch.ones(2, 2), torch.zeros(2))
        >>> family.log_prob(params, torch.tensor([-3.0, 0.0])).exp().round(decimals=3)
        tensor([0.1990, 0.3990])

    References:
        Morningstar et al. (2021), Automatic Differentiation Variational Inference with Mixtures,
        https://arxiv.org/abs/2003.01687
    """

    num_components: int = 2

    def __post_init__(self) -> None:
        num = self.num_components
        if isinstance(num, bool) or not isinstance(num, int):
            raise TypeError(f"num_components must be an integer; got {num!r}.")
        if num < 1:
            raise ValueError(f"a mixture needs num_components >= 1; got {num}.")

    @property
    def name(self) -> str:
        """``"factorised_mixture"``."""
        return "factorised_mixture"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale", "logits")``."""
        return ("loc", "scale", "logits")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, but for the scales."""
        return (constraints.real, constraints.positive, constraints.real)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Equal weights; the first component at ``loc``, the others a little apart from it."""
        num = self.num_components
        generator = torch.Generator().manual_seed(0)
        apart = _APART * torch.randn(*loc.shape, num, generator=generator, dtype=torch.float64)
        apart[..., 0] = 0.0
        locs = loc[..., None] + scale[..., None] * apart.to(loc)
        scales = scale[..., None].expand(locs.shape).clone()
        return locs, scales, loc.new_zeros(*loc.shape[:-1], num)

    # -- draws -----------------------------------------------------------------------------------

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw standard normal noise ``(..., D + 1)``: one number more, to choose the component."""
        return torch.randn((*shape[:-1], shape[-1] + 1), dtype=dtype, device=device)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Draws, one component each; differentiable in that component's parameters only."""
        loc, scale, logits = params
        bounds = torch.softmax(logits, -1).cumsum(-1)[..., :-1]
        chosen = (torch.special.ndtr(noise[..., -1:]) > bounds).sum(-1)
        return loc.mT[chosen] + scale.mT[chosen] * noise[..., :-1]

    def strata_noise(
        self,
        num_draws: int,
        size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise for S draws of every component, shape ``(S, K, D)``."""
        shape = (num_draws, self.num_components, size)
        return torch.randn(shape, dtype=dtype, device=device)

    def strata(self, params: Params, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of every component, with weights through which the mixture's own are learned.

        Args:
            params: The parameters.
            noise: Shape ``(S, K, D)``.

        Returns:
            Draws ``(S K, D)`` and weights ``(S K,)`` that sum to one, both differentiable. Sums
            weighted by them are unbiased for expectations under the mixture, gradients included.
        """
        loc, scale, logits = params
        draws = loc.mT + scale.mT * noise
        weights = (torch.softmax(logits, -1) / len(noise)).expand(draws.shape[:2])
        return draws.flatten(0, 1), weights.flatten()

    # -- densities -------------------------------------------------------------------------------

    def component_log_probs(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element under every component, shape ``(..., D, K)``."""
        loc, scale, _ = params
        scores = (u[..., None] - loc) / scale
        return -0.5 * scores.square() - scale.log() - _HALF_LOG_2PI

    def joint_log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of vectors ``(..., D)``, in nats."""
        by_component = self.component_log_probs(params, u).sum(-2)
        return torch.logsumexp(torch.log_softmax(params[2], -1) + by_component, -1)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Contribution of every element to the log density, given those before it, in nats."""
        log_weights = torch.log_softmax(params[2], -1)
        so_far = self.component_log_probs(params, u).cumsum(-2) + log_weights[..., None, :]
        joint = torch.logsumexp(so_far, -1)
        return torch.cat([joint[..., :1], joint.diff(dim=-1)], -1)

    def entropy(self, params: Params) -> Tensor | None:
        """``None``: a mixture's entropy has no closed form; a single component's has."""
        if self.num_components > 1:
            return None
        return params[1][..., 0].log() + (0.5 + _HALF_LOG_2PI)

    # -- marginals -------------------------------------------------------------------------------

    def marginals(self, params: Params) -> tuple[MixtureMarginals, Params]:
        """The distributions of the elements by themselves: a mixture for each."""
        loc, scale, logits = params
        family = MixtureMarginals(self.num_components)
        return family, (loc, scale, logits[..., None, :].expand(loc.shape))

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Quantiles of the elements' own distributions; ``p`` broadcasts against ``(D,)``."""
        family, own = self.marginals(params)
        return family.quantile(own, p)

    def distribution(self, params: Params) -> Distribution:
        """The mixture as one distribution of vectors ``(D,)``."""
        loc, scale, logits = params
        components = torch.distributions.Normal(loc.mT, scale.mT)
        return MixtureSameFamily(Categorical(logits=logits), Independent(components, 1))

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood by expectation maximisation, from several starts.

        Never worse than one Normal per element.
        """
        log_probs, means, sds = fit_components(u, log_weights, self.num_components)
        return means.mT.contiguous().to(u), sds.mT.contiguous().to(u), log_probs.to(u)
