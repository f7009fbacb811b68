"""Pictures of a comparison. Small matplotlib code on plain arrays, the same for every ArviZ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from pyro_mf.compare import PosteriorComparison

# Okabe and Ito's palette for colour-blind readers, NUTS in dark grey; shapes say the same again.
COLOURS = ("#333333", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = (
    "-",
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1)),
    "-.",
    (0, (6, 2, 1, 2, 1, 2)),
    "--",
)
ROWS = 25  # parameters in one column of the forest
MAX_FOREST = 3 * ROWS
BINS = 500  # of a density's histogram before smoothing
LIMIT = 8.0  # NUTS standard deviations; what lies beyond is drawn as an arrow at the edge


def plot_comparison(
    report: PosteriorComparison,
    *,
    var_names: Sequence[str] | None = None,
    max_densities: int = 12,
    path: str | Path | None = None,
) -> Figure:
    """Draw a comparison: a forest of intervals, and the marginal densities that differ most.

    The forest shows, for NUTS and for every fit, each parameter's mean, 50 % and 94 % interval as
    distances from its NUTS mean in NUTS standard deviations, so that parameters of all scales can
    be read together. The densities are in the parameters' own units.

    Args:
        report: What ``compare_posteriors`` returned.
        var_names: Variables (``"theta"``) or single parameters (``"theta[0]"``) to show; all by
            default. Of more than 75 parameters the 75 furthest from NUTS are shown.
        max_densities: Largest number of density panels; the parameters furthest from NUTS by
            Wasserstein distance are taken. 0 leaves the densities out.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open: show it, change it, or ``plt.close`` it.

    Raises:
        TypeError: If ``report`` is not a comparison.
        ValueError: If a name in ``var_names`` is unknown, or there are more than six fits.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> z = np.random.default_rng(0).normal(size=(4, 500))
        >>> nuts = wrap({"posterior": xr.Dataset({"mu": (("chain", "draw"), z)})})
        >>> figure = plot_comparison(compare_posteriors(nuts, {"fit": nuts}))
        >>> len(figure.axes)
        2
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    if not hasattr(report, "furthest"):
        raise TypeError(
            f"plot_comparison draws what compare_posteriors returns; got {type(report).__name__}. "
            "Call plot_comparison(compare_posteriors(nuts, fits))."
        )
    if len(report.draws) > len(COLOURS):
        raise ValueError(
            f"at most {len(COLOURS) - 1} fits can be told apart in one picture; got "
            f"{len(report.draws) - 1}. Compare fewer at a time."
        )
    chosen = _choose(report.parameters, var_names)
    by_distance = [p for p in report.furthest(len(report.parameters)) if p in chosen]
    forest = [p for p in report.parameters if p in set(by_distance[:MAX_FOREST])]
    densities = by_distance[:max_densities]

    columns = -(-len(forest) // ROWS)
    rows = -(-len(forest) // columns)
    panel_columns = min(3, len(densities))
    panel_rows = -(-len(densities) // 3)
    height = max(rows * (0.16 + 0.1 * len(report.draws)), 1.35 * panel_rows, 2.0) + 1.2
    widths = [4.6 * columns, 2.4 * panel_columns]
    figure = plt.figure(figsize=(sum(widths), height), layout="constrained")
    shape = (1, 2) if densities else (1, 1)
    parts: Any = figure.subfigures(*shape, squeeze=False, width_ratios=widths[: shape[1]])
    _draw_forest(parts[0, 0], report, forest, columns)
    if densities:
        _draw_densities(parts[0, 1], report, densities, panel_columns)
    handles = [
        Line2D([], [], color=COLOURS[k], marker=MARKERS[k], ls=LINES[k], label=name)
        for k, name in enumerate(report.draws)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _choose(parameters: list[str], var_names: Sequence[str] | None) -> set[str]:
    if var_names is None:
        return set(parameters)
    wanted = [var_names] if isinstance(var_names, str) else list(var_names)
    variables = {p: p.split("[")[0] for p in parameters}
    if unknown := sorted(set(wanted) - set(parameters) - set(variables.values())):
        raise ValueError(
            f"var_names has {unknown}, which were not compared; the variables are "
            f"{sorted(set(variables.values()))}."
        )
    return {p for p, variable in variables.items() if p in wanted or variable in wanted}


def _draw_forest(
    part: SubFigure, report: PosteriorComparison, parameters: list[str], columns: int
) -> None:
    """Intervals in NUTS units, the first parameter on top."""
    index = [report.parameters.index(p) for p in parameters]
    moments = report.table.groupby("parameter", sort=False)[["nuts_mean", "nuts_sd"]].first()
    mean, sd = moments.to_numpy()[index].T
    scaled = {
        name: (draws.reshape(-1, draws.shape[-1])[:, index] - mean) / sd
        for name, draws in report.draws.items()
    }
    quantiles = {
        name: np.quantile(x, [0.03, 0.25, 0.75, 0.97], axis=0) for name, x in scaled.items()
    }
    reach = max(np.abs(q).max() for q in quantiles.values())
    limit = min(1.08 * max(reach, 2.0), LIMIT)
    rows = -(-len(parameters) // columns)
    all_axes = part.subplots(1, columns, sharex=True, squeeze=False)[0]
    for column, axes in enumerate(all_axes):
        here = slice(column * rows, (column + 1) * rows)
        for k, name in enumerate(report.draws):
            position = np.arange(len(index[here])) + (k - (len(scaled) - 1) / 2) * 0.7 / len(scaled)
            centre = scaled[name].mean(0)[here]
            _draw_intervals(axes, quantiles[name][:, here], centre, position, limit, k)
        text = [report.nuts_value(p) for p in parameters[here]]
        _dress_forest(axes, parameters[here], text, rows, limit)
    label = "distance from NUTS mean in NUTS sds\nmean, 50 % and 94 % intervals"
    part.supxlabel(label, fontsize=10)


def _draw_intervals(
    axes: Axes,
    quantiles: np.ndarray,
    centre: np.ndarray,
    position: np.ndarray,
    limit: float,
    k: int,
) -> None:
    low, first, third, high = np.clip(quantiles, -limit, limit)
    axes.hlines(position, low, high, color=COLOURS[k], lw=1.1)
    axes.hlines(position, first, third, color=COLOURS[k], lw=3.2)
    place = np.clip(centre, -limit, limit)
    for marker, size, here in (
        (MARKERS[k], 5, np.abs(centre) <= limit),
        ("<", 7, centre < -limit),
        (">", 7, centre > limit),
    ):
        if here.any():  # an empty line would take part in the layout, at the origin
            axes.plot(
                place[here],
                position[here],
                marker=marker,
                ms=size,
                color=COLOURS[k],
                ls="",
                mec="white",
                mew=0.6,
                clip_on=False,
            )


def _dress_forest(
    axes: Axes, parameters: list[str], text: list[str], rows: int, limit: float
) -> None:
    for row in range(0, len(parameters), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=-2)
    axes.axvline(0, color="#bbbbbb", lw=0.8, zorder=-1)
    axes.set(xlim=(-limit, limit), ylim=(max(rows, 1) - 0.5, -0.5))
    axes.set_yticks(range(len(parameters)), parameters)
    for row, value in enumerate(text):
        axes.annotate(
            value,
            (1, row),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center",
            color="#777777",
            fontsize=8,
        )
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title("NUTS mean ± sd", loc="right", fontsize=8, color="#777777", pad=4)


def _draw_densities(
    part: SubFigure, report: PosteriorComparison, parameters: list[str], columns: int
) -> None:
    all_axes = part.subplots(-(-len(parameters) // columns), columns, squeeze=False).ravel()
    for axes, parameter in zip(all_axes, parameters, strict=False):
        i = report.parameters.index(parameter)
        samples = [draws[..., i].ravel() for draws in report.draws.values()]
        low = min(np.quantile(x, 0.002) for x in samples)
        high = max(np.quantile(x, 0.998) for x in samples)
        peak = 0.0
        for k, sample in enumerate(samples):
            if np.ptp(sample) == 0:  # a point estimate
                axes.axvline(sample[0], color=COLOURS[k], lw=1.6, ls=LINES[k])
                continue
            grid, density = _density(sample, low, high)
            axes.plot(grid, density, color=COLOURS[k], lw=1.6, ls=LINES[k])
            if k == 0:
                peak = density.max()
                axes.fill_between(grid, density, color=COLOURS[0], alpha=0.15, lw=0)
        # A fit far too narrow would press all others to the floor.
        axes.set(xlim=(low, high), ylim=(0, min(axes.get_ylim()[1], 4 * peak)), yticks=[])
        axes.set_title(parameter, fontsize=9, pad=3)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.spines[["left", "right", "top"]].set_visible(False)
    for axes in all_axes[len(parameters) :]:
        axes.remove()
    hidden = len(report.parameters) - len(parameters)
    part.supxlabel(
        "marginal densities" + (", furthest from NUTS first" if hidden else ""), fontsize=10
    )


def _density(sample: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A smoothed histogram on ``[low, high]``, reflected at the ends, which may be hard bounds."""
    from scipy.ndimage import gaussian_filter1d

    quartiles = np.quantile(sample, [0.25, 0.75])
    spread = min(sample.std(), np.ptp(quartiles) / 1.34) or sample.std()
    bandwidth = 1.06 * spread * sample.size**-0.2  # the normal reference rule
    width = (high - low) / BINS
    counts, edges = np.histogram(sample, bins=BINS, range=(low, high))
    density = gaussian_filter1d(counts / (sample.size * width), bandwidth / width, mode="reflect")
    return (edges[:-1] + edges[1:]) / 2, density
