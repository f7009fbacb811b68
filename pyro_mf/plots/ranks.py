"""Where a fit's draws fall among those of NUTS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.plots.style import COLOURS, LINES, check_report, choose, finish, grid, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison

# Quantile of the supremum of a Brownian bridge: Kolmogorov and Smirnov's, at 95 %.
SUPREMUM = 1.358
POINTS = np.linspace(0.0, 1.0, 201)


def plot_ranks(
    report: PosteriorComparison,
    *,
    var_names: Sequence[str] | None = None,
    max_panels: int = 12,
    path: str | Path | None = None,
) -> Figure:
    """Draw, per parameter, how much more of a fit lies below each quantile of NUTS.

    The curve is the share of the fit's draws below the NUTS quantile u, minus u: zero where the fit
    is right. An arch means that the fit lies too low, a dip too high; up and then down that it is
    too wide, down and then up too narrow. Curves inside the grey band are what finite draws of one
    distribution give in 95 of 100 parameters (Kolmogorov and Smirnov, with NUTS's effective sample
    size and the fewest draws of any fit).

    Args:
        report: What ``compare_posteriors`` returned.
        var_names: Variables (``"theta"``) or single parameters (``"theta[0]"``) to show; all by
            default.
        max_panels: Largest number of panels, at least 1; the parameters furthest from NUTS are
            taken.
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
        >>> len(plot_ranks(compare_posteriors(nuts, {"fit": nuts})).axes)
        1

    References:
        Säilynoja, Bürkner and Vehtari (2022), Graphical Test for Discrete Uniformity and Its
        Applications in Goodness-of-Fit Evaluation and Multiple Sample Comparison,
        https://arxiv.org/abs/2103.10522
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_ranks")
    chosen = choose(report.parameters, var_names)
    furthest = report.furthest(len(report.parameters))
    parameters = [p for p in furthest if p in chosen][: max(1, max_panels)]
    columns = min(4, len(parameters))
    rows = -(-len(parameters) // columns)
    figure = plt.figure(figsize=(max(2.5 * columns, 5.0), 1.7 * rows + 1.3), layout="constrained")
    fewest = min(draws[..., 0].size for draws in report.draws.values())
    ess = report.table["nuts_ess_bulk"].groupby("parameter").first()
    for axes, parameter in zip(grid(figure, len(parameters), columns), parameters, strict=True):
        i = report.parameters.index(parameter)
        band = SUPREMUM * np.sqrt(1 / fewest + 1 / ess[parameter])
        axes.axhspan(-band, band, color="#e4e4e4", lw=0)
        axes.axhline(0, color=COLOURS[0], lw=0.8)
        nuts = np.quantile(report.draws["NUTS"][..., i], POINTS)
        for k, (name, draws) in enumerate(report.draws.items()):
            if name != "NUTS":
                curve = share_below(draws[..., i].ravel(), nuts) - POINTS
                axes.plot(POINTS, curve, color=COLOURS[k], ls=LINES[k], lw=1.6)
        reach = max(1.15 * np.abs(axes.get_ylim()).max(), 2 * band)
        axes.set(xlim=(0, 1), ylim=(-reach, reach), xticks=[0, 0.5, 1])
        axes.set_title(label(report, parameter), fontsize=9, pad=3)
        axes.locator_params(axis="y", nbins=5)
    figure.supxlabel("quantile u under NUTS", fontsize=10)
    figure.supylabel("share of the fit below it − u", fontsize=10)
    return finish(figure, report, path, [n for n in report.draws if n != "NUTS"], "line")


def share_below(sample: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The empirical distribution function of a sample; ties, as of point estimates, count half.

    Args:
        sample: Any number of draws.
        points: Where it is wanted, ascending.
    """
    ordered = np.sort(sample)
    below = np.searchsorted(ordered, points, side="left")
    return np.asarray((below + np.searchsorted(ordered, points, side="right")) / (2 * sample.size))
