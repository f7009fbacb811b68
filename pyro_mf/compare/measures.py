"""How far two samples of a posterior are apart, parameter by parameter, and how well that is known.

Draws have the shape (chain, draw, parameter); distances are in standard deviations of the first
sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.compare.statistics import TINY, effective_sample_size, mean_variance

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Moments:
    """Mean and sd per parameter with the variances of their estimates; arrays of shape (P,)."""

    draws: np.ndarray  # (chain, draw, P)
    independent: bool
    mean: np.ndarray
    sd: np.ndarray
    ess: np.ndarray
    mean_variance: np.ndarray
    sd_variance: np.ndarray

    @classmethod
    def of(cls, draws: np.ndarray, *, independent: bool) -> Moments:
        """Moments of draws (chain, draw, P)."""
        mean, sd = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
        square = (draws - mean) ** 2
        ess = effective_sample_size(draws, independent=independent)
        # delta method for the root of a mean of squares
        sd_variance = mean_variance(square, independent=independent) / np.maximum(4 * sd**2, TINY)
        return cls(draws, independent, mean, sd, ess, sd**2 / ess, sd_variance)

    @cached_property
    def bulk_size(self) -> int:
        """The smallest bulk effective sample size, at most the number of draws."""
        ess = effective_sample_size(self.draws, independent=self.independent, method="bulk")
        return int(min(np.nanmin(ess, initial=np.inf), self.draws[..., 0].size))

    @cached_property
    def quantiles(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each of ``QUANTILES`` with the variance of its estimate, two arrays (P,).

        An order statistic's rank has a beta distribution; half the distance between its quantiles
        at minus and plus one standard deviation is the standard error (Vehtari et al. 2021).
        """
        from scipy.stats import beta, norm

        found = []
        flat = self.draws.reshape(-1, self.draws.shape[-1])
        for prob in QUANTILES:
            size = effective_sample_size(
                self.draws, independent=self.independent, method="quantile", prob=prob
            )
            size = np.where(np.isfinite(size), size, 1.0)  # a constant
            a, b = size * prob + 1, size * (1 - prob) + 1
            ends = beta.ppf(norm.cdf([[-1.0], [1.0]]), a, b)
            rank = (ends * (len(flat) - 1)).round().astype(int)
            low, high = np.take_along_axis(np.sort(flat, axis=0), rank, axis=0)
            found.append((np.quantile(flat, prob, axis=0), np.square((high - low) / 2)))
        return found


def measure(p: Moments, q: Moments, names: list[str]) -> pd.DataFrame:
    """All measures of ``q`` against the baseline ``p``, a row per parameter."""
    import pandas as pd

    relative = p.sd_variance / p.sd**2  # of the unit in which distances are given
    error, ratio = (q.mean - p.mean) / p.sd, q.sd / p.sd
    distance, phi_p, phi_q = _wasserstein(p.draws, q.draws)
    distance_variance = mean_variance(phi_p, independent=p.independent) + mean_variance(
        phi_q, independent=q.independent
    )
    distance = distance / p.sd
    columns = {
        "nuts_mean": p.mean,
        "nuts_sd": p.sd,
        "mean_error": error,
        "mean_error_mcse": np.sqrt(
            (p.mean_variance + q.mean_variance) / p.sd**2 + error**2 * relative
        ),
        "sd_ratio": ratio,
        "sd_ratio_mcse": np.sqrt(q.sd_variance / p.sd**2 + ratio**2 * relative),
        "wasserstein": distance,
        "wasserstein_mcse": np.sqrt(distance_variance / p.sd**2 + distance**2 * relative),
        "wasserstein_floor": np.sqrt((1 / p.ess + 1 / q.ess) * 2 / np.pi) * _spread(p.draws) / p.sd,
    }
    for prob, (value_p, variance_p), (value_q, variance_q) in zip(
        QUANTILES, p.quantiles, q.quantiles, strict=True
    ):
        error = (value_q - value_p) / p.sd
        columns[f"q{prob:.0%}_error".replace("%", "")] = error
        columns[f"q{prob:.0%}_error_mcse".replace("%", "")] = np.sqrt(
            (variance_p + variance_q) / p.sd**2 + error**2 * relative
        )
    return pd.DataFrame(columns, index=pd.Index(names, name="parameter"))


def _wasserstein(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marginal distances (P,) of two samples, and the dual potential at their draws."""
    distance, phi_p, phi_q = np.empty(p.shape[-1]), np.empty_like(p), np.empty_like(q)
    for i in range(p.shape[-1]):
        x, y = p[..., i].ravel(), q[..., i].ravel()
        grid = np.sort(np.concatenate([x, y]))
        step = np.diff(grid)
        below_x = np.searchsorted(np.sort(x), grid[:-1], side="right") / x.size
        below_y = np.searchsorted(np.sort(y), grid[:-1], side="right") / y.size
        distance[i] = np.sum(np.abs(below_x - below_y) * step)
        phi = np.concatenate([[0.0], np.cumsum(np.sign(below_x - below_y) * step)])
        phi_p[..., i] = np.interp(p[..., i], grid, phi)
        phi_q[..., i] = np.interp(q[..., i], grid, phi)
    return distance, phi_p, phi_q


def _spread(draws: np.ndarray) -> np.ndarray:
    """The integral of the root of F (1 - F) per parameter, shape (P,)."""
    x = np.sort(draws.reshape(-1, draws.shape[-1]), axis=0)
    below = np.arange(1, len(x))[:, None] / len(x)
    return np.asarray((np.sqrt(below * (1 - below)) * np.diff(x, axis=0)).sum(0))
