"""Rows of the scoreboard: read from the file, judged against the truth, and printed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.problems import short_name
from benchmarks.scoreboard_methods import METHODS
from benchmarks.scoreboard_truth import STATUSES, Confusion, Error, Truth, read_errors, whole

Row = dict[str, Any]
OURS = ("linear response", "forward", "forward spline")


def key(row: Row) -> tuple[str, str, int]:
    return row["posterior"], row["method"], row["seed"]


def read(path: Path) -> dict[tuple[str, str, int], Row]:
    """The last line of every key; a line that was cut short is left out."""
    rows: dict[tuple[str, str, int], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[key(row)] = row
    return rows


def truth(row: Row) -> Truth | None:
    """Of a row; ``None`` where there is no approximation."""
    errors = read_errors(row["parameters"])
    return whole(error.truth for error in errors.values()) if errors else None


def judged(rows: Iterable[Row]) -> Iterator[tuple[Row, Truth]]:
    """Rows that have both a verdict and a truth."""
    for row in rows:
        known = truth(row)
        if known is not None and row.get("verdict"):
            yield row, known


def judged_parameters(rows: Iterable[Row]) -> Iterator[tuple[Row, str, str, Error]]:
    """Parameters that have a verdict of their own: row, name, status, error."""
    for row in rows:
        for name, error in read_errors(row["parameters"]).items():
            status = row["parameters"][name].get("status")
            if status:
                yield row, name, status, error


# -- what is printed -------------------------------------------------------------------------------


def worst(row: Row) -> tuple[str, Error]:
    """The parameter with the largest error, and the error."""
    return max(read_errors(row["parameters"]).items(), key=lambda item: item[1].size)


def score_table(rows: Iterable[Row]) -> Table:
    table = Table(title="Errors: worst / median over parameters")
    for column in ("posterior", "method"):
        table.add_column(column, no_wrap=True)
    for column in ("mean", "log sd", "quantiles", "seconds", "judged in"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("ended", "worst parameter", "verdict", "truth"):
        table.add_column(column, no_wrap=True, max_width=26)
    last = ""
    for row in rows:
        if row["posterior"] != last:
            table.add_section()
        last = row["posterior"]
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    known, name = truth(row), short_name(row["posterior"])[:28]
    if known is None:
        blank = [""] * 3
        return [name, row["method"], *blank, f"{row['seconds']:.1f}", "", row["ended"]]
    errors = list(read_errors(row["parameters"]).values())
    mean, log_sd = [abs(e.mean) for e in errors], [e.log_sd for e in errors]
    asked = row.get("diagnose_seconds")
    at, error = worst(row)
    return [
        name,
        row["method"],
        f"{max(mean):.3f} / {np.median(mean):.3f}",
        f"{max(log_sd):.3f} / {np.median(log_sd):.3f}",
        f"{max(e.worst_quantile for e in errors):.2f}",
        f"{row['seconds']:.1f}",
        "" if asked is None else f"{asked:.1f}",
        row["ended"],
        f"{at} {error.mean:+.2f} x{error.ratio:.2f}",
        row.get("verdict") or "",
        str(known),
    ]


def confusion_table(title: str, found: dict[str, Confusion]) -> Table:
    columns = (f"{status}, {kind}" for status in STATUSES for kind in ("good", "bad"))
    table = Table("", *columns, "good ones green", title=title)
    for name, confusion in found.items():
        if confusion.count():
            share = f"{confusion.green_share:.0%}" if confusion.count(bad=False) else ""
            table.add_row(name, *confusion.cells(), share)
    return table


def print_verdicts(console: Console, rows: list[Row]) -> None:
    """Verdicts against truth, of fits and of parameters, and those that are wrong."""
    methods = [m for m in METHODS if METHODS[m].diagnose is not None]
    fits, parameters = list(judged(rows)), list(judged_parameters(rows))
    if not fits:
        return
    by_method = {"all": Confusion((row["verdict"], known) for row, known in fits)}
    by_parameter = {"all": Confusion((status, e.truth) for _, _, status, e in parameters)}
    for m in methods:
        by_method[m] = Confusion((r["verdict"], known) for r, known in fits if r["method"] == m)
        own = ((status, e.truth) for r, _, status, e in parameters if r["method"] == m)
        by_parameter[m] = Confusion(own)
    console.print(confusion_table("Fits: verdict against truth", by_method))
    console.print(confusion_table("Parameters: verdict against truth", by_parameter))

    console.print("\nBad, and green:")
    for row, known in fits:
        if known.bad and row["verdict"] == "green":
            name, error = worst(row)
            console.print(f"  {label(row)}: {known}; {describe(name, error)}")
    console.print("Parameters that are bad, and green:")
    for row, name, status, error in parameters:
        if error.truth.bad and status == "green":
            console.print(f"  {label(row)}: {error.truth}; {describe(name, error)}")
    console.print("Good, and not green:")
    for row, known in fits:
        if not known.bad and row["verdict"] != "green":
            reasons = "; ".join(row["reasons"])
            console.print(f"  {label(row)}: {row['verdict']}, {known}. {reasons}")


def label(row: Row) -> str:
    return f"{short_name(row['posterior'])}, {row['method']}"


def describe(name: str, error: Error) -> str:
    return (
        f"{name}: mean {error.mean:+.3f} ± {error.mean_se:.3f} sds, "
        f"sd x {error.ratio:.3f} ± {error.ratio_se:.3f}"
    )


def print_good(console: Console, rows: list[Row]) -> None:
    """How many fits are good, by method, and on how many posteriors one of ours is."""
    names = {row["posterior"] for row in rows}
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    good: dict[str, set[str]] = {}
    edges = dict.fromkeys(methods, 0)
    for row in rows:
        known = truth(row)
        if known is not None and not known.bad:
            good.setdefault(row["method"], set()).add(row["posterior"])
            edges[row["method"]] += known.edge
    counts = (f"{m} {len(good.get(m, ()))} ({edges[m]} edge)" for m in methods)
    console.print(f"Good of {len(names)}: " + ", ".join(counts))
    if set(OURS) <= set(methods):
        either = set().union(*(good.get(m, set()) for m in OURS))
        draws = either | good.get("forward draws", set())
        console.print(
            f"Forward or linear response good on {len(either)} of {len(names)}; with the draws of "
            f"the forward fit on {len(draws)}. Neither: {sorted(map(short_name, names - either))}."
        )
