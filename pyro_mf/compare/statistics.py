"""Effective sizes and standard errors of draws (chain, draw, parameter), per parameter.

Independent draws count in full, those of a Markov chain by their effective sample size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_mf.convert import generations

TINY = np.finfo(float).tiny


def mean_variance(values: np.ndarray, *, independent: bool) -> np.ndarray:
    """Squared standard error of the mean per parameter, shape (P,).

    Args:
        values: Shape (chain, draw, P).
        independent: Whether the draws are.

    Example:
        >>> mean_variance(np.arange(4.0).reshape(1, 4, 1), independent=True)
        array([0.41666667])
    """
    variance = values.var((0, 1), ddof=1)
    # A constant has no effective sample size; its mean has no error.
    ess = np.where(variance > 0, effective_sample_size(values, independent=independent), 1.0)
    return np.asarray(variance / ess)


def effective_sample_size(
    values: np.ndarray, *, independent: bool, method: str = "mean", **kwargs: Any
) -> np.ndarray:
    """Effective sample size per parameter, shape (P,), by the method of ArviZ named.

    Args:
        values: Shape (chain, draw, P).
        independent: Whether the draws are; then all count.
        method: ``"mean"``, ``"bulk"``, ``"tail"`` or ``"quantile"`` (with ``prob``).
        **kwargs: For ArviZ.
    """
    if independent:
        return np.full(values.shape[-1], float(values.shape[0] * values.shape[1]))
    return arviz_statistic("ess", values, method=method, **kwargs)


def arviz_statistic(name: str, values: np.ndarray, **kwargs: Any) -> np.ndarray:
    """One of ArviZ's statistics per parameter, shape (P,).

    Args:
        name: A function of ArviZ's, such as ``"rhat"``.
        values: Shape (chain, draw, P).
        **kwargs: For that function.
    """
    import xarray as xr

    data = xr.Dataset({"x": (("chain", "draw", "parameter"), values)})
    result = getattr(generations.import_arviz(), name)(data, **kwargs)
    return np.asarray(result["x"].values, float)
