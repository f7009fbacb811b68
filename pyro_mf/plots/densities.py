"""Marginal densities of single parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.plots.style import COLOURS, LINES, grid, label

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

    from pyro_mf.compare import PosteriorComparison

BINS = 500  # of the histogram before smoothing


def draw_densities(
    part: SubFigure, report: PosteriorComparison, parameters: list[str], columns: int
) -> None:
    """A panel per parameter, in its own unit.

    Args:
        part: Where to draw.
        report: The comparison.
        parameters: Which, in order.
        columns: Panels in a row.
    """
    for axes, parameter in zip(grid(part, len(parameters), columns), parameters, strict=True):
        i = report.parameters.index(parameter)
        samples = [draws[..., i].ravel() for draws in report.draws.values()]
        low = min(np.quantile(x, 0.002) for x in samples)
        high = max(np.quantile(x, 0.998) for x in samples)
        peak = 0.0
        for k, sample in enumerate(samples):
            if np.ptp(sample) == 0:  # a point estimate
                axes.axvline(sample[0], color=COLOURS[k], lw=1.6, ls=LINES[k])
                continue
            x, curve = density(sample, low, high)
            axes.plot(x, curve, color=COLOURS[k], lw=1.6, ls=LINES[k])
            if k == 0:
                peak = curve.max()
                axes.fill_between(x, curve, color=COLOURS[0], alpha=0.15, lw=0)
        # A fit far too narrow would press all others to the floor.
        axes.set(xlim=(low, high), ylim=(0, min(axes.get_ylim()[1], 4 * peak)), yticks=[])
        axes.set_title(label(report, parameter), fontsize=9, pad=3)
        axes.locator_params(axis="x", nbins=4)
        axes.spines["left"].set_visible(False)
    hidden = len(report.parameters) - len(parameters)
    part.supxlabel(
        "marginal densities" + (", furthest from NUTS first" if hidden else ""), fontsize=10
    )


def density(sample: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """A smoothed histogram, reflected at its ends, which may be hard bounds.

    Args:
        sample: Any number of draws.
        low: Left end.
        high: Right end.

    Returns:
        The points and the density at them.
    """
    from scipy.ndimage import gaussian_filter1d

    quartiles = np.quantile(sample, [0.25, 0.75])
    spread = min(sample.std(), np.ptp(quartiles) / 1.34) or sample.std()
    bandwidth = 1.06 * spread * sample.size**-0.2  # the normal reference rule
    width = (high - low) / BINS
    counts, edges = np.histogram(sample, bins=BINS, range=(low, high))
    curve = gaussian_filter1d(counts / (sample.size * width), bandwidth / width, mode="reflect")
    return (edges[:-1] + edges[1:]) / 2, curve
