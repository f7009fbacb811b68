"""What all pictures share: colours, names, warnings, and how they end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
FAINT, ALARM = "#777777", "#B00020"
MARK = " (!)"  # behind a parameter that NUTS itself knows too little of


def check_report(report: Any, function: str) -> None:
    """Refuse what cannot be drawn.

    Args:
        report: What should be a comparison.
        function: Who asks.

    Raises:
        TypeError: If it is none.
        ValueError: If there are more fits than colours.
    """
    if not hasattr(report, "furthest"):
        raise TypeError(
            f"{function} draws what compare_posteriors returns; got {type(report).__name__}. "
            f"Call {function}(compare_posteriors(nuts, fits))."
        )
    if len(report.draws) > len(COLOURS):
        raise ValueError(
            f"at most {len(COLOURS) - 1} fits can be told apart in one picture; got "
            f"{len(report.draws) - 1}. Compare fewer at a time."
        )


def choose(parameters: list[str], var_names: Sequence[str] | None) -> set[str]:
    """The parameters that are named, whole variables by their own name.

    Args:
        parameters: All there are.
        var_names: Variables or parameters; ``None`` for all.

    Raises:
        ValueError: If a name is unknown.
    """
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


def label(report: PosteriorComparison, parameter: str) -> str:
    """A parameter's name, marked where NUTS itself has not converged.

    Args:
        report: The comparison.
        parameter: Its name.
    """
    return parameter + MARK if parameter in report.doubtful else parameter


def grid(figure: Any, count: int, columns: int) -> list[Axes]:
    """Axes for ``count`` panels in rows, without the frames that say nothing.

    Args:
        figure: A figure or a part of one.
        count: Number of panels.
        columns: Panels in a row, at most.
    """
    columns = min(columns, count)
    every = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for axes in every[count:]:
        axes.remove()
    for axes in every[:count]:
        axes.spines[["right", "top"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return list(every[:count])


def finish(
    figure: Figure,
    report: PosteriorComparison,
    path: str | Path | None,
    names: Sequence[str] | None = None,
    kind: str = "both",
) -> Figure:
    """Name the results, warn of the baseline, and write the file.

    Args:
        figure: With a constrained layout.
        report: The comparison.
        path: File to write, if any.
        names: Results that are drawn; all by default.
        kind: ``"line"``, ``"marker"`` or ``"both"``.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[k],
            marker="" if kind == "line" else MARKERS[k],
            ls="" if kind == "marker" else LINES[k],
            label=name,
        )
        for k, name in enumerate(report.draws)
        if names is None or name in names
    ]
    width = int(13 * figure.get_figwidth())  # characters in a line of the picture
    lengths = [8 + len(str(handle.get_label())) for handle in handles]
    columns = len(handles) if sum(lengths) <= width else max(1, width // max(lengths))
    columns = -(-len(handles) // -(-len(handles) // columns))  # as few rows, evenly filled
    legend = figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False
    )
    if reasons := report.baseline.reasons():
        # A legend's title takes part in the layout; one of the figure would lie over the legend.
        warning = f"NUTS is doubtful: {'; '.join(reasons)}"
        for sign in "<>":  # which belongs to its number
            warning = warning.replace(f"{sign} ", f"{sign}\u00a0")
        warning = textwrap.fill(warning, width)
        legend.set_title(warning)
        legend.get_title().set(color=ALARM, fontsize=9, fontweight="bold", ha="center")
    return save(figure, path)


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Write a picture, if a path is given, and return it.

    Args:
        figure: The picture.
        path: File to write; its ending says the format.
    """
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
