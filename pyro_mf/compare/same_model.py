"""Signs that a fit and NUTS are not of one model and the same data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pyro_mf.compare.inputs import group
from pyro_mf.convert import generations

FAR = 5.0  # NUTS standard deviations, of any mean


def doubts(nuts: Any, fit: Any, name: str, table: pd.DataFrame) -> list[str]:
    """Sentences on what does not fit together, and on a fit that was not done.

    Args:
        nuts: The baseline.
        fit: The result compared with it.
        name: What sentences call the fit.
        table: Its measures, a row per parameter.
    """
    notes = [
        f"'{name}' is not of the data that NUTS has seen: {difference}."
        for kind in ("observed_data", "constant_data")
        if (difference := _difference(group(nuts, kind), group(fit, kind)))
    ]
    ours, theirs = nuts.attrs.get("name"), fit.attrs.get("name")
    if ours and theirs and ours != theirs:
        notes.append(f"'{name}' is of the model '{theirs}', NUTS of '{ours}'.")
    error = table["mean_error"].abs()
    if error.max() > FAR:
        notes.append(
            f"'{name}' is far from NUTS: means are {error.median():.3g} sds apart in the median, "
            f"{error.max():.3g} at worst ({error.idxmax()}). It may be a fit of other data, of "
            "another model, or one that was not trained."
        )
    attrs = generations.dataset(fit, "posterior").attrs
    if attrs.get("is_resampled"):
        notes.append(
            f"'{name}' is resampled by weights: its draws are worth "
            f"{float(attrs['importance_sampling_ess']):.0f} independent ones, and their standard "
            f"errors here are those of as many as they are (k-hat {float(attrs['khat']):.2f}, good "
            f"up to {float(attrs['khat_threshold']):.2f})."
        )
    reason = attrs.get("stop_reason", "converged")
    if reason != "converged":
        notes.append(f"'{name}' has not converged (it stopped with '{reason}').")
    return notes


def _difference(ours: Any, theirs: Any) -> str:
    """What differs between two groups of data, if both are there."""
    if ours is None or theirs is None:
        return ""
    for variable in sorted(set(map(str, ours.data_vars)) & set(map(str, theirs.data_vars))):
        a, b = np.asarray(ours[variable].values), np.asarray(theirs[variable].values)
        if a.shape != b.shape:
            return f"'{variable}' has shape {b.shape} there and {a.shape} here"
        numeric = a.dtype.kind in "biuf" and b.dtype.kind in "biuf"
        # Single precision on one side is no difference.
        same = np.isclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) if numeric else a == b
        if not same.all():
            return f"{np.size(same) - same.sum()} of {np.size(same)} values of '{variable}' differ"
    return ""
