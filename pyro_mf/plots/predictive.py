"""The observed data among what NUTS and fits predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.convert import generations
from pyro_mf.plots.densities import density
from pyro_mf.plots.style import COLOURS, FAINT, LINES, MARKERS, check_report, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison

MAX_OBSERVATIONS = 30
MAX_VALUES = 15  # different values of discrete data that get a bar each
MAX_REPLICATES = 200


def plot_predictive(
    report: PosteriorComparison, *, site: str | None = None, path: str | Path | None = None
) -> Figure:
    """Draw observed data among the predictions of NUTS and of the fits.

    On the left all observations together: the density of the data and of what is predicted, as an
    average over replicated data sets; of discrete data with few values their shares, with 90 %
    intervals. On the right up to 30 single observations, in the order of NUTS's predictive means:
    central 50 and 90 % intervals and the observed value; of data with two values the predicted
    share of the larger one.

    Args:
        report: What ``compare_posteriors`` returned, of results with ``posterior_predictive``.
        site: The observed site; needed where there are several.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If ``report`` is not a comparison.
        ValueError: If NUTS has no predictions, ``site`` is none of them, or there are more than six
            fits.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> dims, noise = ("chain", "draw"), np.random.default_rng(0).normal(size=(4, 100, 6))
        >>> predicted = xr.Dataset({"y": ((*dims, "row"), noise)})
        >>> posterior = xr.Dataset({"mu": (dims, noise[..., 0])})
        >>> nuts = wrap({"posterior": posterior, "posterior_predictive": predicted})
        >>> len(plot_predictive(compare_posteriors(nuts, {"fit": nuts})).axes)
        2
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_predictive")
    predictions, data, site = _read(report, site)
    order = list(report.draws)
    pooled = np.concatenate([p.ravel()[:20_000] for p in predictions.values()])
    values = np.unique(pooled if data is None else np.concatenate([pooled, data]))
    is_binary, is_discrete = len(values) == 2, len(values) <= MAX_VALUES
    bars = min(MAX_OBSERVATIONS, predictions["NUTS"].shape[-1]) * (len(predictions) + 2)
    widths = (4.2, 4.2 if is_binary else max(3.5, 0.045 * bars))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(sum(widths), 4.0), layout="constrained", width_ratios=widths
    )
    if is_discrete:
        _draw_shares(left, predictions, data, values, order)
    else:
        _draw_densities(left, predictions, data, order)
    left.set_xlabel(f"{site}, all observations", fontsize=10)
    if is_binary:
        _draw_probabilities(right, predictions, values, order)
    else:
        _draw_intervals(right, predictions, data, order)
        right.set_ylabel(site, fontsize=10)
    for axes in (left, right):
        axes.spines[["right", "top"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return finish(figure, report, path, list(predictions), "both" if is_discrete else "line")


def _read(
    report: PosteriorComparison, site: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None, str]:
    """Predictions (S, N) by result, NUTS first, the observed data (N,), and the site.

    Raises:
        ValueError: If there is no such site.
    """
    group = "posterior_predictive"
    held = {
        name: generations.dataset(result, group)
        for name, result in report.results.items()
        if group in generations.groups(result)
    }
    sites = sorted(map(str, held["NUTS"].data_vars)) if "NUTS" in held else []
    if not sites:
        raise ValueError(
            "NUTS has no predictions. Convert it, and the fits, with posterior_predictive=True."
        )
    if site is None and len(sites) > 1:
        raise ValueError(f"there are several sites: {sites}. Choose one with site={sites[0]!r}.")
    site = site or sites[0]
    if site not in sites:
        raise ValueError(f"site={site!r} has no predictions; expected one of {sites}.")
    arrays = {n: ds[site].transpose("chain", "draw", ...) for n, ds in held.items() if site in ds}
    shape = arrays["NUTS"].shape[2:]
    predictions = {
        name: np.asarray(a.values, float).reshape(a.sizes["chain"] * a.sizes["draw"], -1)
        for name, a in arrays.items()
        if a.shape[2:] == shape
    }
    nuts = report.results["NUTS"]
    data = None
    if "observed_data" in generations.groups(nuts):
        observed = generations.dataset(nuts, "observed_data")
        if site in observed and observed[site].shape == shape:
            data = np.asarray(observed[site].values, float).ravel()
    return predictions, data, site


def _draw_shares(
    axes: Axes,
    predictions: dict[str, np.ndarray],
    data: np.ndarray | None,
    values: np.ndarray,
    order: list[str],
) -> None:
    place = np.arange(len(values))
    if data is not None:
        axes.bar(
            place,
            [(data == v).mean() for v in values],
            width=0.9,
            color="#dddddd",
            label="observed",
        )
        _legend(axes)
    for number, (name, draws) in enumerate(predictions.items()):
        k = order.index(name)
        shares = np.array([(draws == v).mean(1) for v in values])
        low, high = np.quantile(shares, [0.05, 0.95], axis=1)
        spot = place + (number - (len(predictions) - 1) / 2) * 0.7 / len(predictions)
        axes.vlines(spot, low, high, color=COLOURS[k], lw=1.4)
        axes.plot(spot, shares.mean(1), ls="", marker=MARKERS[k], ms=5, color=COLOURS[k])
    axes.set_xticks(place, [f"{v:g}" for v in values])
    axes.set_ylabel("share", fontsize=10)


def _draw_densities(
    axes: Axes, predictions: dict[str, np.ndarray], data: np.ndarray | None, order: list[str]
) -> None:
    nuts = predictions["NUTS"]
    ends = np.quantile(nuts, [0.002, 0.998])
    if data is not None:
        ends = np.array([min(ends[0], data.min()), max(ends[1], data.max())])
    low, high = ends + np.array([-0.08, 0.08]) * np.ptp(ends)
    if data is not None and np.ptp(data) > 0:
        x, curve = density(data, low, high)
        axes.fill_between(x, curve, color="#dddddd", lw=0, label="observed")
        axes.plot(data, np.full(len(data), -0.02 * curve.max()), "|", color=FAINT, ms=5)
        _legend(axes)
    for name, draws in predictions.items():
        k = order.index(name)
        replicates = draws[:: max(1, len(draws) // MAX_REPLICATES)]
        curves = [density(each, low, high) for each in replicates if np.ptp(each) > 0]
        if curves:
            mean = np.mean([curve for _, curve in curves], axis=0)
            axes.plot(curves[0][0], mean, color=COLOURS[k], ls=LINES[k], lw=1.5)
    axes.set(xlim=(low, high), yticks=[])
    axes.spines["left"].set_visible(False)


def _chosen(nuts: np.ndarray) -> np.ndarray:
    """Observations to draw, evenly spaced in the order of NUTS's means."""
    order = np.argsort(nuts.mean(0), kind="stable")
    count = min(MAX_OBSERVATIONS, len(order))
    kept: np.ndarray = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    return kept


def _draw_intervals(
    axes: Axes, predictions: dict[str, np.ndarray], data: np.ndarray | None, order: list[str]
) -> None:
    shown = _chosen(predictions["NUTS"])
    place = np.arange(len(shown))
    for number, (name, draws) in enumerate(predictions.items()):
        k = order.index(name)
        low, first, third, high = np.quantile(draws[:, shown], [0.05, 0.25, 0.75, 0.95], axis=0)
        spot = place + (number - (len(predictions) - 1) / 2) * 0.75 / len(predictions)
        axes.vlines(spot, low, high, color=COLOURS[k], lw=1.0)
        axes.vlines(spot, first, third, color=COLOURS[k], lw=2.6)
    if data is not None:
        axes.plot(
            place, data[shown], ls="", marker="_", ms=9, mew=2.0, color="black", label="observed"
        )
        _legend(axes)
    total = predictions["NUTS"].shape[-1]
    some = f"{len(shown)} of {total} observations" if total > len(shown) else "observations"
    axes.set_xlabel(f"{some}, by NUTS's mean", fontsize=10)
    axes.set(xticks=[], xlim=(-0.8, len(shown) - 0.2))


def _draw_probabilities(
    axes: Axes, predictions: dict[str, np.ndarray], values: np.ndarray, order: list[str]
) -> None:
    """Each fit's share of the larger value against that of NUTS."""
    shares = {name: (draws == values[1]).mean(0) for name, draws in predictions.items()}
    nuts: Any = shares.pop("NUTS")
    axes.plot([0, 1], [0, 1], color=COLOURS[0], lw=0.9)
    for name, share in shares.items():
        k = order.index(name)
        axes.plot(
            nuts, share, ls="", marker=MARKERS[k], ms=4, color=COLOURS[k], alpha=0.5, mec="none"
        )
    axes.set_xlabel(f"predicted share of {values[1]:g} by NUTS", fontsize=10)
    axes.set_ylabel("by the fit", fontsize=10)


def _legend(axes: Axes) -> None:
    """What marks the observed data, above the axes, where no curve goes."""
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.98))
