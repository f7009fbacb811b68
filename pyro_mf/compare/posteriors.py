r"""An approximate posterior against NUTS, parameter by parameter, each figure with its own error.

All distances are in posterior standard deviations as NUTS sees them. Draws of an approximation are
independent; draws of NUTS count for as much as their effective sample size says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.compare.aligned import align_draws
from pyro_mf.compare.measures import TINY, Moments, arviz_statistic, effective_sample_size, measure
from pyro_mf.compare.report import Baseline, PosteriorComparison
from pyro_mf.convert import generations

if TYPE_CHECKING:
    import pandas as pd

MIN_DRAWS = 100


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
    reference = Moments.of(draws["NUTS"], independent=False)
    tables, summaries = {}, {}
    for name in fits:
        q = Moments.of(draws[name], independent=_is_approximate(results[name]))
        tables[name] = measure(reference, q, aligned.parameters)
        summaries[name] = _summarise(tables[name], results[name])
    return PosteriorComparison(
        table=pd.concat(tables, names=["fit"]),
        summary=pd.DataFrame.from_dict(summaries, orient="index").rename_axis("fit"),
        baseline=baseline,
        notes=(*baseline.warnings(), *aligned.notes),
        draws=draws,
    )


def _baseline(result: Any, draws: np.ndarray) -> Baseline:
    chains, num_draws, _ = draws.shape
    max_rhat = np.nan
    if chains > 1:
        max_rhat = float(arviz_statistic("rhat", draws).max())
    divergences = None
    if "sample_stats" in generations.groups(result):
        stats = generations.dataset(result, "sample_stats")
        divergences = int(stats["diverging"].sum()) if "diverging" in stats else None
    return Baseline(
        chains=chains,
        draws=num_draws,
        max_rhat=max_rhat,
        min_ess=float(effective_sample_size(draws, independent=False, method="bulk").min()),
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
    for name, bad in badness.items():
        shown = ratio if name == "sd_ratio" else bad
        row[f"{name}_worst"] = float(shown.loc[bad.idxmax()])
        row[f"{name}_median"] = float(shown.median())
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
