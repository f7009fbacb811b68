"""How a verdict is printed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from pyro_mf.diagnostics.diagnosis import Diagnosis

_WIDTH = 100
_SHOWN = 12  # parameters in the printed table
_STYLES = {"green": "bold green", "amber": "bold yellow", "red": "bold red", None: ""}


def as_text(diagnosis: Diagnosis) -> str:
    """The report without colours."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(diagnosis)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def as_group(diagnosis: Diagnosis) -> Group:
    """The report for a rich console."""
    from rich.console import Group
    from rich.text import Text

    style = _STYLES[diagnosis.status]
    head = Text(f"{diagnosis.status.upper()}: ", style=style) + Text(diagnosis.headline)
    advice = [Text(f"- {line}") for line in diagnosis.advice]
    parts: list[Text | Table] = [head]
    if advice:
        parts += [Text("What to do:", style="bold"), *advice]
    parts.append(_checks(diagnosis))
    if diagnosis.parameters["mean_error"].notna().any():
        parts.append(_parameters(diagnosis))
    cost = f"{diagnosis.num_gradients} gradients, {diagnosis.seconds:.1f} s"
    parts.append(Text(f"The diagnosis took {cost}."))
    return Group(*parts)


def _checks(diagnosis: Diagnosis) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what it found")
    for check in diagnosis.checks:
        status = Text(check.status or "", style=_STYLES[check.status])
        table.add_row(Text(check.name), status, Text(check.finding))
    return table


def _parameters(diagnosis: Diagnosis) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    frame = diagnosis.parameters
    badness = frame["mean_error"].abs().fillna(9e9) + (frame["sd_ratio"] - 1.0).abs().fillna(9e9)
    shown = set(badness.sort_values(ascending=False, kind="stable").index[:_SHOWN])
    hidden = len(frame) - len(shown)
    title = "Errors in posterior sds, ± standard error"
    title += f" (the {_SHOWN} worst; {hidden} more in .parameters)" if hidden > 0 else ""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    table.add_column("parameter", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("mean", "sd", "mean error", "sd ratio", "k-hat"):
        table.add_column(name, justify="right", no_wrap=True)
    for parameter, row in frame[frame.index.isin(shown)].iterrows():
        table.add_row(
            Text(str(parameter)),
            Text(row["status"], style=_STYLES[row["status"]]),
            f"{row['mean']:.3g}",
            f"{row['sd']:.2g}",
            f"{row['mean_error']:+.2f} ± {row['mean_error_se']:.2f}",
            f"{row['sd_ratio']:.2f} ± {row['sd_ratio_se']:.2f}",
            "" if row["khat"] != row["khat"] else f"{row['khat']:.2f}",
        )
    return table
