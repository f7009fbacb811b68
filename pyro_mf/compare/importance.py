"""k-hat of a fit's importance weights, as it says itself or from the log weights of its draws."""

from __future__ import annotations

import math
from typing import Any

from pyro_mf.compare.inputs import group
from pyro_mf.convert import generations

NAMES = ("pareto_k", "pareto_k_se", "pareto_k_threshold")


def khat_of(result: Any) -> dict[str, float]:
    """k-hat with its standard error and the threshold for so many draws; NaN where unknown.

    Args:
        result: With the group ``vi_fit``, with ``log_weight`` in ``sample_stats``, or with what
            ``ImportanceResample.to_arviz`` says of itself.

    Returns:
        ``pareto_k``, ``pareto_k_se`` and ``pareto_k_threshold``.
    """
    found = dict.fromkeys(NAMES, math.nan)
    attrs = generations.dataset(result, "posterior").attrs
    if "khat" in attrs:  # resampled by weights, which the draws have no longer
        found |= {"pareto_k": float(attrs["khat"])}
        found |= {"pareto_k_threshold": float(attrs.get("khat_threshold", math.nan))}
    fit, stats = group(result, "vi_fit"), group(result, "sample_stats")
    if fit is not None:
        found |= {name: float(fit[name].mean()) for name in NAMES if name in fit}
    if math.isnan(found["pareto_k"]) and stats is not None and "log_weight" in stats:
        import torch

        from pyro_mf.weights import psis

        try:
            smoothed = psis(torch.as_tensor(stats["log_weight"].values.ravel()))
        except ValueError:  # too few, or not finite: what is known stays NaN
            return found
        found = dict(zip(NAMES, (smoothed.khat, smoothed.khat_se, smoothed.threshold), strict=True))
    if not math.isnan(found["pareto_k"]) and math.isnan(found["pareto_k_threshold"]):
        found["pareto_k_threshold"] = 0.7  # that of many draws
    return found
