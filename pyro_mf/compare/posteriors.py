r"""An approximate posterior against NUTS, parameter by parameter, each figure with its own error.

All distances are in posterior standard deviations as NUTS sees them. Draws of an approximation are
independent; draws of NUTS count for as much as their effective sample size says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.compare.aligned import align_draws
from pyro_mf.compare.baseline import judge_parameters, judge_run
from pyro_mf.compare.importance import khat_of
from pyro_mf.compare.inputs import as_baseline, as_result, group, is_independent, seconds_of
from pyro_mf.compare.joint import MAX_DRAWS, MIN_DRAWS, UNKNOWN, discrepancy, median_distance, thin
from pyro_mf.compare.measures import QUANTILES, Moments, measure
from pyro_mf.compare.predictive import predict
from pyro_mf.compare.report import PosteriorComparison
from pyro_mf.compare.same_model import doubts
from pyro_mf.compare.statistics import TINY
from pyro_mf.convert import generations

if TYPE_CHECKING:
    import pandas as pd

MIN_SAMPLE = 100


def compare_posteriors(nuts: Any, fits: Mapping[str, Any]) -> PosteriorComparison:
    r"""Compare approximate posteriors with NUTS, for every scalar parameter that they share.

    With :math:`m, s` mean and standard deviation of a parameter, a fit has the *mean error*
    :math:`(m_q - m_p) / s_p`, the *sd ratio* :math:`s_q / s_p`, the errors of the 5, 50 and 95 %
    quantiles in :math:`s_p`, and the marginal 1-Wasserstein distance
    :math:`\int |F_q - F_p| / s_p`.

    The Monte Carlo errors are those of means, by the delta method. For the Wasserstein distance the
    mean is that of its dual potential :math:`\phi`, :math:`W_1 = E_q \phi - E_p \phi` with
    :math:`\phi' = \operatorname{sign}(F_p - F_q)`. Being a distance, it is above zero also between
    two samples of one distribution; the ``wasserstein_floor`` is its expectation there,
    :math:`\sqrt{(1/n_q + 1/n_p) 2 / \pi} \int \sqrt{F_p (1 - F_p)} / s_p`, with effective sample
    sizes :math:`n`. A distance near its floor says that more draws are needed to see a difference.

    Jointly, a fit has a squared maximum mean discrepancy (a Gaussian kernel on parameters
    standardised by NUTS, its width the median distance between NUTS's draws), k-hat of its
    importance weights, and the difference in the expected log predictive density of left-out data.
    Predictions are compared where results hold ``posterior_predictive`` or ``log_likelihood``.

    Args:
        nuts: The baseline: an ``InferenceData``, a ``DataTree``, an object with ``to_arviz()``, or
            reference draws as a mapping from variables to arrays ``(chains, draws, *shape)``.
        fits: What is compared with it, by name: results or objects with ``to_arviz()``. Draws of an
            entry count as independent unless its posterior has the attribute ``is_approximate =
            0``.

    Returns:
        The comparison; print it, or read ``.table``, ``.summary`` and ``.predictive``.

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

        Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), A Kernel Two-Sample Test, JMLR 13,
        https://jmlr.org/papers/v13/gretton12a.html
    """
    import pandas as pd

    if generations.is_result(fits) or not isinstance(fits, Mapping) or not fits:
        raise ValueError(
            "fits must be a mapping with at least one entry, such as {'reverse': result}; got "
            f"{type(fits).__name__}. Give each fit a name."
        )
    if "NUTS" in fits:
        raise ValueError("a fit is called 'NUTS', as the baseline is. Give it another name.")
    results = {"NUTS": as_baseline(nuts, "NUTS")}
    results |= {name: as_result(fit, name) for name, fit in fits.items()}
    aligned = align_draws(results, min_draws=MIN_SAMPLE).varying()
    draws = aligned.draws
    quality = judge_parameters(draws["NUTS"])
    baseline = judge_run(results["NUTS"], draws["NUTS"].shape, quality, seconds_of(results["NUTS"]))
    reference = Moments.of(draws["NUTS"], independent=False)
    tables, summaries, notes = {}, {}, [*baseline.warnings(), *aligned.notes]
    for name in fits:
        q = Moments.of(draws[name], independent=is_independent(results[name]))
        tables[name] = measure(reference, q, aligned.parameters).assign(**quality)
        notes += doubts(results["NUTS"], results[name], name, tables[name])
        summaries[name] = _summarise(tables[name], results[name]) | _jointly(reference, q)
    summary = pd.DataFrame.from_dict(summaries, orient="index").rename_axis("fit")
    if summary["mmd2"].isna().any():
        notes.append(f"No MMD where fewer than {MIN_DRAWS} effective draws are left.")
    predictions = predict(results)
    report = PosteriorComparison(
        table=pd.concat(tables, names=["fit"]),
        summary=summary.assign(nuts_doubtful=baseline.is_doubtful),
        predictive=predictions.table,
        loo_khat=predictions.loo_khat,
        baseline=baseline,
        notes=(*notes, *predictions.notes),
        draws=draws,
        results=results,
    )
    for frame in (report.table, report.summary, report.predictive):
        frame.attrs["notes"] = report.notes
    return report


def _summarise(table: pd.DataFrame, result: Any) -> dict[str, Any]:
    import pandas as pd

    seconds = seconds_of(result)
    row: dict[str, Any] = {"seconds": np.nan if seconds is None else seconds}
    row |= {"elbo": np.nan, "elbo_mcse": np.nan} | khat_of(result)
    if (fit := group(result, "vi_fit")) is not None:
        row |= {n: float(fit[n].mean()) for n in ("elbo", "elbo_mcse") if n in fit}
    row["pareto_k_high"] = row["pareto_k"] > row["pareto_k_threshold"]
    ratio = table["sd_ratio"]
    errors = [table[f"q{round(100 * prob)}_error"].abs() for prob in QUANTILES]
    badness = {
        "mean_error": table["mean_error"].abs(),
        "sd_ratio": np.log(ratio.clip(lower=TINY)).abs(),
        "wasserstein": table["wasserstein"],
        "quantile_error": pd.concat(errors, axis=1).max(axis=1),
    }
    for name, bad in badness.items():
        shown = ratio if name == "sd_ratio" else bad
        row[f"{name}_worst"] = float(shown.loc[bad.idxmax()])
        row[f"{name}_median"] = float(shown.median())
    return row


def _jointly(p: Moments, q: Moments) -> dict[str, float]:
    """The maximum mean discrepancy of as many draws as are independent."""
    count = min(MAX_DRAWS, p.bulk_size, q.bulk_size)
    found = UNKNOWN
    if count >= MIN_DRAWS:
        x, y = ((thin(m.draws, count) - p.mean) / p.sd for m in (p, q))
        found = discrepancy(x, y, median_distance(x))
    names = {"mmd2": found.mmd2, "mmd2_mcse": found.mcse, "mmd2_floor": found.floor}
    return names | {"mmd2_pvalue": found.pvalue}
