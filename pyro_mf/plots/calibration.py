"""The picture of a calibration: ECDFs of the truths' posterior probabilities."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.diagnostics.calibration import LEVEL, NUM_TESTS, Calibration
from pyro_mf.diagnostics.uniformity import Band, uniform_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS, _WIDTH, _HEIGHT = 4, 2.5, 2.05
_FINE, _OUTSIDE, _BAND, _FAINT = "#0072B2", "#D55E00", "#DDE6EE", "#777777"
_LEGEND = (
    "posterior probability below the truth",
    "Above the band: posteriors too high.  Below: too low.",
    "First above, then below: too narrow.  First below, then above: too wide.",
)
_MAX_NAME = 24  # letters of a title


def plot_calibration(
    calibration: Calibration,
    *,
    var_names: Sequence[str] | None = None,
    max_panels: int = 12,
    path: str | Path | None = None,
) -> Figure:
    """Draw by how much the ECDF of each parameter differs from that of a uniform.

    The bands hold each curve at the level that the verdicts ask of each of three tests of every
    parameter: all curves at once, shown or not, with a probability of more than 95 % where all
    parameters are calibrated.

    Args:
        calibration: What ``calibrate`` returned.
        var_names: Variables (``"theta"``) or single parameters (``"theta[0]"``) to show; all by
            default.
        max_panels: Largest number of panels; the worst parameters are taken, worst first.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open: show it, change it, or ``plt.close`` it.

    Raises:
        TypeError: If ``calibration`` is none.
        ValueError: If a name in ``var_names`` is unknown, or ``max_panels`` is less than 1.

    Example:
        >>> found = Calibration(["a", "b"], np.random.default_rng(0).random((100, 2)))
        >>> len(plot_calibration(found).axes)
        2

    References:
        Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete uniformity and its
        applications, https://arxiv.org/abs/2103.10522
    """
    import matplotlib.pyplot as plt

    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"plot_calibration draws what calibrate returns; got {type(calibration).__name__}."
        )
    if max_panels < 1:
        raise ValueError(f"max_panels must be at least 1; got {max_panels}.")
    chosen = _choose(calibration.parameters, var_names)
    everything = calibration.worst(len(calibration.parameters))
    shown = [name for name in everything if name in chosen][:max_panels]
    columns = min(_COLUMNS, len(shown)) if len(shown) != 5 else 3
    rows = math.ceil(len(shown) / columns)
    size = (max(_WIDTH * columns, 5.0) + 0.4, _HEIGHT * rows + 1.4)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    probability = 1.0 - LEVEL / (NUM_TESTS * len(calibration.parameters))
    band = uniform_band(calibration.num_simulations, probability)
    panels = grid.ravel()
    for axes, name in zip(panels, shown, strict=False):
        _draw_panel(axes, calibration, name, band)
    for k in range(len(shown), len(panels)):
        panels[k].remove()
        if k >= columns:  # the panel above is the last of its column
            panels[k - columns].tick_params(labelbottom=True)
    _label(figure, calibration, len(shown), columns)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_panel(axes: Axes, calibration: Calibration, name: str, band: Band) -> None:
    values = np.sort(calibration.probabilities[:, calibration.parameters.index(name)])
    points = np.concatenate([[0.0], band.points, [1.0]])
    lower, upper = (
        np.concatenate([[0.0], x - band.points, [0.0]]) for x in (band.lower, band.upper)
    )
    ecdf = np.searchsorted(values, points, side="right") / len(values)
    ecdf[0], ecdf[-1] = 0.0, 1.0
    difference = ecdf - points
    axes.fill_between(points, lower, upper, color=_BAND, lw=0, zorder=0)
    axes.axhline(0.0, color="white", lw=1.0, zorder=1)
    is_outside = (difference < lower - 1e-12) | (difference > upper + 1e-12)
    axes.plot(points, difference, color=_FINE, lw=1.4, zorder=2)
    axes.plot(
        points, np.where(_widened(is_outside), difference, np.nan), color=_OUTSIDE, lw=2.2, zorder=3
    )
    row = calibration.table.loc[name]
    is_fault = row["verdict"] not in ("fine", "cannot tell")
    axes.set_title(_shortened(name), fontsize=9, loc="left", pad=26, fontweight="bold")
    axes.text(
        0.0,
        1.03,
        f"{row['verdict']}\nbias {row['bias']:+.2f}, sd ratio {row['sd_ratio']:.2f}",
        transform=axes.transAxes,
        fontsize=7.5,
        color=_OUTSIDE if is_fault else _FAINT,
    )
    axes.set(xlim=(0.0, 1.0), xticks=[0.0, 0.25, 0.5, 0.75, 1.0])
    axes.set_xticklabels(["0", "", "0.5", "", "1"])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _widened(outside: np.ndarray) -> np.ndarray:
    """Neighbours as well, so that a single point makes a visible piece of line."""
    found: np.ndarray = outside.copy()
    found[1:] |= outside[:-1]
    found[:-1] |= outside[1:]
    return found


def _label(figure: Figure, calibration: Calibration, num_shown: int, columns: int) -> None:
    hidden = len(calibration.parameters) - num_shown
    title = f"{calibration.approximation}: {calibration.verdict}"
    count = f"{calibration.num_simulations} simulations"
    if calibration.failures:
        count += f", {len(calibration.failures)} more failed"
    if calibration.is_interrupted:
        count += ", interrupted"
    if hidden:
        count += f"; {num_shown} of {len(calibration.parameters)} parameters shown, worst first"
    lines = [_wrapped(title, columns), _wrapped(count, columns)]
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.supylabel("ECDF minus uniform", fontsize=9)
    figure.supxlabel("\n".join(_LEGEND), fontsize=8.5, linespacing=1.4)


def _shortened(name: str) -> str:
    """A name without its middle, where the index is what tells it from others."""
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[: _MAX_NAME // 2 - 1]}…{name[-_MAX_NAME // 2 :]}"


def _wrapped(text: str, columns: int) -> str:
    return textwrap.fill(" ".join(text.split()), max(60, 38 * columns))


def _choose(parameters: list[str], var_names: Sequence[str] | None) -> set[str]:
    if var_names is None:
        return set(parameters)
    wanted: Any = [var_names] if isinstance(var_names, str) else list(var_names)
    known = set(parameters) | {name.split("[")[0] for name in parameters}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown parameters {unknown}; there are {sorted(known)}.")
    return {name for name in parameters if name in wanted or name.split("[")[0] in wanted}
