"""Normal blocks whose covariance matrix is diagonal plus a low rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.full_rank import (
    check_over,
    draws_first,
    draws_last,
    standardise_blocks,
)
from pyro_mf.families.options import check_count
from pyro_mf.families.protocol import Params

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_SHARED = 0.1  # share of a scale that is in the factors at the start: at 0 their gradient is 0
_LEAST_OWN = 1e-4  # variance that is a column's own, in units of its variance
_NUM_ROUNDS = 200


@dataclass(frozen=True)
class LowRank:
    r"""Dependent Normal vectors :math:`u = \mu + W f + \sigma\varepsilon` with few factors f.

    Noise holds the factors after the k numbers of the vector. Contributions to the log density are
    :math:`z_i (z - V M^{-1} V^\top z)_i / 2` with :math:`z = (u - \mu) / \sigma`,
    :math:`V = W / \sigma` and :math:`M = I + V^\top V`; the log determinant of M, also in the
    entropy, is shared equally by all elements. Only the sums have a meaning.

    Args:
        rank: Number of factors, at most k in vectors of k elements.
        over: What one vector holds: ``"site"``, all elements of a site, or ``"slice"``, the event
            of a site, so that elements of plates stay independent.

    Raises:
        ValueError: If ``rank`` is not positive or ``over`` is neither.

    Example:
        >>> family = LowRank(rank=1)
        >>> loc, cov_factor, scale = family.init(torch.zeros(3), torch.ones(3))
        >>> cov_factor.shape
        torch.Size([3, 1])
        >>> family.quantile((loc, cov_factor, scale), torch.tensor(0.975))
        tensor([1.9600, 1.9600, 1.9600])
    """

    rank: int = 4
    over: Literal["slice", "site"] = "site"

    def __post_init__(self) -> None:
        check_count("rank", self.rank, 1)
        check_over(self.over)

    @property
    def name(self) -> str:
        """``"low_rank"``."""
        return "low_rank"

    @property
    def event_dim(self) -> int:
        """1: the family describes vectors."""
        return 1

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "cov_factor", "scale")``."""
        return ("loc", "cov_factor", "scale")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, real and positive."""
        return (constraints.real, constraints.real, constraints.positive)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Nearly independent elements with these locations and scales as their marginals.

        The factors hold a hundredth of the variances: without any they would have no gradient.
        """
        k = loc.shape[-1]
        rank = min(self.rank, k)
        i = torch.arange(k, dtype=loc.dtype, device=loc.device)[:, None]
        j = torch.arange(rank, dtype=loc.dtype, device=loc.device)
        waves = torch.cos(math.pi / k * (i + 0.5) * j)  # orthogonal: factors differ from the start
        waves = _SHARED * waves / waves.square().sum(-1, keepdim=True).sqrt()
        return loc, scale[..., None] * waves, scale * math.sqrt(1.0 - _SHARED**2)

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw standard normal noise for vectors and factors, shape ``(S, *blocks, k + rank)``."""
        size = shape[-1] + min(self.rank, shape[-1])
        return torch.randn((*shape[:-1], size), dtype=dtype, device=device)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Add the factors' part and the elements' own."""
        loc, cov_factor, scale = params
        k = loc.shape[-1]
        own, factors = noise[..., :k], noise[..., k:]
        columns, lead = draws_last(factors, loc)
        return loc + draws_first(cov_factor @ columns, lead) + scale * own

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Contributions to the log density, in nats; their sum is the joint."""
        loc, _, scale = params
        v, tril, log_det = _capacitance(params)
        z = (u - loc) / scale
        columns, lead = draws_last(z, loc)
        shared = v @ torch.cholesky_solve(v.mT @ columns, tril)
        square = z * (z - draws_first(shared, lead))
        return -0.5 * square - scale.log() - log_det - _HALF_LOG_2PI

    def entropy(self, params: Params) -> Tensor:
        """Contributions to the entropy, in nats; their sum is the joint."""
        return params[2].log() + _capacitance(params).log_det + (0.5 + _HALF_LOG_2PI)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of every element below which its own probability is ``p``."""
        loc, cov_factor, scale = params
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        return loc + (cov_factor.square().sum(-1) + scale.square()).sqrt() * standard

    def distribution(self, params: Params) -> Distribution:
        """A LowRankMultivariateNormal with batch shape that of the blocks."""
        loc, cov_factor, scale = params
        return torch.distributions.LowRankMultivariateNormal(loc, cov_factor, scale.square())

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood by the EM algorithm of factor analysis.

        It starts from principal components and never makes the likelihood worse. No matrix of the
        size ``(k, k)`` is built.

        Args:
            u: Draws, shape ``(S, *blocks, k)``.
            log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.

        References:
            Rubin & Thayer, EM algorithms for ML factor analysis, 1982.
        """
        draws = standardise_blocks(u, log_weights)
        z = draws.z.movedim(0, -2)  # (*blocks, S, k)
        rank = min(self.rank, u.shape[-1])
        factor, own = _principal(z, rank)
        for _ in range(_NUM_ROUNDS):
            factor, own = _em_round(z, factor, own)
        cov_factor = draws.scale[..., None] * factor
        return draws.loc.to(u), cov_factor.to(u), (draws.scale * own.sqrt()).to(u)


class _Capacitance(NamedTuple):
    v: Tensor
    tril: Tensor
    log_det: Tensor


def _capacitance(params: Params) -> _Capacitance:
    """Loadings over own scales, the root of M, and each element's share of its log determinant."""
    _, cov_factor, scale = params
    v = cov_factor / scale[..., None]
    k, rank = v.shape[-2:]
    tril = torch.linalg.cholesky(v.mT @ v + torch.eye(rank, dtype=v.dtype, device=v.device))
    return _Capacitance(v, tril, tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True) / k)


def _principal(z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Loadings and own variances by probabilistic principal components of standardised draws."""
    values, vectors = torch.linalg.svd(z, full_matrices=False)[1:]
    k, found = z.shape[-1], min(rank, values.shape[-1])
    top = values[..., :found].square()
    rest = (z.square().sum((-1, -2)) - top.sum(-1)).clamp_min(0.0) / max(k - found, 1)
    strength = (top - rest[..., None]).clamp_min(_LEAST_OWN).sqrt()
    factor = vectors[..., :found, :].mT * strength[..., None, :]
    factor = torch.nn.functional.pad(factor, (0, rank - found))
    own = (z.square().sum(-2) - factor.square().sum(-1)).clamp_min(_LEAST_OWN)
    return factor, own


def _em_round(z: Tensor, factor: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """One round of EM: means of the factors given the draws, then regression on them."""
    v = factor / own[..., None]
    identity = torch.eye(factor.shape[-1], dtype=z.dtype, device=z.device)
    precision = identity + factor.mT @ v
    weights = torch.linalg.solve(precision, v.mT)  # (rank, k)
    cross = z.mT @ (z @ weights.mT)
    second = identity - weights @ factor + weights @ cross
    factor = torch.linalg.solve(second, cross.mT).mT
    own = (z.square().sum(-2) - (factor * cross).sum(-1)).clamp_min(_LEAST_OWN)
    return factor, own
