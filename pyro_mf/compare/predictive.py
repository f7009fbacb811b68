r"""How well a fit predicts, against NUTS: draws of the observed sites, and their log likelihood.

A predictive distribution adds up the posterior's uncertainty along directions in which parameters
are correlated, so a fit with perfect marginals can be far too wide there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mf.compare.aligned import in_order_of
from pyro_mf.compare.elpd import left_out
from pyro_mf.compare.inputs import group, is_independent
from pyro_mf.compare.statistics import TINY, mean_variance
from pyro_mf.convert import generations

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

COVERAGES = (0.5, 0.9)
MAX_FLOOR = 300  # observations over which the floor is averaged; each takes a millisecond
COLUMNS = (
    "kind",
    "observations",
    "variance",
    "mean_error",
    "mean_error_floor",
    "mean_error_worst",
    "sd_ratio",
    "sd_ratio_mcse",
    "sd_ratio_worst",
    *(f"coverage_{level:.0%}".replace("%", "") for level in COVERAGES),
    "lppd",
    "lppd_diff",
    "lppd_diff_mcse",
    "elpd",
    "elpd_diff",
    "elpd_diff_se",
    "elpd_bad_k",
    "elpd_doubtful",
)


class Predictions(NamedTuple):
    """What :func:`predict` returns.

    Args:
        table: Indexed by ``fit`` and ``site``; see :class:`~pyro_mf.compare.PosteriorComparison`.
            Empty where results hold nothing to compare.
        loo_khat: By site and result, k-hat of the weights without each element of the data.
        notes: Sentences on what could not be computed.
    """

    table: pd.DataFrame
    loo_khat: dict[str, dict[str, np.ndarray]]
    notes: list[str]


def predict(results: dict[str, Any]) -> Predictions:
    """All predictive measures, a row per result and site.

    Args:
        results: By name, NUTS first.
    """
    import pandas as pd

    names = list(results)
    observed = group(results[names[0]], "observed_data")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    notes: list[str] = []
    loo_khat: dict[str, dict[str, np.ndarray]] = {}
    for site, kind in _sites(results, observed).items():
        source = "posterior" if kind == "local" else "posterior_predictive"
        draws = {name: group(result, source) for name, result in results.items()}
        held = {name: ds for name, ds in draws.items() if ds is not None and site in ds}
        if names[0] in held:
            target = held[names[0]][site].transpose("chain", "draw", ...)
            base = _flat(target, target)
            data = None if kind == "local" or observed is None else observed.get(site)
            for name, ds in held.items():
                if base is not None and (values := _flat(ds[site], target)) is not None:
                    independent = name != names[0] and is_independent(results[name])
                    row = _row(base, values, data, independent=independent)
                    rows[name, site] = {"kind": kind} | row
        if kind == "predictive":
            for name, row in _log_predictive(results, site).items():
                rows.setdefault((name, site), {"kind": kind}).update(row)
            elpds, missing = left_out(results, site)
            notes += missing
            loo_khat |= {site: {n: e.khat for n, e in elpds.items()}} if elpds else {}
            for name, elpd in elpds.items():
                reference = None if name == names[0] else elpds.get(names[0])
                rows[name, site].update(elpd.row(reference))
    ordered = sorted(rows, key=lambda key: names.index(key[0]))
    index = pd.MultiIndex.from_tuples(ordered, names=["fit", "site"]) if rows else None
    table = pd.DataFrame([rows[key] for key in ordered], index, columns=list(COLUMNS))
    table = table.assign(elpd_doubtful=table["elpd_doubtful"].eq(True))
    return Predictions(table, loo_khat, notes)


def _sites(results: dict[str, Any], observed: xr.Dataset | None) -> dict[str, str]:
    """Observed sites, and the variables of which there is one element per observation."""
    found: dict[str, str] = {}
    for result in results.values():
        for kind in ("posterior_predictive", "log_likelihood"):
            ds = group(result, kind)
            found |= {} if ds is None else dict.fromkeys(map(str, ds.data_vars), "predictive")
    if observed is None:
        return found
    axes = {tuple(values.dims) for values in observed.values() if values.ndim}
    posterior = generations.dataset(next(iter(results.values())), "posterior")
    for variable in map(str, posterior.data_vars):
        dims = posterior[variable].transpose("chain", "draw", ...).dims[2:]
        if variable not in found and tuple(dims) in axes:
            found[variable] = "local"
    return found


def _flat(values: xr.DataArray, target: xr.DataArray) -> np.ndarray | None:
    """Draws (chain, draw, N), ``None`` where observations are others than those of ``target``."""
    values = in_order_of(values, target)
    if values.shape[2:] != target.shape[2:]:
        return None
    return np.asarray(values.values, float).reshape(*values.shape[:2], -1)


def _row(
    p: np.ndarray, q: np.ndarray, data: xr.DataArray | None, *, independent: bool
) -> dict[str, float]:
    """Moments of (chain, draw, N) predictions against those of NUTS, over observations."""
    sd_p, sd_q = (draws.std((0, 1), ddof=1) for draws in (p, q))
    moves = (sd_p > 0) & np.isfinite(sd_p) & np.isfinite(sd_q)
    row: dict[str, float] = {"observations": p.shape[-1], "variance": float((sd_q**2).mean())}
    if data is not None:
        row |= _coverage(q, np.asarray(data.values, float).ravel())
    if not moves.any():
        return row
    p, q, sd_p, sd_q = p[..., moves], q[..., moves], sd_p[moves], sd_q[moves]
    mean_p, mean_q = p.mean((0, 1)), q.mean((0, 1))
    error, ratio = np.abs(mean_q - mean_p) / sd_p, sd_q / sd_p
    row["mean_error"], row["mean_error_worst"] = float(error.mean()), float(error.max())
    row["sd_ratio"] = float(np.sqrt((ratio**2).mean()))
    row["sd_ratio_worst"] = float(ratio[np.abs(np.log(ratio.clip(min=TINY))).argmax()])
    if q is p or np.array_equal(p, q):
        return row
    some = slice(None, None, -(-p.shape[-1] // MAX_FLOOR))
    noise = mean_variance(p[..., some], independent=False)
    noise = noise + mean_variance(q[..., some], independent=independent)
    row["mean_error_floor"] = float(np.sqrt(2 / np.pi * noise / sd_p[some] ** 2).mean())
    # The averaged squared ratio is a mean over draws of q, and depends on p's variances likewise.
    of_q = (((q - mean_q) / sd_p) ** 2).mean(-1, keepdims=True)
    of_p = ((ratio * (p - mean_p) / sd_p) ** 2).mean(-1, keepdims=True)
    variance = mean_variance(of_q, independent=independent) + mean_variance(of_p, independent=False)
    row["sd_ratio_mcse"] = float(np.sqrt(variance[0])) / max(2 * row["sd_ratio"], TINY)
    return row


def _coverage(draws: np.ndarray, data: np.ndarray) -> dict[str, float]:
    """Share of the observed data inside central intervals of (chain, draw, N) predictions."""
    if data.size != draws.shape[-1]:
        return {}
    flat = draws.reshape(-1, draws.shape[-1])
    shares = {}
    for level in COVERAGES:
        low, high = np.quantile(flat, [(1 - level) / 2, (1 + level) / 2], axis=0)
        inside = (low <= data) & (data <= high)
        shares[f"coverage_{level:.0%}".replace("%", "")] = float(inside.mean())
    return shares


def _log_predictive(results: dict[str, Any], site: str) -> dict[str, dict[str, float]]:
    """Log pointwise predictive density of each result, in nats, and the difference to NUTS."""
    values: dict[str, tuple[float, float, int]] = {}
    for name, result in results.items():
        ds = group(result, "log_likelihood")
        if ds is not None and site in ds:
            pointwise = ds[site].transpose("chain", "draw", ...)
            array = np.asarray(pointwise.values, float).reshape(*pointwise.shape[:2], -1)
            independent = name != next(iter(results)) and is_independent(result)
            values[name] = (*_lppd(array, independent=independent), array.shape[-1])
    rows = {name: {"lppd": lppd} for name, (lppd, _, _) in values.items()}
    if (base := next(iter(results))) in values:
        lppd, variance, size = values[base]
        for name, (other, more, count) in values.items():
            if name != base and count == size:
                rows[name]["lppd_diff"] = other - lppd
                rows[name]["lppd_diff_mcse"] = float(np.sqrt(variance + more))
    return rows


def _lppd(log_likelihood: np.ndarray, *, independent: bool) -> tuple[float, float]:
    """Sum over observations of the log of the mean likelihood, and its Monte Carlo variance."""
    top = log_likelihood.max((0, 1))
    likelihood = np.exp(log_likelihood - top)
    mean = likelihood.mean((0, 1))
    influence = (likelihood / mean).sum(-1, keepdims=True)  # delta method for the logarithm
    lppd = float((np.log(mean) + top).sum())
    return lppd, float(mean_variance(influence, independent=independent)[0])
