"""Expected log predictive density of left-out data, of fits against NUTS."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyro_mf._errors import KhatWarning
from pyro_mf.compare.importance import khat_of
from pyro_mf.compare.inputs import group
from pyro_mf.convert import generations
from pyro_mf.convert.elpd import elpd_numbers
from pyro_mf.convert.loo import loo

if TYPE_CHECKING:
    import xarray as xr

MAX_ELEMENTS = 500  # of the data that are left out in turn, about a millisecond each


class Elpd(NamedTuple):
    """What is known of one result's ELPD.

    Args:
        pointwise: Per element that was left out, nats.
        khat: Of the weights without it.
        num_bad: For how many k-hat is not good.
        size: Elements of the data in all.
        is_doubtful: Whether the estimate can be off by any amount.
    """

    pointwise: np.ndarray
    khat: np.ndarray
    num_bad: int
    size: int
    is_doubtful: bool

    def row(self, reference: Elpd | None) -> dict[str, Any]:
        """Columns of a table.

        Args:
            reference: That of NUTS, to which the difference is taken; ``None`` for none.
        """
        scale = self.size / len(self.pointwise)
        found: dict[str, Any] = {
            "elpd": scale * float(self.pointwise.sum()),
            "elpd_bad_k": self.num_bad,
            "elpd_doubtful": self.is_doubtful,
        }
        if reference is not None and self.size == reference.size:
            difference = self.pointwise - reference.pointwise
            found["elpd_diff"] = scale * float(difference.sum())
            found["elpd_diff_se"] = self.size * float(
                difference.std(ddof=1) / np.sqrt(len(difference))
            )
            found["elpd_doubtful"] = self.is_doubtful or reference.is_doubtful
        return found


def left_out(results: dict[str, Any], site: str) -> tuple[dict[str, Elpd], list[str]]:
    """The ELPD of every result that allows it, and why not for the others.

    Of more than 500 elements, 500 are left out, the same ones in all results.

    Args:
        results: By name.
        site: The observed site.
    """
    found, notes = {}, []
    for name, result in results.items():
        log_likelihood = group(result, "log_likelihood")
        if log_likelihood is None or site not in log_likelihood:
            continue
        try:
            found[name] = _elpd(result, log_likelihood, site)
        except ValueError as error:
            notes.append(f"No elpd of '{name}' for '{site}': {error}")
    return found, notes


def _elpd(result: Any, log_likelihood: Any, site: str) -> Elpd:
    values = log_likelihood[site].transpose("chain", "draw", ...)
    if not (others := values.dims[2:]):
        raise ValueError("it is one element, and nothing is left without it.")
    flat = values.stack(element=others, create_index=False)
    size = flat.sizes["element"]
    kept = np.sort(np.random.default_rng(0).permutation(size)[:MAX_ELEMENTS])
    flat = flat.isel(element=kept).drop_vars(set(flat.coords) - {"chain", "draw"})
    groups: dict[str, Any] = {
        g: generations.dataset(result, g)
        for g in ("posterior", "sample_stats")
        if g in generations.groups(result)
    }
    groups["log_likelihood"] = flat.to_dataset(name=site)
    groups = {name: _labelled(ds) for name, ds in groups.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KhatWarning)  # the table is marked instead
        elpd = loo(generations.wrap(groups))
    numbers = elpd_numbers(elpd)
    pointwise = elpd.loo_i if hasattr(elpd, "loo_i") else elpd.elpd_i
    khat = khat_of(result)
    high = khat["pareto_k"] > khat["pareto_k_threshold"]
    return Elpd(
        pointwise=np.asarray(pointwise, float).ravel(),
        khat=numbers.khat,
        num_bad=numbers.num_bad,
        size=size,
        is_doubtful=numbers.num_bad > 0 or high,
    )


def _labelled(ds: xr.Dataset) -> xr.Dataset:
    """With labels for chains and draws, which results made by hand may lack."""
    missing = {dim: range(ds.sizes[dim]) for dim in ("chain", "draw") if dim not in ds.coords}
    return ds.assign_coords(missing) if missing else ds
