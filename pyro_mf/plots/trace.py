"""How the objective went while fits were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mf.convert import generations
from pyro_mf.plots.style import ALARM, COLOURS, FAINT, grid, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 50  # values in the running median are this share's inverse of all


class Trace(NamedTuple):
    """What is known of one fit's way.

    Args:
        losses: The objective after each iteration, nats.
        stop: Why it ended, empty where unknown.
        elbo: At fresh draws, NaN where unknown.
        elbo_se: Its standard error.
    """

    losses: np.ndarray
    stop: str
    elbo: float
    elbo_se: float


def plot_trace(fits: Any, *, path: str | Path | None = None) -> Figure:
    """Draw the objective of each fit over its iterations, and where and why it stopped.

    The pale line is the objective as the solver saw it; of more than 100 iterations the strong one
    is a running median over a 50th of them. The axis is that of the second half; a start far above
    is written out. The green band is minus the ELBO at fresh draws with two standard errors, where
    it is known and of this size.

    Args:
        fits: A fit, a result for ArviZ with the group ``vi_fit``, a mapping from names to them, or
            a comparison. Fits without losses are left out, such as those by moment matching.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If ``fits`` is nothing of that.
        ValueError: If no fit has losses.

    Example:
        >>> import xarray as xr
        >>> loss = xr.Dataset({"loss": ("step", np.linspace(9.0, 1.0, 30) ** 2)})
        >>> len(plot_trace(generations.wrap({"vi_fit": loss})).axes)
        1
    """
    import matplotlib.pyplot as plt

    traces = {name: trace for name, fit in _named(fits).items() if (trace := _read(fit, name))}
    if not traces:
        raise ValueError(
            "no fit has losses to draw. Fits by moment matching have none; give from_pyro_svi the "
            "losses of your steps."
        )
    columns = min(3, len(traces))
    rows = -(-len(traces) // columns)
    figure = plt.figure(figsize=(max(3.3 * columns, 4.8), 2.5 * rows + 0.4), layout="constrained")
    for axes, (name, trace) in zip(grid(figure, len(traces), columns), traces.items(), strict=True):
        _draw(axes, name, trace)
    figure.supxlabel("iteration", fontsize=10)
    figure.supylabel("objective, nats", fontsize=10)
    return save(figure, path)


def _named(fits: Any) -> dict[str, Any]:
    if hasattr(fits, "furthest"):  # a comparison
        return {name: result for name, result in fits.results.items() if name != "NUTS"}
    if isinstance(fits, Mapping) and not generations.is_result(fits):
        return dict(fits)
    return {"": fits}


def _read(fit: Any, name: str) -> Trace | None:
    if hasattr(fit, "losses") and hasattr(fit, "stop_reason"):
        losses = np.asarray(fit.losses, float)
        return Trace(losses, fit.stop_reason, fit.elbo, fit.elbo_se) if losses.size else None
    if not generations.is_result(fit):
        raise TypeError(
            f"'{name}' has no losses: expected a fit, an InferenceData or a DataTree; got "
            f"{type(fit).__name__}."
        )
    groups = generations.groups(fit)
    vi_fit = generations.dataset(fit, "vi_fit") if "vi_fit" in groups else {}
    if "loss" not in vi_fit:
        return None
    attrs = generations.dataset(fit, "posterior").attrs if "posterior" in groups else {}
    elbo, se = (float(vi_fit[n]) if n in vi_fit else np.nan for n in ("elbo", "elbo_mcse"))
    losses = np.asarray(vi_fit["loss"].values, float).ravel()
    return Trace(losses, str(attrs.get("stop_reason", "")), elbo, se)


def _draw(axes: Axes, name: str, trace: Trace) -> None:
    losses = trace.losses
    step = np.arange(1, len(losses) + 1)
    is_long = len(losses) > 100
    axes.plot(step, losses, color=COLOURS[1], lw=0.8, alpha=0.35 if is_long else 1.0)
    if is_long:
        axes.plot(step, _running_median(losses), color=COLOURS[1], lw=1.6)
    elif len(losses) < 40:
        axes.plot(step, losses, color=COLOURS[1], ls="", marker="o", ms=3)
    corner: list[tuple[str, str]] = []
    low, high = _limits(losses)
    band = 2 * trace.elbo_se if np.isfinite(trace.elbo_se) else 0.0
    if np.isfinite(trace.elbo) and abs(-trace.elbo - losses[-1]) < 3 * (high - low):
        low = min(low, -trace.elbo - 1.5 * band)
        high = max(high, -trace.elbo + 1.5 * band)
        axes.axhspan(-trace.elbo - band, -trace.elbo + band, color=COLOURS[3], alpha=0.25, lw=0)
        axes.axhline(-trace.elbo, color=COLOURS[3], lw=1.2, ls=(0, (4, 2)))
        corner.append((f"−ELBO {-trace.elbo:.2f} ± {trace.elbo_se:.2f}", COLOURS[3]))
    margin = 0.12 * (high - low)
    axes.set_ylim(low - margin / 2, high + margin)
    if losses[0] > high + margin:
        corner.append((f"starts at {losses[0]:.4g}", FAINT))
    for line, (text, colour) in enumerate(corner):
        spot = (0.97, 0.97 - 0.1 * line)  # above the end of a curve that falls
        axes.text(
            *spot, text, ha="right", va="top", fontsize=8, color=colour, transform=axes.transAxes
        )
    bad = trace.stop not in ("", "converged")
    stop = f"{trace.stop} after {len(losses)}" if trace.stop else f"{len(losses)} iterations"
    axes.axvline(len(losses), ymax=0.75, color=ALARM if bad else FAINT, lw=1.0, ls=":")
    axes.set_title(f"{name}: {stop}" if name else stop, fontsize=9, color=ALARM if bad else "black")


def _running_median(losses: np.ndarray) -> np.ndarray:
    from scipy.ndimage import median_filter

    filtered = median_filter(losses, size=max(5, len(losses) // WINDOW), mode="reflect")
    return np.asarray(filtered)


def _limits(losses: np.ndarray) -> tuple[float, float]:
    """Around the second half, three times as high upwards, where there is anything."""
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        return 0.0, 1.0
    late = finite[len(finite) // 2 :]
    low, high = np.quantile(late, [0.002, 0.99]) if len(late) > 50 else (late.min(), late.max())
    top = max(high + 2 * (high - low), low + 1.0)
    return float(min(low, finite.min() if len(finite) < 100 else low)), float(
        min(top, max(finite.max(), low + 1e-3))
    )
