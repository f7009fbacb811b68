"""Dirichlet factors of latents on a simplex."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from pyro_mf.families.beta import Beta
from pyro_mf.families.dirichlet_fit import fit_dirichlet, mean_log_sigmoids
from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.gamma_function import POSITIVE
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params

_BETA = Beta()


@dataclass(frozen=True)
class Dirichlet(NormalNoise):
    r"""Dirichlet factors of K proportions, in the K - 1 coordinates of torch's stick breaking.

    These are logits of what each piece takes of the stick that is left, moved so that zeros mean
    equal pieces: :math:`u_k = \mathrm{logit}(z_k) + \log(K - k)`. The shares are independent, and
    :math:`z_k` is Beta distributed with concentrations :math:`\alpha_k` and
    :math:`\alpha_{k+1} + \dots + \alpha_K`. So densities, entropies and quantiles are those of
    :class:`~pyro_mf.families.beta.Beta`, the contributions of each coordinate sum to the joint, and
    the transform is monotone in each coordinate's own noise. Though the coordinates are
    independent, they share the K concentrations, which makes this a family of vectors.

    Example:
        >>> family = Dirichlet()
        >>> params = (torch.tensor([1.0, 2.0, 3.0]),)
        >>> family.log_prob(params, torch.zeros(2)).sum()
        tensor(-2.4973)
    """

    @property
    def name(self) -> str:
        """``"dirichlet"``."""
        return "dirichlet"

    @property
    def native_to(self) -> str:
        """``"simplex"``."""
        return "simplex"

    @property
    def event_dim(self) -> int:
        """1: the family describes vectors."""
        return 1

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("concentration",)``, of one element more than the vectors."""
        return ("concentration",)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Positive, stored as a logarithm."""
        return (POSITIVE,)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The member of least forward divergence from independent Normal coordinates."""
        logits = loc - _offsets(loc)
        return (fit_dirichlet(_log_proportions(*mean_log_sigmoids(logits, scale))).to(loc.dtype),)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Every coordinate's quantile at its noise's own probability."""
        return _BETA.transform(_sticks(params), noise) + _offsets(noise)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every coordinate, in nats; their sum is the joint."""
        return _BETA.log_prob(_sticks(params), u - _offsets(u))

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every coordinate, in nats; their sum is the joint."""
        return _BETA.entropy(_sticks(params))

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of every coordinate below which its own probability is ``p``."""
        found = _BETA.quantile(_sticks(params), p)
        return found + _offsets(found)

    def distribution(self, params: Params) -> Distribution:
        """The law of the coordinates, with batch shape that of the blocks."""
        *blocks, size = params[0].shape
        return FamilyDistribution(self, params, (*blocks, size - 1), event_dim=1)

    def native(self, params: Params) -> Distribution:
        """A Dirichlet on the simplex."""
        return torch.distributions.Dirichlet(params[0])

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted means of the proportions' logarithms, the forward KL's optimum.

        Args:
            u: Draws, shape ``(S, *blocks, K - 1)``.
            log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        """
        weights = torch.softmax(log_weights.double(), 0).reshape(-1, *(1,) * (u.dim() - 1))
        logits = u.double() - _offsets(u)
        logs = _log_proportions(logsigmoid(logits), logsigmoid(-logits))
        return (fit_dirichlet((weights * logs).sum(0)).to(u),)


def _sticks(params: Params) -> Params:
    """Concentrations of each piece and of all that come after it."""
    (concentration,) = params
    rest = concentration.flip(-1).cumsum(-1).flip(-1)
    return concentration[..., :-1], rest[..., 1:]


def _offsets(like: Tensor) -> Tensor:
    """Logs of the number of pieces that come after each."""
    k = like.shape[-1]
    return torch.arange(k, 0, -1, dtype=like.dtype, device=like.device).log()


def _log_proportions(log_taken: Tensor, log_left: Tensor) -> Tensor:
    """Logs of K proportions, from those of the shares that pieces take and leave."""
    before = torch.nn.functional.pad(log_left.cumsum(-1), (1, 0))
    return torch.nn.functional.pad(log_taken, (0, 1)) + before
