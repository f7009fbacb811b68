"""The tail of importance weights, whose index is k-hat."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.plots.style import ALARM, COLOURS, FAINT, check_report, finish, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_mf.compare import PosteriorComparison
    from pyro_mf.weights import PSISResult

MIN_WEIGHTS = 25
COLUMNS = 5  # panels in a row, at most
VERY_BAD = 1.0


def plot_khat(report: PosteriorComparison, *, path: str | Path | None = None) -> Figure:
    """Draw each fit's importance weights, largest first, and k-hat of each observation's.

    Above, per fit: the log weights of its draws by rank, and the Pareto tail fitted to the largest.
    A tail that falls steeply (a small k-hat) means that averages under the weights settle; one that
    rises to a few huge weights means that the fit misses a part of the posterior. Below, where
    there is a log likelihood: k-hat of every observation's leave-one-out weights, NUTS among them,
    with values above the threshold in red.

    Args:
        report: What ``compare_posteriors`` returned.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If ``report`` is not a comparison.
        ValueError: If no result has log weights or a log likelihood, or there are more than six
            fits.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.compare import compare_posteriors
        >>> from pyro_mf.convert.generations import wrap
        >>> dims, noise = ("chain", "draw"), np.random.default_rng(0).normal(size=(2, 4, 500))
        >>> stats = xr.Dataset({"log_weight": (dims, 0.1 * noise[1])})
        >>> draws = {"posterior": xr.Dataset({"mu": (dims, noise[0])}), "sample_stats": stats}
        >>> fit = wrap(draws)
        >>> len(plot_khat(compare_posteriors(fit, {"fit": fit})).axes) > 0
        True

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling,
        https://arxiv.org/abs/1507.02646
    """
    import matplotlib.pyplot as plt

    check_report(report, "plot_khat")
    fits = {name: result for name, result in report.results.items() if name != "NUTS"}
    weights = {n: w for n, r in fits.items() if (w := _log_weights(r)) is not None}
    points = {
        (name, site): khat
        for site, found in report.loo_khat.items()
        for name, khat in found.items()
    }
    if not weights and not points:
        raise ValueError(
            "no result has log weights or a log likelihood; convert fits with from_pyro_svi or "
            "to_arviz, and leave log_likelihood=True."
        )
    sizes = len(weights), len(points)
    rows = [-(-size // COLUMNS) for size in sizes]
    columns = max(-(-size // r) for size, r in zip(sizes, rows, strict=True) if r)
    figure = plt.figure(
        figsize=(max(2.7 * columns, 5.0), 2.4 * sum(rows) + 1.0), layout="constrained"
    )
    heights = [r for r in rows if r]
    parts: Any = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    order = list(report.draws)
    if weights:
        for axes, (name, log_weights) in zip(
            grid(parts[0], len(weights), columns), weights.items(), strict=True
        ):
            _draw_weights(axes, name, log_weights, order.index(name), report.summary.loc[name])
        parts[0].supxlabel("rank of the draw", fontsize=9)
        parts[0].supylabel("log weight, from the largest", fontsize=9)
    if points:
        part, several = parts[-1], len(report.loo_khat) > 1
        for axes, ((name, site), khat) in zip(
            grid(part, len(points), columns), points.items(), strict=True
        ):
            good = good_khat(report.draws[name][..., 0].size)
            _draw_points(axes, khat, order.index(name), good)
            title = f"{name}, {site}" if several else name
            bad = int((~(khat <= good)).sum())
            axes.set_title(
                f"{title}\n{bad} of {len(khat)} above {good:.2f}",
                fontsize=9,
                color=ALARM if bad else "black",
            )
        part.supxlabel("observation", fontsize=9)
        part.supylabel("k-hat without it", fontsize=9)
    return finish(figure, report, path, kind="marker")


def _log_weights(result: Any) -> np.ndarray | None:
    """Usable log weights of a result, relative to the largest."""
    from pyro_mf.convert import generations

    if "sample_stats" not in generations.groups(result):
        return None
    stats = generations.dataset(result, "sample_stats")
    if "log_weight" not in stats:
        return None
    values = np.asarray(stats["log_weight"].values, float).ravel()
    if values.size < MIN_WEIGHTS or np.isnan(values).any() or not np.isfinite(values.max()):
        return None
    return np.asarray(values - values.max())


def _draw_weights(axes: Axes, name: str, log_weights: np.ndarray, k: int, row: Any) -> None:
    import torch

    from pyro_mf.weights import psis

    ordered = np.sort(log_weights)[::-1]
    rank = np.arange(1, len(ordered) + 1)
    axes.plot(rank, ordered, ls="", marker=".", ms=3.5, color=COLOURS[k], mec="none")
    smoothed: PSISResult = psis(torch.as_tensor(log_weights.copy()))
    tail = int(np.ceil(min(len(ordered) / 5, 3 * np.sqrt(len(ordered)))))
    if np.isfinite(smoothed.khat):
        fitted = np.sort(smoothed.log_weights.numpy())[::-1]
        # Outside the tail smoothing only adds a constant.
        fitted = fitted[:tail] - fitted[-1] + ordered[-1] if np.isfinite(ordered[-1]) else fitted
        axes.plot(rank[:tail], fitted[:tail], color="black", lw=1.3)
        axes.axvline(tail, color=FAINT, lw=0.7, ls=":")
    khat, threshold = smoothed.khat, smoothed.threshold
    bad = not khat <= threshold
    text = f"{name}: k-hat {khat:.2f}"
    if np.isfinite(khat):
        text += f" ± {smoothed.khat_se:.2f}"
    axes.set_title(f"{text}\n(good up to {threshold:.2f})", fontsize=9, color=ALARM if bad else "k")
    axes.set_xscale("log")
    # Three times as deep as the tail; what is below hardly counts.
    spread = max(-3 * ordered[min(tail, len(ordered) - 1)], 3.0)
    axes.set_ylim(-spread, 0.06 * spread)


def good_khat(num_draws: int) -> float:
    """The largest k-hat at which averages over that many draws settle (Vehtari et al. 2024).

    Args:
        num_draws: At least 2.
    """
    return min(1.0 - 1.0 / math.log10(num_draws), 0.7)


def _draw_points(axes: Axes, khat: np.ndarray, k: int, good: float) -> None:
    bad = ~(khat <= good)
    index = np.arange(len(khat))
    finite = np.where(np.isfinite(khat), khat, np.nan)
    axes.plot(index, finite, ls="", marker=".", ms=5, color=COLOURS[k], mec="none")
    axes.plot(index[bad], finite[bad], ls="", marker="o", ms=5, color=ALARM, mec="white", mew=0.5)
    axes.axhline(good, color=FAINT, lw=0.9, ls="--")
    top = np.nanmax(finite, initial=VERY_BAD)
    axes.set_ylim(min(np.nanmin(finite, initial=0.0), 0.0) - 0.08, top + 0.12)
