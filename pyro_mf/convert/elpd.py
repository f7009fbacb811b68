"""ArviZ's ELPDData of both generations: made, and read by one set of names."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mf.convert import generations

if TYPE_CHECKING:
    import xarray as xr


class ELPDNumbers(NamedTuple):
    """An ELPD by the same names, whichever ArviZ made it.

    Args:
        elpd: Expected log pointwise predictive density in nats, summed over the data.
        se: Standard error of ``elpd`` over the choice of data.
        p: Effective number of parameters.
        khat: k-hat of each data element's weights, shape ``(N,)``.
        good_k: Largest k-hat that is good enough at this number of draws.
        pointwise: The summands of ``elpd``, shape ``(N,)``.
    """

    elpd: float
    se: float
    p: float
    khat: np.ndarray
    good_k: float
    pointwise: np.ndarray

    @property
    def num_bad(self) -> int:
        """How many elements' k-hat is not known to be good, NaN included."""
        return int((~(self.khat <= self.good_k)).sum())


def elpd_numbers(elpd: Any) -> ELPDNumbers:
    """Read an ELPD of either generation of ArviZ.

    Args:
        elpd: What :func:`loo` returned, or ``az.loo`` with ``pointwise=True``.

    Raises:
        TypeError: If it is no ELPD.
        ValueError: If it is without k-hat, or not on the log scale.
    """
    old = hasattr(elpd, "elpd_loo")  # of ArviZ 0.x
    total, p, pointwise = ("elpd_loo", "p_loo", "loo_i") if old else ("elpd", "p", "elpd_i")
    if not hasattr(elpd, total) or not hasattr(elpd, "good_k"):
        raise TypeError(
            f"expected the ELPDData of a leave-one-out; got {type(elpd).__name__}. Call mf.loo."
        )
    if getattr(elpd, "pareto_k", None) is None:
        raise ValueError("the ELPD is without k-hat. Call mf.loo, or az.loo(..., pointwise=True).")
    if elpd.scale != "log":
        raise ValueError(f"the ELPD is on the scale '{elpd.scale}'; expected 'log'.")
    return ELPDNumbers(
        elpd=float(getattr(elpd, total)),
        se=float(elpd.se),
        p=float(getattr(elpd, p)),
        khat=np.asarray(elpd.pareto_k, dtype=np.float64).reshape(-1),
        good_k=float(elpd.good_k),
        pointwise=np.asarray(getattr(elpd, pointwise), dtype=np.float64).reshape(-1),
    )


def elpd_data(
    like: xr.DataArray,
    elpd_i: np.ndarray,
    khat: np.ndarray,
    p: float,
    num_draws: int,
    *,
    corrected: bool,
) -> Any:
    """The ELPDData of the installed ArviZ.

    Args:
        like: An array with one number per data element, for its dimensions and coordinates.
        elpd_i: Log density of each element given all others, shape ``(N,)``.
        khat: k-hat of each element's weights, shape ``(N,)``.
        p: Effective number of parameters.
        num_draws: Number of draws.
        corrected: Whether the draws were of an approximation.
    """
    good_k = min(1.0 - 1.0 / math.log10(num_draws), 0.7)
    common = {
        "n_samples": num_draws,
        "n_data_points": len(elpd_i),
        "warning": bool((~(khat <= good_k)).any()),
        "scale": "log",
        "good_k": good_k,
        "pareto_k": like.copy(data=khat.reshape(like.shape)).rename("pareto_k"),
    }
    elpd, se = float(elpd_i.sum()), float(np.sqrt(len(elpd_i) * elpd_i.var(ddof=1)))
    pointwise = like.copy(data=elpd_i.reshape(like.shape)).rename("loo_i")
    arviz = generations.import_arviz()
    if generations.arviz_major() < 1:
        head = {"elpd_loo": elpd, "se": se, "p_loo": p}  # printed from the left
        fields = {**head, **common, "loo_i": pointwise}
        order = [*head, "n_samples", "n_data_points", "warning", "loo_i", "pareto_k", "scale"]
        order.append("good_k")
        return arviz.stats.stats_utils.ELPDData([fields[name] for name in order], order)
    fields = {**common, "elpd": elpd, "se": se, "p": p, "elpd_i": pointwise}
    fields["approx_posterior"] = corrected
    if hasattr(arviz, "ELPDDataLOO"):
        return arviz.ELPDDataLOO(**fields)
    one_for_all = import_module("arviz_stats.utils").ELPDData  # as ArviZ 1.1 has it
    return one_for_all(kind="loo", **fields)
