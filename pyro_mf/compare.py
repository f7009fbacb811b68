r"""An approximate posterior against NUTS, parameter by parameter, each figure with its own error.

All distances are in posterior standard deviations as NUTS sees them. Draws of an approximation are
independent; draws of NUTS count for as much as their effective sample size says.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.convert import generations
from pyro_mf.convert.aligned import align_draws

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group
    from rich.table import Table

MIN_DRAWS = 100
MAX_RHAT = 1.05
SHOWN = 20  # parameters in the printed table
WIDTH = 120  # columns of the printed table, at most
TINY = np.finfo(float).tiny


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
        if self.min_ess < MIN_DRAWS:
            lines.append(
                f"the smallest effective sample size is {self.min_ess:.0f} (< {MIN_DRAWS})"
            )
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
                    f"{row['nuts_mean']:.3g} ± {row['nuts_sd']:.2g}" if first else "",
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


def compare_posteriors(nuts: Any, fits: Mapping[str, Any]) -> PosteriorComparison:
    r"""Compare approximate posteriors with NUTS, for every scalar parameter that they share.

    With :math:`m, s` mean and standard deviation of a parameter, a fit has the *mean error*
    :math:`(m_q - m_p) / s_p`, the *sd ratio* :math:`s_q / s_p` and the marginal 1-Wasserstein
    distance :math:`\int |F_q - F_p| / s_p`.

    The Monte Carlo errors are those of means, by the delta method. For the Wasserstein distance the
    mean is that of its dual potential :math:`\phi`, :math:`W_1 = E_q \phi - E_p \phi` with
    :math:`\phi' = \operatorname{sign}(F_p - F_q)`. Being a distance, it is above zero also between
    two samples of one distribution; the ``wasserstein_floor`` is its expectation there,
    :math:`\sqrt{(1/n_q + 1/n_p) 2 / \pi} \int \sqrt{F_p (1 - F_p)} / s_p`, with effective sample
    sizes :math:`n`. A distance near its floor says that more draws are needed to see a difference.

    Args:
        nuts: The baseline: an ``InferenceData``, a ``DataTree``, or an object with ``to_arviz()``.
        fits: What is compared with it, by name; entries as for ``nuts``. Draws of an entry count as
            independent unless its posterior has the attribute ``is_approximate = 0``.

    Returns:
        The comparison; print it, or read ``.table`` and ``.summary``.

    Raises:
        TypeError: If an argument is not a result.
        ValueError: If there is no fit, no shared variable, or too few draws; if shapes differ, or
            draws are not finite.

    Example:
        >>> import xarray as xr
        >>> from pyro_mf.convert.generations import wrap
        >>> def result(scale):
        ...     z = scale * np.random.default_rng(0).normal(size=(4, 500))
        ...     return wrap({"posterior": xr.Dataset({"mu": (("chain", "draw"), z)})})
        >>> report = compare_posteriors(result(1.0), {"narrow": result(0.5)})
        >>> report.table["sd_ratio"].round(6).tolist()
        [0.5]

    References:
        Panaretos and Zemel (2019), Statistical Aspects of Wasserstein Distances,
        https://arxiv.org/abs/1806.05500
    """
    import pandas as pd

    if generations.is_result(fits) or not isinstance(fits, Mapping) or not fits:
        raise ValueError(
            "fits must be a mapping with at least one entry, such as {'reverse': result}; got "
            f"{type(fits).__name__}. Give each fit a name."
        )
    if "NUTS" in fits:
        raise ValueError("a fit is called 'NUTS', as the baseline is. Give it another name.")
    results = {"NUTS": _as_result(nuts, "NUTS")}
    results |= {name: _as_result(fit, name) for name, fit in fits.items()}
    aligned = align_draws(results, min_draws=MIN_DRAWS).varying()
    draws = aligned.draws
    baseline = _baseline(results["NUTS"], draws["NUTS"])
    reference = _Moments.of(draws["NUTS"], independent=False)
    tables, summaries = {}, {}
    for name in fits:
        q = _Moments.of(draws[name], independent=_is_approximate(results[name]))
        tables[name] = _measure(reference, q, aligned.parameters)
        summaries[name] = _summarise(tables[name], results[name])
    return PosteriorComparison(
        table=pd.concat(tables, names=["fit"]),
        summary=pd.DataFrame.from_dict(summaries, orient="index").rename_axis("fit"),
        baseline=baseline,
        notes=(*baseline.warnings(), *aligned.notes),
        draws=draws,
    )


@dataclass(frozen=True)
class _Moments:
    """Mean and sd per parameter with the variances of their estimates; arrays of shape (P,)."""

    draws: np.ndarray  # (chain, draw, P)
    independent: bool
    mean: np.ndarray
    sd: np.ndarray
    ess: np.ndarray
    mean_variance: np.ndarray
    sd_variance: np.ndarray

    @classmethod
    def of(cls, draws: np.ndarray, *, independent: bool) -> _Moments:
        mean, sd = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
        square = (draws - mean) ** 2
        ess = _ess(draws, independent=independent)
        # delta method for the root of a mean of squares
        sd_variance = _mean_variance(square, independent=independent) / np.maximum(4 * sd**2, TINY)
        return cls(draws, independent, mean, sd, ess, sd**2 / ess, sd_variance)


def _measure(p: _Moments, q: _Moments, names: list[str]) -> pd.DataFrame:
    """All measures of ``q`` against the baseline ``p``, a row per parameter."""
    import pandas as pd

    relative = p.sd_variance / p.sd**2  # of the unit in which distances are given
    error, ratio = (q.mean - p.mean) / p.sd, q.sd / p.sd
    distance, phi_p, phi_q = _wasserstein(p.draws, q.draws)
    distance_variance = _mean_variance(phi_p, independent=p.independent) + _mean_variance(
        phi_q, independent=q.independent
    )
    distance = distance / p.sd
    columns = {
        "nuts_mean": p.mean,
        "nuts_sd": p.sd,
        "mean_error": error,
        "mean_error_mcse": np.sqrt(
            (p.mean_variance + q.mean_variance) / p.sd**2 + error**2 * relative
        ),
        "sd_ratio": ratio,
        "sd_ratio_mcse": np.sqrt(q.sd_variance / p.sd**2 + ratio**2 * relative),
        "wasserstein": distance,
        "wasserstein_mcse": np.sqrt(distance_variance / p.sd**2 + distance**2 * relative),
        "wasserstein_floor": np.sqrt((1 / p.ess + 1 / q.ess) * 2 / np.pi) * _spread(p.draws) / p.sd,
    }
    return pd.DataFrame(columns, index=pd.Index(names, name="parameter"))


def _wasserstein(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marginal distances (P,) of two samples, and the dual potential at their draws."""
    distance, phi_p, phi_q = np.empty(p.shape[-1]), np.empty_like(p), np.empty_like(q)
    for i in range(p.shape[-1]):
        x, y = p[..., i].ravel(), q[..., i].ravel()
        grid = np.sort(np.concatenate([x, y]))
        step = np.diff(grid)
        below_x = np.searchsorted(np.sort(x), grid[:-1], side="right") / x.size
        below_y = np.searchsorted(np.sort(y), grid[:-1], side="right") / y.size
        distance[i] = np.sum(np.abs(below_x - below_y) * step)
        phi = np.concatenate([[0.0], np.cumsum(np.sign(below_x - below_y) * step)])
        phi_p[..., i] = np.interp(p[..., i], grid, phi)
        phi_q[..., i] = np.interp(q[..., i], grid, phi)
    return distance, phi_p, phi_q


