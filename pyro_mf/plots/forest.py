"""Intervals of every parameter, in NUTS standard deviations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.plots.style import COLOURS, FAINT, MARKERS, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from pyro_mf.compare import PosteriorComparison

LIMIT = 8.0  # NUTS standard deviations; what lies beyond is drawn as an arrow at the edge


def draw_forest(
    part: SubFigure, report: PosteriorComparison, parameters: list[str], columns: int
) -> None:
    """Mean, 50 % and 94 % intervals in NUTS units, the first parameter on top.

    Args:
        part: Where to draw.
        report: The comparison.
        parameters: Which, in order.
        columns: In how many columns.
    """
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
        _dress_forest(axes, [label(report, p) for p in parameters[here]], text, rows, limit)
    caption = "distance from NUTS mean in NUTS sds\nmean, 50 % and 94 % intervals"
    part.supxlabel(caption, fontsize=10)


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
            color=FAINT,
            fontsize=8,
        )
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title("NUTS mean ± sd", loc="right", fontsize=8, color=FAINT, pad=4)
