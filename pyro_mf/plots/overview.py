"""The overview of a comparison: all parameters at once, and those that differ most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_mf.plots.densities import draw_densities
from pyro_mf.plots.forest import draw_forest
from pyro_mf.plots.style import check_report, choose, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison

ROWS = 25  # parameters in one column of the forest
MAX_FOREST = 3 * ROWS


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

    Every picture of a comparison says in its head where the NUTS run is doubtful, and marks with
    ``(!)`` the parameters whose chains have not converged.

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
        >>> import numpy as np, xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> z = np.random.default_rng(0).normal(size=(4, 500))
        >>> nuts = wrap({"posterior": xr.Dataset({"mu": (("chain", "draw"), z)})})
        >>> figure = plot_comparison(compare_posteriors(nuts, {"fit": nuts}))
        >>> len(figure.axes)
        2
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_comparison")
    chosen = choose(report.parameters, var_names)
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
    draw_forest(parts[0, 0], report, forest, columns)
    if densities:
        draw_densities(parts[0, 1], report, densities, panel_columns)
    return finish(figure, report, path)
