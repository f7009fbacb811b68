"""A verdict as a picture: every parameter's two errors, and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.plots.style import FAINT, grid, save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_mf.diagnostics.diagnosis import Diagnosis

# Okabe and Ito's; shapes say the same again.
_STYLES = {"green": ("#009E73", "o"), "amber": ("#E69F00", "s"), "red": ("#D55E00", "^")}
_NAMED = 3  # parameters named in a panel
_REACH = (
    1.2,
    4.0,
)  # sds of a mean's error, and factor of an sd, beyond which points are at an edge


def plot_diagnosis(
    diagnoses: Diagnosis | Mapping[str, Diagnosis], *, path: str | Path | None = None
) -> Figure:
    """Draw the errors of every parameter against the limits of the verdict, a panel per diagnosis.

    Across, the error of the mean in posterior sds; upwards, the sd over the posterior's, on a
    logarithmic axis. Bars are two standard errors. Inside of the frame is right; a point that is
    too far out lies on the edge, hollow.

    Args:
        diagnoses: What ``diagnose`` returned, or several by name.
        path: File to write; its ending says the format.

    Returns:
        The matplotlib figure, still open.

    Raises:
        TypeError: If something else is given.
        ValueError: If the mapping is empty.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_mf import fit
        >>> def model():
        ...     pyro.sample("loc", dist.Normal(0.0, 1.0))
        >>> len(plot_diagnosis(fit(model).diagnose()).axes)
        1
    """
    import matplotlib.pyplot as plt

    panels = _as_mapping(diagnoses)
    columns = min(2 if len(panels) == 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.4 * columns + 0.4, 3.2 * rows + 0.5)
    figure = plt.figure(figsize=size, layout="constrained")
    for axes, (name, diagnosis) in zip(
        grid(figure, len(panels), columns), panels.items(), strict=True
    ):
        _draw(axes, diagnosis.parameters)
        colour, _ = _STYLES[diagnosis.status]
        axes.set_title(f"{name}: {diagnosis.status}", fontsize=10, color=colour, weight="bold")
    figure.supxlabel("error of the mean, posterior sds", fontsize=10)
    figure.supylabel("sd over the posterior's", fontsize=10)
    return save(figure, path)


def _as_mapping(diagnoses: Any) -> Mapping[str, Diagnosis]:
    panels = diagnoses if isinstance(diagnoses, Mapping) else {"": diagnoses}
    if not panels:
        raise ValueError("plot_diagnosis needs at least one diagnosis; the mapping is empty.")
    for value in panels.values():
        if not hasattr(value, "parameters") or not hasattr(value, "headline"):
            raise TypeError(
                "plot_diagnosis draws what result.diagnose() returns, or a mapping of names to "
                f"that; got {type(value).__name__}."
            )
    return {name or value.claim: value for name, value in panels.items()}


def _draw(axes: Axes, table: pd.DataFrame) -> None:
    from pyro_mf.diagnostics.errors import MAX_MEAN, MAX_SD

    far, factor = _REACH
    low, high = 1.0 - MAX_SD, 1.0 + MAX_SD
    edge, room = 1.1 * far, 1.2 * factor  # points that are too far out lie inside of the axes
    axes.set(xlim=(-edge, edge), ylim=(1.0 / room, room), yscale="log")
    box = {"xy": (-MAX_MEAN, low), "width": 2 * MAX_MEAN, "height": high - low}
    _add_box(axes, box)
    axes.set_yticks([0.25, 0.5, 1.0, 2.0, 4.0], ["¼", "½", "1", "2", "4"])
    axes.minorticks_off()
    known = table.dropna(subset=["mean_error", "sd_ratio"])
    if known.empty:
        axes.text(0, 2.5, "no draws of the posterior\nto judge by", ha="center", va="center")
        return
    x = known["mean_error"].clip(-far, far).to_numpy(float)
    y = known["sd_ratio"].clip(1.0 / factor, factor).to_numpy(float)
    is_far = (np.abs(known["mean_error"]) > far) | (np.abs(np.log(known["sd_ratio"])) > np.log(4))
    for status, (colour, marker) in _STYLES.items():
        for here, face in ((~is_far, colour), (is_far, "white")):
            chosen = np.asarray((known["status"] == status) & here)
            if not chosen.any():
                continue
            bar = 2 * known[["mean_error_se", "sd_ratio_se"]].to_numpy(float)[chosen].T
            axes.errorbar(
                x[chosen],
                y[chosen],
                xerr=bar[0],
                yerr=np.stack([np.minimum(bar[1], 0.9 * y[chosen]), bar[1]]),
                color=colour,
                marker=marker,
                mfc=face,
                ls="",
                ms=5,
                elinewidth=0.7,
            )
    _name(axes, known, x, y)


def _add_box(axes: Axes, box: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(**box, facecolor="#ededed", edgecolor=FAINT, lw=0.8, zorder=0))


def _name(axes: Axes, table: pd.DataFrame, x: np.ndarray, y: np.ndarray) -> None:
    """Name the worst that are not green, where there is room."""
    far, factor = _REACH
    spots = np.stack([x / far, np.log(y) / np.log(factor)], 1)
    order = np.argsort(-np.abs(spots).max(1), kind="stable")
    placed: list[np.ndarray] = []
    for k in order:
        if table["status"].iloc[k] == "green" or len(placed) == _NAMED:
            continue
        if any(
            np.abs(spots[k] - other)[1] < 0.14 and np.abs(spots[k] - other)[0] < 0.9
            for other in placed
        ):
            continue
        placed.append(spots[k])
        left = x[k] < 0 if abs(x[k]) < 0.5 * far else x[k] > 0  # away from the others
        axes.annotate(
            str(table.index[k]),
            (x[k], y[k]),
            (-6 if left else 6, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=7,
            color=FAINT,
        )
