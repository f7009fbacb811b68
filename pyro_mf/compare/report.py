"""What a comparison found, and how it is printed."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group
    from rich.table import Table

MAX_RHAT = 1.05
MIN_ESS = 100
SHOWN = 20  # parameters in the printed table
WIDTH = 120  # columns of the printed table, at most


@dataclass(frozen=True)
class Baseline:
    """How far the NUTS run itself can be trusted.

    Args:
        chains: Number of chains.
        draws: Draws per chain.
        max_rhat: Largest rank-normalised split R-hat of any parameter; NaN with one chain.
        min_ess: Smallest bulk effective sample size of any parameter.
        divergences: Number of divergent transitions; ``None`` where they were not recorded.
        seconds: Wall time of the run; ``None`` where it was not recorded.
    """

    chains: int
    draws: int
    max_rhat: float
    min_ess: float
    divergences: int | None
    seconds: float | None

    def warnings(self) -> list[str]:
        """One line for each reason not to take this run for the truth."""
        lines = []
        if self.max_rhat > MAX_RHAT:
            lines.append(f"the chains disagree: R-hat is {self.max_rhat:.2f} (> {MAX_RHAT})")
        if self.chains == 1:
            lines.append("there is one chain, so R-hat cannot be computed")
        if self.divergences:
            lines.append(f"{self.divergences} transitions diverged")
        if self.min_ess < MIN_ESS:
            lines.append(f"the smallest effective sample size is {self.min_ess:.0f} (< {MIN_ESS})")
        return [f"The NUTS baseline is doubtful: {line}." for line in lines]


@dataclass(frozen=True)
class PosteriorComparison:
    """What :func:`compare_posteriors` found; printing it shows the tables.

    Args:
        table: One row per fit and parameter, indexed by both. ``nuts_mean`` and ``nuts_sd`` are in
            the parameter's unit; ``mean_error`` (fit minus NUTS) and ``wasserstein`` in NUTS
            standard deviations; ``sd_ratio`` is fit over NUTS. Each has its Monte Carlo standard
            error in ``*_mcse``. ``wasserstein_floor`` is the distance to be expected between two
            such samples of one and the same distribution.
        summary: One row per fit: ``seconds``, ``pareto_k`` and ``elbo`` (NaN where the fit does not
            say), and the worst and the median parameter by each measure.
        baseline: The quality of the NUTS run.
        notes: What a reader has to know before believing the tables.
        draws: Draws by name, ``"NUTS"`` first, each of shape (chain, draw, parameter).
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    baseline: Baseline
    notes: tuple[str, ...]
    draws: dict[str, np.ndarray] = field(repr=False)

    @property
    def parameters(self) -> list[str]:
        """Names of the compared parameters, in the order of the last axis of ``draws``."""
        return list(self.table.index.unique("parameter"))

    def furthest(self, count: int) -> list[str]:
        """The parameters that some fit has most wrong, by Wasserstein distance, worst first.

        Args:
            count: At most that many.
        """
        distance = self.table["wasserstein"].groupby("parameter", sort=False).max()
        return list(distance.sort_values(ascending=False, kind="stable").index[:count])

    def nuts_value(self, parameter: str) -> str:
        """Mean and standard deviation under NUTS, to two digits of the latter.

        Args:
            parameter: Its name.
        """
        mean, sd = self.table.xs(parameter, level="parameter")[["nuts_mean", "nuts_sd"]].iloc[0]
        digits = 1 - math.floor(math.log10(sd))
        if digits > 5 or digits < -4:
            return f"{mean:.3g} ± {sd:.2g}"
        decimals = max(digits, 0)
        return f"{round(mean, digits):.{decimals}f} ± {round(sd, digits):.{decimals}f}"

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich__(self) -> Group:
        """The tables for ``rich.print``."""
        from rich.console import Group
        from rich.text import Text

        base = self.baseline
        head = f"NUTS: {base.chains} chains of {base.draws} draws"
        head += f", max R-hat {base.max_rhat:.3f}, min ESS {base.min_ess:.0f}"
        if base.divergences is not None:
            head += f", {base.divergences} divergences"
        if base.seconds is not None:
            head += f", {base.seconds:.1f} s"
        notes = [Text(note, style="bold red") for note in self.notes]
        title = "Error in NUTS standard deviations, ± Monte Carlo error"
        if (hidden := len(self.parameters) - SHOWN) > 0:
            title += f" (the {SHOWN} furthest apart; {hidden} more in .table)"
        fit_title = "Per fit: worst parameter (median parameter)"
        fits = self._fit_table()
        return Group(Text(head), *notes, Text(title), self._parameter_table(), fit_title, fits)

    def _parameter_table(self) -> Table:
        shown = set(self.furthest(SHOWN))
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD)
        for name in ("parameter", "NUTS mean ± sd", "fit"):
            table.add_column(name, no_wrap=True)
        for name in ("mean error", "sd ratio", "Wasserstein", "(floor)"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = self.table.swaplevel()
        fits = list(self.table.index.unique("fit"))
        for parameter in (p for p in self.parameters if p in shown):
            for fit in fits:
                row = rows.loc[(parameter, fit)]
                first = fit == fits[0]
                table.add_row(
                    Text(parameter if first else ""),
                    self.nuts_value(parameter) if first else "",
                    Text(fit),
                    f"{row['mean_error']:+.2f} ± {row['mean_error_mcse']:.2f}",
                    f"{row['sd_ratio']:.2f} ± {row['sd_ratio_mcse']:.2f}",
                    f"{row['wasserstein']:.2f} ± {row['wasserstein_mcse']:.2f}",
                    f"({row['wasserstein_floor']:.2f})",
                )
        return table

    def _fit_table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD)
        table.add_column("fit", no_wrap=True)
        for name in ("seconds", "k-hat", "|mean error|", "sd ratio", "Wasserstein"):
            table.add_column(name, justify="right", no_wrap=True)
        for fit, row in self.summary.iterrows():
            pairs = [
                f"{row[f'{measure}_worst']:.2f} ({row[f'{measure}_median']:.2f})"
                for measure in ("mean_error", "sd_ratio", "wasserstein")
            ]
            known = [
                "" if np.isnan(row[name]) else f"{row[name]:.2f}"
                for name in ("seconds", "pareto_k")
            ]
            table.add_row(Text(str(fit)), *known, *pairs)
        return table
