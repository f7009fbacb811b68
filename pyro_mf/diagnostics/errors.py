r"""Errors of an approximation's marginals, in posterior sds, by draws of both.

References:
    Wang, Kasprzak and Huggins (2023), A Targeted Accuracy Diagnostic for Variational
    Approximations, https://arxiv.org/abs/2302.12419
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_mf.diagnostics.check import Status
from pyro_mf.solvers.posterior_draws import Expectations
from pyro_mf.weights import psis

if TYPE_CHECKING:
    import pandas as pd

# What a serious error is: of a mean, in posterior sds; of an sd, relative; of the shape, the
# 1-Wasserstein distance in posterior sds, which a Normal factor of right moments has from an
# exponential posterior.
MAX_MEAN, MAX_SD, MAX_SHAPE = 0.25, 0.25, 0.25
Z = 2.0  # standard errors by which an error must be on one side of its limit
_GRID = 200  # quantiles by which shapes are compared
# Relative standard error of an sd from which on it is not known, and k-hat of the squares from
# which on averages of them do not settle, and those of the values themselves.
_MAX_SD_ERROR, MAX_SD_KHAT, _MAX_MEAN_KHAT = 0.25, 0.7, 1.4
_KURTOSIS = 6.0  # above which tails are looked at
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
        tail: k-hat of the squares, the larger one of both, less its standard error; minus infinity
            where the fourth moment is small.
        known: Whether the posterior's sd is known to a quarter of itself.
    """

    mean: Tensor
    sd: Tensor
    posterior_sd: Tensor
    mean_error: Tensor
    mean_se: Tensor
    sd_ratio: Tensor
    sd_se: Tensor
    shape: Tensor
    tail: Tensor
    known: Tensor

    @property
    def statuses(self) -> list[Status]:
        """Red where an error is beyond its limit by two standard errors; green where within.

        Amber where tails are so heavy, or so few draws are behind an sd, that its error is not
        known.
        """
        mean = _judge(self.mean_error.abs(), self.mean_se, -MAX_MEAN, MAX_MEAN)
        mean[~self.known | (self.tail > _MAX_MEAN_KHAT)] = 1
        sd = _judge(self.sd_ratio, self.sd_se, 1.0 - MAX_SD, 1.0 + MAX_SD)
        sd[~self.known | (self.tail > MAX_SD_KHAT)] = 1
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
            "tail_khat": self.tail,
        }
        return pd.DataFrame(
            {k: v.numpy() if isinstance(v, Tensor) else v for k, v in columns.items()},
            index=pd.Index(names, name="parameter"),
        )


def marginal_errors(
    claimed: Tensor,
    reference: Tensor,
    weights: Tensor,
    averages: Expectations,
    effective: float = math.inf,
) -> MarginalErrors:
    """Compare independent draws of an approximation with weighted ones of the posterior.

    Args:
        claimed: Independent draws of the approximation, shape ``(S, P)``.
        reference: Draws of the posterior, shape ``(R, P)``.
        weights: Their weights, which sum to one, shape ``(R,)``.
        averages: The posterior draws' averages with their Monte Carlo errors.
        effective: Their effective number, where that is below what the weights say.
    """
    parts = [
        _errors_of(q, p, weights, averages, effective)
        for q, p in zip(claimed.split(_CHUNK, 1), reference.split(_CHUNK, 1), strict=True)
    ]
    return MarginalErrors(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _errors_of(
    q: Tensor, p: Tensor, weights: Tensor, averages: Expectations, effective: float
) -> tuple[Tensor, ...]:
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
    tail = torch.maximum(_tail(q, q.new_zeros(len(q))), _tail(p, weights.log(), effective))
    known = relative_p <= _MAX_SD_ERROR
    return mean_q, sd_q, sd_p, error, mean_se, ratio, sd_se, shape, tail, known


def _tail(draws: Tensor, log_weights: Tensor, effective: float = math.inf) -> Tensor:
    """k-hat of the squares of draws with heavy tails, less its standard error, shape ``(P,)``."""
    weights = torch.softmax(log_weights, 0)
    centred = draws - weights @ draws
    squares = centred.square()
    variance = (weights @ squares).clamp_min(torch.finfo(draws.dtype).tiny)
    kurtosis = weights @ (squares / variance).square()
    found = torch.full_like(variance, -math.inf)
    # Draws that depend on each other know the tail as well as their effective number would.
    surplus = max(1.0, len(draws) / effective)
    for k in (kurtosis > _KURTOSIS).nonzero().reshape(-1).tolist():
        logs = (squares[:, k] / variance[k]).clamp_min(torch.finfo(draws.dtype).tiny).log()
        tail = psis(log_weights + logs)
        found[k] = tail.khat - tail.khat_se * math.sqrt(surplus)
    return found


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
    mean = table["mean_error"].abs().fillna(-1.0)
    ratio = np.abs(np.log(table["sd_ratio"].clip(lower=1e-300))).fillna(-1.0)
    by_mean, by_sd = str(mean.idxmax()), str(ratio.idxmax())
    return (
        by_mean,
        float(table["mean_error"][by_mean]),
        by_sd,
        float(table["sd_ratio"][by_sd]),
    )
