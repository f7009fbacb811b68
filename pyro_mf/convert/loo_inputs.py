"""What leave-one-out takes from a result, and what it refuses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.convert import generations

if TYPE_CHECKING:
    import xarray as xr

_SAMPLE = ("chain", "draw")
_MIN_DRAWS = 100  # with fewer, weights pass only at a k-hat that hardly any have
_OTHER_GUIDE = 1e-6  # false-alarm rate of the test that all chains come from one guide


def as_result(data: Any, to_arviz: dict[str, Any]) -> Any:
    """Convert what is not converted yet.

    Raises:
        TypeError: If it cannot be converted, or is converted and there are options for it.
    """
    if generations.is_result(data):
        if to_arviz:
            raise TypeError(
                f"{sorted(to_arviz)} are options of to_arviz, and this result is converted already."
                " Pass the fit itself, or convert it with them."
            )
        return data
    if not hasattr(data, "to_arviz"):
        raise TypeError(
            "data must be an InferenceData, a DataTree or an object with to_arviz(); got "
            f"{type(data).__name__}. Convert it with from_pyro or from_pyro_svi."
        )
    return data.to_arviz(**to_arviz)


def find_log_likelihood(result: Any, var_name: str | None) -> xr.DataArray:
    """Log likelihood of the chosen site, its sample dimensions stacked as ``draws``.

    Raises:
        ValueError: If there is none, or no choice among several.
    """
    if "log_likelihood" not in generations.groups(result):
        raise ValueError(
            f"loo needs the group log_likelihood; the result has {generations.groups(result)}. "
            "Convert with log_likelihood=True. Where the conversion leaves the group out all the "
            "same, data elements share a discrete latent, and there is nothing to leave out."
        )
    group = generations.dataset(result, "log_likelihood")
    sites = sorted(map(str, group.data_vars))
    if var_name is None and len(sites) > 1:
        raise ValueError(
            f"there are several observed sites: {sites}. Choose whose elements are left out with "
            f"var_name={sites[0]!r}."
        )
    if var_name is not None and var_name not in sites:
        raise ValueError(f"var_name={var_name!r} is no observed site; expected one of {sites}.")
    found = group[var_name or sites[0]]
    if not set(_SAMPLE) <= set(found.dims):
        raise ValueError(
            f"the log likelihood of '{found.name}' must have the dimensions chain and draw; it has "
            f"{list(map(str, found.dims))}."
        )
    return found.stack(draws=_SAMPLE, create_index=False)


def find_log_weight(result: Any, log_lik: xr.DataArray) -> np.ndarray | None:
    """Log p - log q per draw, shape ``(S,)``; ``None`` for draws of the posterior itself.

    Raises:
        ValueError: If an approximation's densities are missing, or not those of these draws.
    """
    groups = generations.groups(result)
    if "posterior" not in groups:
        raise ValueError(f"loo needs the group posterior; the result has {groups}.")
    posterior = generations.dataset(result, "posterior")
    _check_same_draws(posterior, log_lik, "posterior")
    stats = generations.dataset(result, "sample_stats") if "sample_stats" in groups else {}
    approximate = posterior.attrs.get("is_approximate")
    if approximate == 0 or (approximate is None and "log_q" not in stats):
        return None
    if posterior.attrs.get("is_resampled"):
        raise ValueError(
            "these draws are resampled by importance weights, so that the weights are gone. Give "
            "loo the fit itself: it uses the same weights."
        )
    missing = [name for name in ("lp", "log_q") if name not in stats]
    if missing:
        raise ValueError(
            f"these draws are of an approximation, and sample_stats lacks {missing}: without them "
            "leave-one-out would take the draws for the posterior's. The conversion warned why it "
            "left them out; use a guide with a density, such as AutoMeanField, or NUTS."
        )
    _check_same_draws(stats, log_lik, "sample_stats")
    lp, log_q = (stats[name].transpose(*_SAMPLE).to_numpy() for name in ("lp", "log_q"))
    if not np.isfinite(log_q).all() or np.ptp(log_q) == 0.0:
        raise ValueError(
            "log_q must be finite, and cannot be the same at all draws; got "
            f"{np.unique(log_q)[:3].tolist()} among others. It has to be the guide's log density."
        )
    _check_one_guide(posterior, log_q)
    return np.asarray(lp - log_q).reshape(-1)


def _check_same_draws(found: Any, log_lik: xr.DataArray, group: str) -> None:
    """Check that a group's draws are those of the log likelihood, one by one.

    Raises:
        ValueError: If they are not.
    """
    same = all(
        dim in found.dims
        and np.array_equal(
            np.repeat(found[dim], found.sizes["draw"])
            if dim == "chain"
            else np.tile(found[dim], found.sizes["chain"]),
            log_lik[dim],
        )
        for dim in _SAMPLE
    )
    if not same:
        raise ValueError(
            f"the log likelihood has {log_lik.sizes['draws']} draws and {group} has "
            f"{dict(found.sizes)}, or their chain and draw labels differ. Both must come from one "
            "conversion."
        )


def _check_one_guide(posterior: xr.Dataset, log_q: np.ndarray) -> None:
    """Refuse chains of different guides: q at a draw would be that of its own chain only.

    Independent draws of one guide have the same distribution in every chain, which the test of
    Kruskal and Wallis rejects for any element at most as often as ``_OTHER_GUIDE`` says.

    Raises:
        ValueError: If it does.
    """
    num_chains = len(log_q)
    if num_chains == 1:
        return
    from scipy.stats import kruskal

    arrays = [v.transpose(*_SAMPLE, ...).to_numpy() for v in posterior.data_vars.values()]
    columns = [a.reshape(*log_q.shape, -1) for a in (log_q, *arrays)]
    draws = np.concatenate(columns, axis=-1)
    draws = draws[..., np.ptp(draws, axis=(0, 1)) > 0.0]
    p_value = np.min(kruskal(*draws, axis=0).pvalue) * draws.shape[-1]
    if p_value < _OTHER_GUIDE:
        raise ValueError(
            f"the {num_chains} chains were drawn from different guides (p = {p_value:.1g}), as "
            "those of a fit whose restarts ended at different optima: draws of several guides "
            "cannot be weighted as draws of one. Use mf.loo(result, num_chains=1) for the best "
            "optimum, or NUTS."
        )


def check_values(log_lik: np.ndarray, log_weight: np.ndarray | None, site: str) -> None:
    """Check that there is enough to compute with, and nothing infinite.

    Raises:
        ValueError: If not.
    """
    draws, num = log_lik.shape
    if draws < _MIN_DRAWS:
        raise ValueError(
            f"loo needs at least {_MIN_DRAWS} draws; got {draws}. Convert with more num_draws."
        )
    if num < 2:
        raise ValueError(
            f"'{site}' has {num} element: without it nothing of its data is left, and a spread "
            "over elements does not exist. Independent elements belong in a pyro.plate."
        )
    if log_weight is not None:
        bad = int((np.isnan(log_weight) | (log_weight == math.inf)).sum())
        if bad or (log_weight == -math.inf).all():
            raise ValueError(
                f"log weights lp - log_q must be finite or -inf, and not all -inf; {bad} of {draws}"
                " are NaN or +inf. Look at the model's density at the guide's draws."
            )
        log_lik = log_lik[log_weight > -math.inf]  # draws of weight zero do not matter
    bad = int((~np.isfinite(log_lik)).sum())
    if bad:
        raise ValueError(
            f"the log likelihood of '{site}' is NaN or infinite for {bad} of {log_lik.size} draws "
            "and elements: leaving such an element out would give a draw infinite weight. Look "
            "at the data and at the likelihood's support."
        )
