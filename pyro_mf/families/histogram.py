"""Histogram factors: a density in steps, for the forward KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.anchored_map import (
    HALF_LOG_2PI,
    AnchoredMap,
    bounded_logs,
    free_numbers,
    relative_logs,
    select,
)
from pyro_mf.families.options import check_count, check_within
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_draws import centre_and_width, likelier, quantile_curve


class Bins(NamedTuple):
    """Bins of histograms.

    Args:
        edges: Shape ``(*batch, K + 1)``, ascending.
        widths: Shape ``(*batch, K)``.
        tails: Mean distances beyond the last edges, shape ``(*batch, 2)``.
    """

    edges: Tensor
    widths: Tensor
    tails: Tensor


@dataclass(frozen=True)
class Histogram(AnchoredMap[Bins]):
    r"""Histogram factors: bins of fixed probability and free width, with exponential tails.

    The edges of the bins are quantiles: those at which a standard normal variable has its equally
    spaced edges from ``-bound`` to ``bound``. Within a bin the density is constant, beyond the last
    edges it falls exponentially, so it is positive everywhere and a forward KL is finite.

    This is the family for the forward KL, whose optimum is read off the draws' quantiles, and for
    looking at a marginal. The map from noise is increasing and continuous but has kinks, and the
    log density has no slope within a bin and jumps at the edges: gradients through draws are right
    for the entropy's closed form (``entropy``), not for an estimate by ``log_prob``. For the
    reverse KL prefer :class:`~pyro_mf.families.spline.Spline`.

    Args:
        num_bins: Number of bins K, at least 2.
        bound: Noise at the last edges, in standard deviations; beyond are the tails.

    Raises:
        ValueError: If there are fewer than 2 bins or the bound is not above 1.

    Example:
        >>> family = Histogram(num_bins=8)
        >>> params = family.init(torch.zeros(2), torch.ones(2))
        >>> family.quantile(params, torch.tensor(0.5))
        tensor([0., 0.])
    """

    num_bins: int = 32
    bound: float = 2.5

    def __post_init__(self) -> None:
        check_count("num_bins", self.num_bins, 2)
        check_within("bound", self.bound, 1.0 + 1e-6, 5.0, " standard deviations")

    @property
    def name(self) -> str:
        """``"histogram"``."""
        return "histogram"

    @property
    def param_names(self) -> tuple[str, ...]:
        """Median, half the central 68 %, log widths ``(K - 1,)`` and log tail scales ``(2,)``."""
        return ("loc", "scale", "log_widths", "log_tails")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, but for the scale."""
        return (constraints.real, constraints.positive, constraints.real, constraints.real)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The Normal's own quantiles as edges, its mean excesses as tails."""
        return (
            loc,
            scale,
            loc.new_zeros(*loc.shape, self.num_bins - 1),
            loc.new_zeros(*loc.shape, 2),
        )

    def geometry(self, shape: Params) -> Bins:
        """The bins, from the first edge at zero."""
        log_widths, log_tails = shape
        at, _, _ = self._grid(log_widths)
        widths = at.diff() * relative_logs(log_widths).exp()
        edges = torch.cat([torch.zeros_like(widths[..., :1]), widths.cumsum(-1)], -1)
        return Bins(edges, widths, self._normal_tail(at) * bounded_logs(log_tails).exp())

    def map(self, geometry: Bins, noise: Tensor) -> Tensor:
        """Straight lines in the noise's probability, and tails."""
        edges, widths, tails = geometry
        at, mass, log_tail = self._grid(noise)
        index = ((noise + self.bound) * (self.num_bins / (2 * self.bound))).detach().floor()
        index = index.clamp(0, self.num_bins - 1).long()
        inside = noise.clamp(-self.bound, self.bound)
        share: Tensor = (torch.special.ndtr(inside) - torch.special.ndtr(at)[index]) / mass[index]
        value = select(edges, index) + select(widths, index) * share.clamp(0.0, 1.0)
        below: Tensor = (log_tail - torch.special.log_ndtr(noise)).clamp(min=0.0)
        above: Tensor = (log_tail - torch.special.log_ndtr(-noise)).clamp(min=0.0)
        return value - tails[..., 0] * below + tails[..., 1] * above

    def map_inverse(self, geometry: Bins, t: Tensor) -> Tensor:
        """Solve for the probability, and take the noise's quantile there."""
        edges, widths, tails = geometry
        at, mass, log_tail = self._grid(t)
        index = self._bin(edges, t)
        share = ((t - select(edges, index)) / select(widths, index)).clamp(0.0, 1.0)
        inside = torch.special.ndtri(torch.special.ndtr(at)[index] + mass[index] * share)
        excess = torch.where(t < edges[..., 0], edges[..., 0] - t, t - edges[..., -1])
        tail = torch.where(t < edges[..., 0], tails[..., 0], tails[..., 1])
        outside = torch.special.ndtri((log_tail - excess.clamp(min=0.0) / tail).exp())
        outside = torch.where(t < edges[..., 0], outside, -outside)
        return torch.where(excess > 0.0, outside, inside)

    def map_log_prob(self, geometry: Bins, t: Tensor) -> Tensor:
        """Log of mass over width in a bin, exponential in the tails."""
        edges, widths, tails = geometry
        _, mass, log_tail = self._grid(t)
        index = self._bin(edges, t)
        inside = mass.log()[index] - select(widths.log(), index)
        below, above = edges[..., 0] - t, t - edges[..., -1]
        left = log_tail - tails[..., 0].log() - below.clamp(min=0.0) / tails[..., 0]
        right = log_tail - tails[..., 1].log() - above.clamp(min=0.0) / tails[..., 1]
        return torch.where(below > 0.0, left, torch.where(above > 0.0, right, inside))

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        loc, scale, *shape = params
        geometry = self.geometry(tuple(shape))
        _, widths, tails = geometry
        _, mass, log_tail = self._grid(loc)
        inside = (mass * (widths / mass).log()).sum(-1)
        outside = log_tail.exp() * (1.0 + tails.log() - log_tail).sum(-1)
        return inside + outside + scale.log() - self.anchors(geometry, loc)[1].log()

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Take the draws' quantiles as edges, in closed form.

        As many quantiles are read as the effective draws support, and mean excesses in the tails
        count together with those of one draw that continues the last bins. Where a histogram of
        the Normal with the draws' mean and standard deviation is likelier, it is taken instead.
        """
        log_weights = log_weights.double()
        centre, width = centre_and_width(u, log_weights)
        z = (u.double() - centre) / width
        at, mass, log_tail = self._grid(z)
        grid = torch.cat([at, at.new_tensor([-1.0, 0.0, 1.0])])[:, None].expand(-1, z.shape[1])
        curve = quantile_curve(z, log_weights, grid)
        edges, (low, middle, high) = curve[: self.num_bins + 1], curve[-3:]
        ratios = (edges.diff(dim=0) / at.diff()[:, None]).log().T
        log_widths, shift = free_numbers(ratios)
        weights = torch.softmax(log_weights, 0)[:, None]
        draws = 1.0 / weights.square().sum()
        normal_tail = self._normal_tail(at)
        ends = normal_tail * ratios[:, [0, -1]].exp()
        excess = torch.stack([(edges[0] - z).clamp(min=0.0), (z - edges[-1]).clamp(min=0.0)], -1)
        share = (weights[..., None] * (excess > 0.0)).sum(0)
        total = (weights[..., None] * excess).sum(0)
        tails = ((draws * total + ends) / (draws * share + 1.0) / normal_tail).log()
        fitted = (
            centre + width * middle,
            0.5 * width * (high - low),
            log_widths,
            (tails - shift).clamp(-7.0, 7.0),
        )
        return tuple(x.to(u.dtype) for x in likelier(self, fitted, u.double(), log_weights))

    def _grid(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise at the edges ``(K + 1,)``, mass of the bins ``(K,)``, log mass of a tail."""
        at = torch.linspace(
            -self.bound, self.bound, self.num_bins + 1, dtype=like.dtype, device=like.device
        )
        return at, torch.special.ndtr(at).diff(), torch.special.log_ndtr(at[0])

    def _normal_tail(self, at: Tensor) -> Tensor:
        """Mean excess of a standard normal variable beyond the last edge."""
        mass: Tensor = torch.special.ndtr(at[0])
        return (-0.5 * at[0].square() - HALF_LOG_2PI).exp() / mass + at[0]

    def _bin(self, edges: Tensor, t: Tensor) -> Tensor:
        """Index of the bin that holds each value; values outside are in the last bins."""
        return (t[..., None] >= edges[..., 1:-1]).sum(-1)
