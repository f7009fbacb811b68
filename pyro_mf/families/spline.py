"""Free-form factors: a monotone spline of standard normal noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
)
from pyro_mf.families.fisher_scoring import maximise_by_scores
from pyro_mf.families.options import check_count, check_within
from pyro_mf.families.protocol import Params
from pyro_mf.families.rational_quadratic import Knots, evaluate, invert
from pyro_mf.families.weighted_draws import (
    centre_and_width,
    condensed,
    likelier,
    mean_and_sd,
    quantile_curve,
)

_LEAST_SCALE = 1e-3  # of the draws' width: a single heavy draw does not bound the likelihood
_NUM_MATCHES = 6  # rounds of placing knots by the quantile curve
_PRIOR_SD = 0.5  # of the change of a log slope from knot to knot, when fitting to draws


@dataclass(frozen=True)
class Spline(AnchoredMap[Knots]):
    r"""Free-form factors: :math:`u = \mu + \sigma T(\varepsilon)` with a monotone spline T.

    T is a rational-quadratic spline of K pieces for noise from ``-bound`` to ``bound``, continued
    by straight lines with the slopes that it ends with, so tails are a Normal's, each with its own
    scale. It is anchored: ``loc`` is the median and ``scale`` half the width of the central 68 %.
    Zero shape parameters give a Normal.

    The shape is given by log slopes alone. Those of the pieces, relative to each other, place the
    knots: a steep piece is narrow in the noise and tall in the values, so knots go where the
    density changes, such as both sides of a gap between modes. Those of the knots are relative to
    the pieces beside them.

    Args:
        num_bins: Number of pieces K, at least 2.
        bound: Noise at the last knots, in standard deviations.

    Raises:
        ValueError: If there are fewer than 2 pieces or the bound is not above 1.

    Example:
        >>> family = Spline()
        >>> params = family.init(torch.zeros(2), torch.ones(2))
        >>> family.quantile(params, torch.tensor(0.975))
        tensor([1.9600, 1.9600])

    References:
        Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows, arXiv 1906.04032
    """

    num_bins: int = 12
    bound: float = 4.0

    def __post_init__(self) -> None:
        check_count("num_bins", self.num_bins, 2)
        check_within("bound", self.bound, 1.0 + 1e-6, 8.0, " standard deviations")

    @property
    def name(self) -> str:
        """``"spline"``."""
        return "spline"

    @property
    def param_names(self) -> tuple[str, ...]:
        """Median, half the central 68 %, log slopes: pieces' ``(K - 1,)``, knots' ``(K + 1,)``."""
        return ("loc", "scale", "piece_slopes", "knot_slopes")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, but for the scale."""
        return (constraints.real, constraints.positive, constraints.real, constraints.real)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """The Normal itself: T is the identity."""
        pieces = loc.new_zeros(*loc.shape, self.num_bins - 1)
        return (loc, scale, pieces, loc.new_zeros(*loc.shape, self.num_bins + 1))

    def geometry(self, shape: Params) -> Knots:
        """The spline's knots."""
        steep, at_knots = relative_logs(shape[0]), bounded_logs(shape[1])
        # Steepness is height over width, half of its log from either.
        log_range = math.log(2.0 * self.bound)
        log_widths = torch.log_softmax(-0.5 * steep, -1) + log_range
        log_heights = torch.log_softmax(0.5 * steep, -1) + log_range
        x, y = (self._cumulate(logs.exp()) for logs in (log_widths, log_heights))
        slopes = log_heights - log_widths
        left = torch.cat([slopes[..., :1], slopes], -1)
        right = torch.cat([slopes, slopes[..., -1:]], -1)
        return Knots(x, y, (0.5 * (left + right) + at_knots).exp())

    def map(self, geometry: Knots, noise: Tensor) -> Tensor:
        """The spline, from [-bound, bound] onto itself."""
        return evaluate(geometry, noise)

    def map_inverse(self, geometry: Knots, t: Tensor) -> Tensor:
        """Its inverse, in closed form."""
        return invert(geometry, t)[0]

    def map_log_prob(self, geometry: Knots, t: Tensor) -> Tensor:
        """Log density of the spline of standard normal noise, in nats."""
        noise, log_slope = invert(geometry, t)
        return -0.5 * noise.square() - HALF_LOG_2PI - log_slope

    def entropy(self, params: Params) -> None:
        """``None``: the mean log slope of a spline has no closed form."""

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Match the draws' quantiles, then maximise the weighted likelihood.

        A normal prior on the changes of log slope from piece to piece and at the knots, of one
        observation's weight, keeps few draws from being followed one by one.
        """
        log_weights = log_weights.double()
        centre, width = centre_and_width(u, log_weights)
        z = (u.double() - centre) / width
        draws = 1.0 / torch.softmax(log_weights, 0).square().sum()
        mean, sd = mean_and_sd(z, log_weights)
        normal = self.init(mean, sd.clamp(min=2.0 * _LEAST_SCALE))
        loc, scale, *shape = maximise_by_scores(
            self.log_prob,
            lambda params: self._roughness(params[2:]) / (_PRIOR_SD * draws.sqrt()),
            (constraints.real, constraints.greater_than(_LEAST_SCALE), *self.constraints[2:]),
            [self._match_quantiles(z, log_weights), normal],
            *condensed(z, log_weights),
        )
        fitted = (centre + width * loc, width * scale, *shape)
        return tuple(x.to(u.dtype) for x in likelier(self, fitted, u.double(), log_weights))

    def _match_quantiles(self, z: Tensor, log_weights: Tensor) -> Params:
        """Knots on the draws' quantile curve."""
        pieces = z.new_zeros(z.shape[1], self.num_bins - 1)
        for _ in range(_NUM_MATCHES):
            at = self.geometry((pieces, z.new_zeros(z.shape[1], self.num_bins + 1))).x
            curve = quantile_curve(z, log_weights, at.T.contiguous()).T
            steep, _ = free_numbers((curve.diff(dim=-1) / at.diff(dim=-1)).log())
            pieces = 0.5 * (pieces + steep)
        at = torch.tensor([-1.0, 0.0, 1.0], dtype=z.dtype, device=z.device)
        low, middle, high = quantile_curve(z, log_weights, at[:, None].expand(-1, z.shape[1]))
        scale = (0.5 * (high - low)).clamp(min=2.0 * _LEAST_SCALE)
        return (middle, scale, pieces, z.new_zeros(z.shape[1], self.num_bins + 1))

    @staticmethod
    def _roughness(shape: Params) -> Tensor:
        """What is zero for a Normal: changes of log slope, ``(*batch, 2 K)``."""
        return torch.cat([relative_logs(shape[0]).diff(dim=-1), shape[1]], -1)

    def _cumulate(self, steps: Tensor) -> Tensor:
        """Knots from ``-bound`` up, shape ``(*batch, K + 1)``."""
        return torch.cat([torch.zeros_like(steps[..., :1]), steps.cumsum(-1)], -1) - self.bound
