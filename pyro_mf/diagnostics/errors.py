r"""Errors of an approximation's marginals, in posterior sds, by draws of both.

References:
    Wang, Kasprzak and Huggins (2023), A Targeted Accuracy Diagnostic for Variational
    Approximations, https://arxiv.org/abs/2302.12419
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_mf.diagnostics.check import Status
from pyro_mf.solvers.posterior_draws import Expectations

if TYPE_CHECKING:
    import pandas as pd

# What a serious error is: of a mean, in posterior sds; of an sd, relative; of the shape, the
# 1-Wasserstein distance in posterior sds, which a Normal factor of right moments has from an
# exponential posterior.
MAX_MEAN, MAX_SD, MAX_SHAPE = 0.25, 0.25, 0.25
Z = 2.0  # standard errors by which an error must be on one side of its limit
_GRID = 200  # quantiles by which shapes are compared
_CHUNK = 64  # quantities at once


@dataclass(frozen=True, eq=False)
class MarginalErrors:
    """Errors of every quantity's marginal, each tensor of shape ``(P,)``.

    Args:
        mean: Means of the approximation, in the quantity's unit.
        sd: Its sds.
        posterior_sd: The posterior's sds.
        mean_error: Means minus the posterior's, in posterior sds.
        mean_se: Standard error of that.
        sd_ratio: Sds over the posterior's.
        sd_se: Standard error of that.
        shape: 1-Wasserstein distance of the marginals, in posterior sds.
    """

    mean: Tensor
    sd: Tensor
    posterior_sd: Tensor
    mean_error: Tensor
    mean_se: Tensor
    sd_ratio: Tensor
    sd_se: Tensor
    shape: Tensor

    @property
    def statuses(self) -> list[Status]:
        """Red where an error is beyond its limit by two standard errors; green where within."""
        mean = _judge(self.mean_error.abs(), self.mean_se, -MAX_MEAN, MAX_MEAN)
        sd = _judge(self.sd_ratio, self.sd_se, 1.0 - MAX_SD, 1.0 + MAX_SD)
        level = torch.maximum(mean, sd)
        # A marginal of right moments and wrong shape is not what anybody would call right.
        level = torch.where((level == 0) & ~(self.shape <= MAX_SHAPE), 1, level)
        names: tuple[Status, ...] = ("green", "amber", "red")
        return [names[int(k)] for k in level]

    def table(self, names: list[str]) -> pd.DataFrame:
        """A row per quantity."""
        import pandas as pd

        columns = {
            "status": self.statuses,
            "mean": self.mean,
            "sd": self.sd,
            "mean_error": self.mean_error,
            "mean_error_se": self.mean_se,
            "sd_ratio": self.sd_ratio,
            "sd_ratio_se": self.sd_se,
            "wasserstein": self.shape,
        }
        return pd.DataFrame(
            {k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()},
            index=pd.Index(names, name="parameter"),
        )


def marginal_errors(
    claimed: Tensor, reference: Tensor, weights: Tensor, averages: Expectations
) -> MarginalErrors:
    """Compare independent draws of an approximation with weighted ones of the posterior.

    Args:
        claimed: Independent draws of the approximation, shape ``(S, P)``.
        reference: Draws of the posterior, shape ``(R, P)``.
        weights: Their weights, which sum to one, shape ``(R,)``.
        averages: The posterior draws' averages with their Monte Carlo errors.
    """
    parts = [
        _errors_of(q, p, weights, averages)
        for q, p in zip(claimed.split(_CHUNK, 1), reference.split(_CHUNK, 1), strict=True)
    ]
    return MarginalErrors(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _errors_of(q: Tensor, p: Tensor, weights: Tensor, averages: Expectations) -> tuple[Tensor, ...]:
    mean_p, mean_p_se = averages.expectation(p)
    squares, squares_se = averages.expectation((p - mean_p).square())
    tiny = torch.finfo(p.dtype).tiny
    sd_p = squares.sqrt().clamp_min(tiny)
    mean_q, sd_q = q.mean(0), q.std(0)
    variance_se = (q - mean_q).square().std(0) / len(q) ** 0.5
    relative_p = squares_se / (2.0 * sd_p.square())  # of an sd, half of the variance's
    relative_q = variance_se / (2.0 * sd_q.square()).clamp_min(tiny)
    error, ratio = (mean_q - mean_p) / sd_p, sd_q / sd_p
    mean_se = torch.hypot(torch.hypot(mean_p_se, sd_q / len(q) ** 0.5) / sd_p, error * relative_p)
    sd_se = ratio * torch.hypot(relative_p, relative_q)
    shape = _wasserstein(q, p, weights) / sd_p
    return mean_q, sd_q, sd_p, error, mean_se, ratio, sd_se, shape


def _wasserstein(q: Tensor, p: Tensor, weights: Tensor) -> Tensor:
    """Mean distance of quantiles at the same probabilities, shape ``(P,)``."""
    at = (torch.arange(_GRID, dtype=p.dtype) + 0.5) / _GRID
    own = torch.quantile(q[: 2**24 // max(1, q.shape[1])], at, dim=0)
    values, order = p.sort(0)
    below = weights[order].cumsum(0)
    index = torch.searchsorted(below.T.contiguous(), at.expand(p.shape[1], -1).contiguous())
    theirs = values.T.gather(1, index.clamp_max(len(p) - 1)).T
    return (own - theirs).abs().mean(0)


def _judge(value: Tensor, error: Tensor, low: float, high: float) -> Tensor:
    """0 where a value is between two limits, 2 where it is not, 1 where it cannot be told."""
    inside = (value - Z * error >= low) & (value + Z * error <= high)
    outside = (value + Z * error < low) | (value - Z * error > high)
    return torch.where(inside, 0, torch.where(outside, 2, 1))


def largest(table: pd.DataFrame) -> tuple[str, float, str, float]:
    """Which quantity's mean is most wrong and by how many sds; whose sd, and what ratio it has."""
    mean = table["mean_error"].abs()
    ratio = np.abs(np.log(table["sd_ratio"].clip(lower=1e-300)))
    by_mean, by_sd = str(mean.idxmax()), str(ratio.idxmax())
    return (
        by_mean,
        float(table["mean_error"][by_mean]),
        by_sd,
        float(table["sd_ratio"][by_sd]),
    )
