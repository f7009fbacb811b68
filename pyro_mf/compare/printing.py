"""A comparison as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from pyro_mf.compare.report import PosteriorComparison

SHOWN = 20  # parameters in the printed table
MARK = " !"
PREDICTIONS = (
    "Predictions, over observations: average (worst); "
    "lppd and elpd of NUTS, then differences from it"
)


def render(report: PosteriorComparison) -> Group:
    """Everything that is printed, warnings before numbers.

    Args:
        report: The comparison.
    """
    parts: list[Any] = [Text(str(report.baseline))]
    parts += [Text(note, style="bold red") for note in report.notes]
    doubt = " [NUTS is doubtful]" if report.baseline.is_doubtful else ""
    title = "Error in NUTS standard deviations, ± Monte Carlo error"
    if (hidden := len(report.parameters) - SHOWN) > 0:
        title += f" (the {SHOWN} furthest apart; {hidden} more in .table)"
    if report.doubtful:
        title += f"; NUTS has not converged in parameters marked{MARK}"
    parts += [Text(title + doubt), _parameters(report)]
    parts += [Text(f"Per fit: worst parameter (median parameter){doubt}"), _worst(report.summary)]
    parts += [Text(f"Per fit, jointly{doubt}"), _jointly(report.summary)]
    if len(report.predictive):
        parts += [Text(PREDICTIONS + doubt)]
        parts += [_predictive(report.predictive)]
    return Group(*parts)


def _table(left: Sequence[str], right: Sequence[str], *, is_wide: bool = False) -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=is_wide)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _parameters(report: PosteriorComparison) -> Table:
    shown, doubtful = set(report.furthest(SHOWN)), report.doubtful
    table = _table(
        ("parameter", "NUTS mean ± sd", "fit"),
        ("mean error", "sd ratio", "Wasserstein", "(floor)"),
    )
    rows = report.table.swaplevel()
    fits = list(report.table.index.unique("fit"))
    for parameter in (p for p in report.parameters if p in shown):
        for fit in fits:
            row = rows.loc[(parameter, fit)]
            first = fit == fits[0]
            mark = MARK if parameter in doubtful else ""
            table.add_row(
                Text(parameter + mark if first else ""),
                report.nuts_value(parameter) if first else "",
                Text(fit),
                f"{row['mean_error']:+.2f} ± {row['mean_error_mcse']:.2f}",
                f"{row['sd_ratio']:.2f} ± {row['sd_ratio_mcse']:.2f}",
                f"{row['wasserstein']:.2f} ± {row['wasserstein_mcse']:.2f}",
                f"({row['wasserstein_floor']:.2f})",
            )
    return table


def _worst(summary: pd.DataFrame) -> Table:
    table = _table(
        ("fit",), ("seconds", "|mean error|", "sd ratio", "Wasserstein", "|quantile error|")
    )
    for fit, row in summary.iterrows():
        pairs = [
            f"{row[f'{measure}_worst']:.2f} ({row[f'{measure}_median']:.2f})"
            for measure in ("mean_error", "sd_ratio", "wasserstein", "quantile_error")
        ]
        table.add_row(Text(str(fit)), _number(row["seconds"]), *pairs)
    return table


def _jointly(summary: pd.DataFrame) -> Table:
    table = _table(("fit",), ("k-hat", "(good up to)", "MMD²", "(floor)", "p-value", "ELBO"))
    for fit, row in summary.iterrows():
        mark = MARK if row["pareto_k_high"] else ""
        table.add_row(
            Text(str(fit)),
            _number(row["pareto_k"], row["pareto_k_se"]) + mark,
            f"({row['pareto_k_threshold']:.2f})" if row["pareto_k_threshold"] > 0 else "",
            _number(row["mmd2"], row["mmd2_mcse"], digits=4),
            _number(row["mmd2_floor"], digits=4, form="({})"),
            _number(row["mmd2_pvalue"], digits=3),
            _number(row["elbo"], row["elbo_mcse"]),
        )
    return table


def _predictive(predictive: pd.DataFrame) -> Table:
    table = _table(
        ("site", "fit"),
        ("variance", "|mean error|", "sd ratio", "in 50 %", "in 90 %", "lppd", "elpd"),
        is_wide=True,
    )
    sites = list(dict.fromkeys(predictive.index.get_level_values("site")))
    for site in sites:
        rows = predictive.xs(site, level="site")
        for k, (fit, row) in enumerate(rows.iterrows()):
            is_fit = fit != "NUTS"
            table.add_row(
                Text(site if k == 0 else ""),
                Text(str(fit)),
                "" if math.isnan(row["variance"]) else f"{row['variance']:.3g}",
                _number(row["mean_error"]) if is_fit else "",
                _pair(row, "sd_ratio") if is_fit else "",
                _percent(row["coverage_50"]),
                _percent(row["coverage_90"]),
                _difference(row, "lppd", "mcse") if is_fit else _number(row["lppd"]),
                (_difference(row, "elpd", "se") if is_fit else _number(row["elpd"]))
                + (MARK if row["elpd_doubtful"] else ""),
            )
    return table


def _number(value: float, error: float = math.nan, *, digits: int = 2, form: str = "{}") -> str:
    """A number with its error, if it has one; nothing for NaN."""
    if math.isnan(value):
        return ""
    text = f"{value:.{digits}f}"
    known = math.isfinite(error) and math.isfinite(value)
    return form.format(f"{text} ± {error:.{digits}f}" if known else text)


def _pair(row: pd.Series, name: str) -> str:
    if math.isnan(row[name]):
        return ""
    average, worst = (
        f"{v:.2f}" if v < 10 else f"{v:.1f}" for v in (row[name], row[f"{name}_worst"])
    )
    return f"{average} ({worst})"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.0%}"


def _difference(row: pd.Series, name: str, error: str) -> str:
    difference = row[f"{name}_diff"]
    if math.isnan(difference):
        return ""
    return f"{difference:+.2f} ± {row[f'{name}_diff_{error}']:.2f}"