def _spread(draws: np.ndarray) -> np.ndarray:
    """The integral of the root of F (1 - F) per parameter, shape (P,)."""
    x = np.sort(draws.reshape(-1, draws.shape[-1]), axis=0)
    below = np.arange(1, len(x))[:, None] / len(x)
    return np.asarray((np.sqrt(below * (1 - below)) * np.diff(x, axis=0)).sum(0))


def _mean_variance(values: np.ndarray, *, independent: bool) -> np.ndarray:
    """Squared standard error of the mean of (chain, draw, P) values, shape (P,)."""
    variance = values.var((0, 1), ddof=1)
    # A constant has no effective sample size; its mean has no error.
    ess = np.where(variance > 0, _ess(values, independent=independent), 1.0)
    return np.asarray(variance / ess)


def _ess(values: np.ndarray, *, independent: bool, method: str = "mean") -> np.ndarray:
    if independent:
        return np.full(values.shape[-1], float(values.shape[0] * values.shape[1]))
    return _arviz_statistic("ess", values, method=method)


def _arviz_statistic(name: str, values: np.ndarray, **kwargs: Any) -> np.ndarray:
    """One of ArviZ's statistics per parameter of (chain, draw, P) values, shape (P,)."""
    import xarray as xr

    data = xr.Dataset({"x": (("chain", "draw", "parameter"), values)})
    result = getattr(generations.import_arviz(), name)(data, **kwargs)
    return np.asarray(result["x"].values, float)


def _baseline(result: Any, draws: np.ndarray) -> Baseline:
    chains, num_draws, _ = draws.shape
    max_rhat = np.nan
    if chains > 1:
        max_rhat = float(_arviz_statistic("rhat", draws).max())
    divergences = None
    if "sample_stats" in generations.groups(result):
        stats = generations.dataset(result, "sample_stats")
        divergences = int(stats["diverging"].sum()) if "diverging" in stats else None
    return Baseline(
        chains=chains,
        draws=num_draws,
        max_rhat=max_rhat,
        min_ess=float(_ess(draws, independent=False, method="bulk").min()),
        divergences=divergences,
        seconds=_seconds(result),
    )


def _summarise(table: pd.DataFrame, result: Any) -> dict[str, float]:
    seconds = _seconds(result)
    row = {"seconds": np.nan if seconds is None else seconds, "pareto_k": np.nan, "elbo": np.nan}
    if "vi_fit" in generations.groups(result):
        fit = generations.dataset(result, "vi_fit")
        row |= {n: float(fit[n].mean()) for n in ("pareto_k", "elbo") if n in fit}
    ratio = table["sd_ratio"]
    badness = {
        "mean_error": table["mean_error"].abs(),
        "sd_ratio": np.log(ratio.clip(lower=TINY)).abs(),
        "wasserstein": table["wasserstein"],
    }
    for measure, bad in badness.items():
        shown = ratio if measure == "sd_ratio" else bad
        row[f"{measure}_worst"] = float(shown.loc[bad.idxmax()])
        row[f"{measure}_median"] = float(shown.median())
    return row


def _seconds(result: Any) -> float | None:
    seconds = generations.dataset(result, "posterior").attrs.get("sampling_time")
    return None if seconds is None else float(seconds)


def _is_approximate(result: Any) -> bool:
    return bool(generations.dataset(result, "posterior").attrs.get("is_approximate", 1))


def _as_result(value: Any, name: str) -> Any:
    if generations.is_result(value):
        return value
    if hasattr(value, "to_arviz"):
        return value.to_arviz()
    raise TypeError(
        f"'{name}' must be an InferenceData, a DataTree or an object with to_arviz(); got "
        f"{type(value).__name__}. Convert it with from_pyro or from_pyro_svi."
    )
