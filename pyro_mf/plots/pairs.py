"""Pairs of parameters: the correlations that a fit has and those that it misses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.plots.style import COLOURS, LINES, check_report, choose, finish, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison

MAX_POINTS = 1500  # of NUTS in one panel
MAX_PARAMETERS = 6
MAX_CANDIDATES = 200  # parameters among which the worst correlations are looked for
SKEWED = 1.0  # skewness of a positive parameter above which its logarithm is drawn


def plot_pairs(
    report: PosteriorComparison,
    *,
    var_names: Sequence[str] | None = None,
    max_parameters: int = 4,
    path: str | Path | None = None,
) -> Figure:
    """Draw pairs of parameters: draws of NUTS, and each result's ellipses of 1 and 2 sds.

    Ellipses have the mean and the covariance of the draws. Those of a mean-field fit are upright,
    whatever the posterior. A positive parameter with a long tail is drawn as its logarithm.

    Args:
        report: What ``compare_posteriors`` returned.
        var_names: Variables (``"theta"``) or single parameters (``"theta[0]"``) to show. By default
            the parameters whose correlations some fit has most wrong.
        max_parameters: Largest number of parameters, 2 to 6.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If ``report`` is not a comparison.
        ValueError: If a name in ``var_names`` is unknown, fewer than two parameters are left, or
            there are more than six fits.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> z = np.random.default_rng(0).normal(size=(4, 500, 3))
        >>> nuts = wrap({"posterior": xr.Dataset({"mu": (("chain", "draw", "row"), z)})})
        >>> len(plot_pairs(compare_posteriors(nuts, {"fit": nuts})).axes)
        3
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_pairs")
    count = min(max(2, max_parameters), MAX_PARAMETERS)
    chosen = choose(report.parameters, var_names)
    furthest = [p for p in report.furthest(len(report.parameters)) if p in chosen]
    if len(furthest) < 2:
        raise ValueError(f"a pair needs two parameters; got {furthest}. Name more in var_names.")
    samples, names = _scaled(report, furthest[:MAX_CANDIDATES])
    worst = _worst_correlated(list(samples.values()), count)
    size = len(worst) - 1
    figure, every = plt.subplots(
        size,
        size,
        figsize=(max(2.2 * size, 4.6), 2.1 * size + 0.9),
        layout="constrained",
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for row in range(size):
        for column in range(size):
            axes = every[row, column]
            if column > row:
                axes.remove()
                continue
            pair = [worst[column], worst[row + 1]]
            _draw_pair(axes, {name: x[:, pair] for name, x in samples.items()})
            if row == size - 1:
                axes.set_xlabel(names[pair[0]], fontsize=9)
            if column == 0:
                axes.set_ylabel(names[pair[1]], fontsize=9)
    figure.align_labels()
    return finish(figure, report, path, kind="line")


def _scaled(
    report: PosteriorComparison, parameters: list[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Draws (S, K) by result, long-tailed positive parameters as logarithms, and their names."""
    index = [report.parameters.index(p) for p in parameters]
    samples = {n: d.reshape(-1, d.shape[-1])[:, index].copy() for n, d in report.draws.items()}
    names = [label(report, p) for p in parameters]
    nuts = samples["NUTS"]
    skewness = (((nuts - nuts.mean(0)) / nuts.std(0)) ** 3).mean(0)
    positive = np.all([x.min(0) > 0 for x in samples.values()], axis=0)
    for k in np.flatnonzero(positive & (skewness > SKEWED)):
        names[k] = f"log {names[k]}"
        for x in samples.values():
            x[:, k] = np.log(x[:, k])
    return samples, names


def _worst_correlated(samples: list[np.ndarray], count: int) -> list[int]:
    """Columns in which a fit's correlations are furthest from those of NUTS, taken pair by pair."""
    correlations = [_correlation(x) for x in samples]
    error = np.max([np.abs(c - correlations[0]) for c in correlations[1:]], axis=0)
    # Without an error it is the strongest correlations that are of interest.
    error = np.triu(error + 1e-3 * np.abs(correlations[0]), 1)
    found: list[int] = []
    for flat in np.argsort(-error, axis=None, kind="stable"):
        pair = divmod(int(flat), len(error))
        if pair[0] < pair[1]:
            found += [k for k in pair if k not in found]
        if len(found) >= min(count, len(error)):
            break
    return sorted(found[:count])


def _correlation(x: np.ndarray) -> np.ndarray:
    """Correlations of (S, K) draws; a constant has none."""
    sd = x.std(0)
    unit = (x - x.mean(0)) / np.where(sd > 0, sd, 1.0)
    return np.asarray(unit.T @ unit / len(x))


def _draw_pair(axes: Axes, samples: dict[str, np.ndarray]) -> None:
    nuts = samples["NUTS"]
    kept = nuts[:: max(1, -(-len(nuts) // MAX_POINTS))]
    axes.plot(*kept.T, ls="", marker=".", ms=2.5, color="#b0b0b0", mec="none", rasterized=True)
    for k, x in enumerate(samples.values()):
        for radius, width in ((1, 1.7), (2, 1.1)):
            axes.plot(*_ellipse(x, radius), color=COLOURS[k], ls=LINES[k], lw=width)
    low, high = np.quantile(nuts, [0.001, 0.999], axis=0)
    reach = 0.35 * (high - low)  # a fit far too wide would make the posterior a dot
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    axes.set(
        xlim=(max(x_low, low[0] - reach[0]), min(x_high, high[0] + reach[0])),
        ylim=(max(y_low, low[1] - reach[1]), min(y_high, high[1] + reach[1])),
    )
    axes.spines[["right", "top"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.locator_params(nbins=4)


def _ellipse(x: np.ndarray, radius: float) -> np.ndarray:
    """Points (2, n) at Mahalanobis distance ``radius`` from the mean of (S, 2) draws."""
    angle = np.linspace(0.0, 2 * np.pi, 181)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    circle = np.stack([np.cos(angle), np.sin(angle)])
    root = vectors * np.sqrt(values.clip(min=0.0))
    return np.asarray(x.mean(0)[:, None] + radius * root @ circle)
