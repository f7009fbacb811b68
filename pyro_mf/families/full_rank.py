"""Normal blocks with a full covariance matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_draws import centre_and_width

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_LEAST_SHRINKAGE = 1e-8  # of correlations, for columns that are equal
_LEAST_SCALE = 1e-3  # of a column without spread, in units of its width


@dataclass(frozen=True)
class FullRank(NormalNoise):
    r"""Dependent Normal vectors :math:`u = \mu + L\varepsilon` with standard normal noise.

    Contributions to densities and entropies are those of the whitened coordinates
    :math:`L^{-1}(u - \mu)`: as L is lower triangular, the i-th is that of :math:`u_i` given the
    elements before it.

    Args:
        over: What one vector holds: ``"site"``, all elements of a site, or ``"slice"``, the event
            of a site, so that elements of plates stay independent.

    Raises:
        ValueError: If ``over`` is neither.

    Example:
        >>> family = FullRank()
        >>> loc, scale_tril = family.init(torch.zeros(2), torch.tensor([1.0, 2.0]))
        >>> scale_tril
        tensor([[1., 0.],
                [0., 2.]])
        >>> family.log_prob((loc, scale_tril), torch.zeros(2))
        tensor([-0.9189, -1.6121])
    """

    over: Literal["slice", "site"] = "site"

    def __post_init__(self) -> None:
        check_over(self.over)

    @property
    def name(self) -> str:
        """``"full_rank"``."""
        return "full_rank"

    @property
    def event_dim(self) -> int:
        """1: the family describes vectors."""
        return 1

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale_tril")``."""
        return ("loc", "scale_tril")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, and lower triangular with a positive diagonal."""
        return (constraints.real, constraints.lower_cholesky)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Independent elements with these locations and scales."""
        return (loc, torch.diag_embed(scale))

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Shift the noise, multiplied by the Cholesky factor."""
        loc, scale_tril = params
        columns, lead = draws_last(noise, loc)
        return loc + draws_first(scale_tril @ columns, lead)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element given those before it, in nats; their sum is the joint."""
        loc, scale_tril = params
        columns, lead = draws_last(u - loc, loc)
        white = torch.linalg.solve_triangular(scale_tril, columns, upper=False)
        log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log()
        return -0.5 * draws_first(white, lead).square() - log_scale - _HALF_LOG_2PI

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element given those before it, in nats; their sum is the joint."""
        return params[1].diagonal(dim1=-2, dim2=-1).log() + (0.5 + _HALF_LOG_2PI)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value of every element below which its own probability is ``p``."""
        loc, scale_tril = params
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        return loc + scale_tril.square().sum(-1).sqrt() * standard

    def distribution(self, params: Params) -> Distribution:
        """A MultivariateNormal with batch shape that of the blocks."""
        loc, scale_tril = params
        return torch.distributions.MultivariateNormal(loc, scale_tril=scale_tril)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the weighted mean and covariance, the forward KL's optimum.

        Where the effective number of draws is less than a covariance takes, correlations are shrunk
        by the share that is missing.

        Args:
            u: Draws, shape ``(S, *blocks, k)``.
            log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        """
        draws = standardise_blocks(u, log_weights)
        correlations = torch.einsum("s...i,s...j->...ij", draws.z, draws.z)
        k = u.shape[-1]
        missing = 1.0 - draws.num_effective / (k + 1)
        shrinkage = max(missing, _LEAST_SHRINKAGE)
        identity = torch.eye(k, dtype=torch.float64, device=u.device)
        own = torch.diag_embed(1.0 - correlations.diagonal(dim1=-2, dim2=-1))  # without spread: 1
        tril = torch.linalg.cholesky(
            (1.0 - shrinkage) * (correlations + own) + shrinkage * identity
        )
        return draws.loc.to(u), (draws.scale[..., None] * tril).to(u)


def check_over(over: str) -> None:
    """Refuse what is neither a slice nor a site.

    Raises:
        ValueError: If it is something else.
    """
    if over not in ("slice", "site"):
        raise ValueError(
            f"over must be 'slice' (a vector for every element of the plates) or 'site' (one for "
            f"the whole site); got {over!r}."
        )


def draws_last(values: Tensor, loc: Tensor) -> tuple[Tensor, torch.Size]:
    """Vectors as columns of one matrix per block, so that a factor meets all draws at once.

    Args:
        values: Shape ``(..., *blocks, k)``.
        loc: Shape ``(*blocks, k)``.

    Returns:
        Shape ``(*blocks, k, draws)``, and the draws' own shape.
    """
    lead = values.shape[: max(values.dim() - loc.dim(), 0)]
    values = values.expand(torch.broadcast_shapes(values.shape, loc.shape[:-1] + values.shape[-1:]))
    return values.reshape(lead.numel(), *values.shape[len(lead) :]).movedim(0, -1), lead


def draws_first(columns: Tensor, lead: torch.Size) -> Tensor:
    """The way back from :func:`draws_last`."""
    rows = columns.movedim(-1, 0)
    return rows.reshape(*lead, *rows.shape[1:])


@dataclass(frozen=True)
class StandardisedBlocks:
    """Weighted draws of unit variance, with what puts them back.

    Args:
        loc: Weighted means, shape ``(*blocks, k)``, in doubles.
        scale: Weighted standard deviations, positive, likewise.
        z: ``(u - loc) / scale`` times the weights' square roots, shape ``(S, *blocks, k)``.
        num_effective: Effective number of draws.
    """

    loc: Tensor
    scale: Tensor
    z: Tensor
    num_effective: float


def standardise_blocks(u: Tensor, log_weights: Tensor) -> StandardisedBlocks:
    """Centre and scale the draws of blocks.

    Args:
        u: Draws, shape ``(S, *blocks, k)``.
        log_weights: Log weights in nats, shape ``(S,)``.
    """
    weights = torch.softmax(log_weights.double(), 0)
    width = centre_and_width(u.flatten(1), log_weights)[1].reshape(u.shape[1:])
    rows = weights.reshape(-1, *(1,) * (u.dim() - 1))
    loc = (rows * u).sum(0)
    centred = u - loc
    sd = (rows * centred.square()).sum(0).sqrt()
    scale = torch.maximum(sd, _LEAST_SCALE * width)
    num_effective = float(1.0 / weights.square().sum())
    return StandardisedBlocks(loc, scale, rows.sqrt() * centred / scale, num_effective)
