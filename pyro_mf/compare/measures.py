"""How far two samples of a posterior are apart, parameter by parameter, and how well that is known.

Draws have the shape (chain, draw, parameter); distances are in standard deviations of the first
sample. Independent draws count in full, those of a Markov chain by their effective sample size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.convert import generations

if TYPE_CHECKING:
    import pandas as pd

TINY = np.finfo(float).tiny


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
        sd_variance = _mean_variance(square, independent=independent) / np.maximum(4 * sd**2, TINY)
        return cls(draws, independent, mean, sd, ess, sd**2 / ess, sd_variance)


def measure(p: Moments, q: Moments, names: list[str]) -> pd.DataFrame:
    """All measures of ``q`` against the baseline ``p``, a row per parameter."""
    import pandas as pd

    relative = p.sd_variance / p.sd**2  # of the unit in which distances are given
    error, ratio = (q.mean - p.mean) / p.sd, q.sd / p.sd
    distance, phi_p, phi_q = _wasserstein(p.draws, q.draws)
    distance_variance = _mean_variance(phi_p, independent=p.independent) + _mean_variance(
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


def _mean_variance(values: np.ndarray, *, independent: bool) -> np.ndarray:
    """Squared standard error of the mean of (chain, draw, P) values, shape (P,)."""
    variance = values.var((0, 1), ddof=1)
    # A constant has no effective sample size; its mean has no error.
    ess = np.where(variance > 0, effective_sample_size(values, independent=independent), 1.0)
    return np.asarray(variance / ess)


def effective_sample_size(
    values: np.ndarray, *, independent: bool, method: str = "mean"
) -> np.ndarray:
    """Effective sample size per parameter, shape (P,), by the method of ArviZ named."""
    if independent:
        return np.full(values.shape[-1], float(values.shape[0] * values.shape[1]))
    return arviz_statistic("ess", values, method=method)


def arviz_statistic(name: str, values: np.ndarray, **kwargs: Any) -> np.ndarray:
    """One of ArviZ's statistics per parameter of (chain, draw, P) values, shape (P,)."""
    import xarray as xr

    data = xr.Dataset({"x": (("chain", "draw", "parameter"), values)})
    result = getattr(generations.import_arviz(), name)(data, **kwargs)
    return np.asarray(result["x"].values, float)
