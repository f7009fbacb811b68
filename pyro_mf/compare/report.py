"""What a comparison found."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.compare.baseline import Baseline

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

WIDTH = 120  # columns of the printed tables, at most


@dataclass(frozen=True)
class PosteriorComparison:
    """What :func:`compare_posteriors` found; printing it shows the tables.

    Args:
        table: One row per fit and parameter, indexed by both. ``nuts_mean`` and ``nuts_sd`` are in
            the parameter's unit; ``mean_error`` (fit minus NUTS), ``wasserstein`` and the errors of
            the 5, 50 and 95 % quantiles (``q5_error``, ...) in NUTS standard deviations;
            ``sd_ratio`` is fit over NUTS. Each has its Monte Carlo standard error in ``*_mcse``.
            ``wasserstein_floor`` is the distance to be expected between two such samples of one and
            the same distribution. ``nuts_rhat``, ``nuts_ess_bulk`` and ``nuts_ess_tail`` are of the
            baseline, ``nuts_doubtful`` where they are too bad to believe the row.
        summary: One row per fit: ``seconds``, ``elbo`` and ``pareto_k`` with its standard error and
            threshold (NaN where the fit does not say; ``pareto_k_high`` where above), ``mmd2`` with
            error, floor and p-value, the worst and the median parameter by each measure, and
            ``nuts_doubtful``.
        predictive: One row per result and site, NUTS first. Of kind ``"predictive"`` are observed
            sites, ``"local"`` the posterior's variables with one element per observation.
            ``variance`` is the average over observations, in the site's own unit. ``mean_error`` is
            the average distance between predictive means in NUTS's predictive sds with the value to
            be expected from finite draws alone in ``mean_error_floor``, ``sd_ratio`` the root of
            the mean squared ratio of predictive sds; ``*_worst`` are those of the worst
            observation. ``coverage_50`` and ``coverage_90`` are the shares of observed values
            inside central predictive intervals, ``lppd`` the log pointwise predictive density of
            the observed data in nats, ``elpd`` that of left-out data, with the differences to NUTS
            and their errors; ``elpd_doubtful`` where k-hat is not good. NaN where unknown.
        baseline: The quality of the NUTS run.
        notes: What a reader has to know before believing the tables; also in their ``.attrs``.
        draws: Draws by name, ``"NUTS"`` first, each of shape (chain, draw, parameter).
        results: The ArviZ results that were compared, by name, ``"NUTS"`` first.
        loo_khat: By observed site and result, k-hat of the weights without each observation (500 of
            them, where there are more).
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    predictive: pd.DataFrame
    baseline: Baseline
    notes: tuple[str, ...]
    draws: dict[str, np.ndarray] = field(repr=False)
    results: dict[str, Any] = field(repr=False)
    loo_khat: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> list[str]:
        """Names of the compared parameters, in the order of the last axis of ``draws``."""
        return list(self.table.index.unique("parameter"))

    @property
    def doubtful(self) -> set[str]:
        """Parameters of which NUTS itself knows too little: R-hat above 1.05 or ESS below 100."""
        first = self.table.xs(next(iter(self.summary.index)), level="fit")
        return set(first.index[first["nuts_doubtful"]])

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
        from pyro_mf.compare.printing import render

        return render(self)
