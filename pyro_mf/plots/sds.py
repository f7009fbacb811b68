"""Standard deviations of fits against those of NUTS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.plots.style import COLOURS, FAINT, MARKERS, check_report, choose, finish, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison

BAND = 1.25  # factor by which a standard deviation may be off before it is called bad
NAMED = 3  # parameters named in the picture


def plot_sds(
    report: PosteriorComparison,
    *,
    var_names: Sequence[str] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw each fit's standard deviations over those of NUTS, on logarithmic axes.

    The lower panel has the ratio, in which a factor can be read. The grey band is a factor of 1.25
    either way; bars are two Monte Carlo standard errors. Points below the diagonal are too
    sure. Hollow points are parameters in which NUTS has not converged. The worst three are named
    where there is room.

    Args:
        report: What ``compare_posteriors`` returned.
        var_names: Variables (``"theta"``) or single parameters (``"theta[0]"``) to show; all by
            default.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If ``report`` is not a comparison.
        ValueError: If a name in ``var_names`` is unknown, or there are more than six fits.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> z = np.random.default_rng(0).normal(size=(4, 500))
        >>> nuts = wrap({"posterior": xr.Dataset({"mu": (("chain", "draw"), z)})})
        >>> len(plot_sds(compare_posteriors(nuts, {"fit": nuts})).axes)
        2
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_sds")
    chosen = choose(report.parameters, var_names)
    parameters = [p for p in report.parameters if p in chosen]
    doubtful = np.array([p in report.doubtful for p in parameters])
    figure, (upper, lower) = plt.subplots(
        2,
        1,
        figsize=(6.0, 7.0),
        layout="constrained",
        sharex=True,
        height_ratios=(2, 1.3),
    )
    ratios, tops = {}, {}
    for k, name in enumerate(report.draws):
        if name == "NUTS":
            continue
        rows = report.table.xs(name, level="fit").loc[parameters]
        sd, ratio, error = (
            rows[c].to_numpy(float) for c in ("nuts_sd", "sd_ratio", "sd_ratio_mcse")
        )
        tops[name] = ratio + np.where(ratio > 1, 2, -2) * error
        ratios[name] = ratio = np.where(ratio > 0, ratio, np.nan)  # a point estimate has no place
        for axes, scale in ((upper, sd), (lower, 1.0)):
            y, bar = scale * ratio, 2 * scale * error
            bars = np.minimum(bar, 0.9 * y), bar
            axes.errorbar(sd, y, yerr=bars, ls="", color=COLOURS[k], lw=0.8, alpha=0.6, zorder=2)
            for here, face in ((~doubtful, COLOURS[k]), (doubtful, "white")):
                edge = "white" if face != "white" else COLOURS[k]
                style = {"marker": MARKERS[k], "mec": edge, "mfc": face, "mew": 0.6}
                axes.plot(sd[here], np.asarray(y)[here], ls="", ms=6, zorder=3, **style)
    _dress(upper, lower)
    _name_worst(lower, report, parameters, ratios, tops)
    return finish(figure, report, path, list(ratios), "marker")


def _dress(upper: Axes, lower: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axes in (upper, lower):
        axes.set(xscale="log", yscale="log")
        axes.spines[["right", "top"]].set_visible(False)
        axes.tick_params(labelsize=8)
    ends = np.array(upper.get_xlim())
    upper.fill_between(ends, ends / BAND, ends * BAND, color="#ededed", lw=0, zorder=0)
    upper.plot(ends, ends, color=COLOURS[0], lw=0.9, zorder=1)
    upper.set_xlim(*ends)
    lower.axhspan(1 / BAND, BAND, color="#ededed", lw=0, zorder=0)
    lower.axhline(1, color=COLOURS[0], lw=0.9, zorder=1)
    low, high = lower.get_ylim()
    pad = 1.15 * (high / low) ** 0.1  # for names
    lower.set_ylim(min(low / pad, 0.6), max(high * pad, 1.7))
    for axis in (upper.xaxis, upper.yaxis, lower.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 3.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    upper.set_ylabel("sd of the fit", fontsize=10)
    lower.set_ylabel("fit / NUTS", fontsize=10)
    lower.set_xlabel("sd under NUTS", fontsize=10)


def _name_worst(
    axes: Axes,
    report: PosteriorComparison,
    parameters: list[str],
    ratios: dict[str, np.ndarray],
    tops: dict[str, np.ndarray],
) -> None:
    """Name the parameters that are furthest off, at the outer ends of their bars."""
    found = np.array(list(ratios.values()))
    off = np.nan_to_num(np.abs(np.log(found))).max(0)
    sd = report.table.groupby("parameter")["nuts_sd"].first()
    named = [k for k in np.argsort(-off, kind="stable")[:NAMED] if off[k] > np.log(BAND)]
    left, right = np.log(axes.get_xlim())
    placed: list[tuple[float, float]] = []
    for k in named:
        fit = np.nanargmax(np.abs(np.log(found[:, k])))
        above = found[fit, k] > 1
        x, y = (
            float(sd[parameters[k]]),
            max(float(list(tops.values())[fit][k]), 0.1 * found[fit, k]),
        )
        spot = (np.log(x) - left) / (right - left), np.log(y)
        if any(abs(spot[0] - a) < 0.3 and abs(spot[1] - b) < 0.15 for a, b in placed):
            continue  # it would lie over another name
        placed.append(spot)
        axes.annotate(
            label(report, parameters[k]),
            (x, y),
            (0, 5 if above else -5),
            textcoords="offset points",
            ha="left" if spot[0] < 0.15 else "right" if spot[0] > 0.85 else "center",
            va="bottom" if above else "top",
            fontsize=8,
            color=FAINT,
        )
