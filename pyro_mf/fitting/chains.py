"""A fit as an ArviZ result, a fit with restarts as one chain per optimum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_mf.convert import from_pyro, from_pyro_svi, generations
from pyro_mf.fitting.restarts import current_params, restore_params, usable
from pyro_mf.guides.flat_guide import FlatGuide

if TYPE_CHECKING:
    from pyro_mf.fitting.result import FitResult

_RESAMPLED, _RESAMPLED_CHAINS = 4000, 4  # draws of weighted ones, which ArviZ does not know
_PRIOR = frozenset({"prior", "prior_predictive"})  # one sample of its own, whatever the chains


def convert_result(result: FitResult, *, linear_response: bool = False, **kwargs: Any) -> Any:
    """See :meth:`pyro_mf.FitResult.to_arviz`."""
    own = {
        "sampling_time": sum(result.seconds.values()),
        "solver": result.solver,
        "stop_reason": result.stop_reason,
        "num_gradients": result.num_gradients,
    }
    kwargs = {
        "model": result.problem.model,
        **kwargs,
        "attrs": own | dict(kwargs.get("attrs") or {}),
    }
    if linear_response:
        kwargs["attrs"] |= {"linear_response": 1}
        return _convert(result, result.linear_response_guide(), kwargs)
    kwargs.setdefault("losses", result.losses or None)
    optima = usable(result.restarts)
    if len(optima) < 2 or kwargs.get("like") is not None or "num_chains" in kwargs:
        return _convert(result, result.guide, kwargs)
    chains = []
    for chain, optimum in enumerate(optima):
        with _held_at(result.guide, optimum.params):
            seeded = {**kwargs, "seed": kwargs.get("seed", 0) + chain}
            chains.append(_convert(result, result.guide, seeded))
    return _joined(chains, best=optima.index(result.restarts[result.best]))


def convert_draws(result: FitResult, **kwargs: Any) -> Any:
    """The draws that moment matching fitted to; see :meth:`pyro_mf.FitResult.to_arviz`."""
    draws = result.posterior_draws()
    num_chains = int(draws.diagnostics.get("num_chains", 0))
    if num_chains:
        z = draws.z.unflatten(0, (-1, num_chains)).transpose(0, 1)
    else:
        z = draws.sample(_RESAMPLED, seed=result.seed).unflatten(0, (_RESAMPLED_CHAINS, -1))
    own = {
        "sampling_time": sum(result.seconds.values()),
        "inference_method": draws.source,
        "stop_reason": result.stop_reason,
    }
    problem = result.problem
    return from_pyro(
        result.layout.constrain(z.to(result.log_joint.dtype)),
        model=problem.model,
        model_args=problem.model_args,
        model_kwargs=problem.model_kwargs,
        **kwargs | {"attrs": own | dict(kwargs.get("attrs") or {})},
    )


def _convert(result: FitResult, guide: Any, kwargs: dict[str, Any]) -> Any:
    return from_pyro_svi(guide, result.problem.model_args, result.problem.model_kwargs, **kwargs)


def _joined(chains: list[Any], *, best: int) -> Any:
    """Results of one chain each as one result; what has no chains is that of the best."""
    import xarray as xr

    datasets = {}
    for group in generations.groups(chains[best]):
        parts = [generations.dataset(chain, group) for chain in chains]
        datasets[group] = parts[best]
        if "chain" in parts[best].dims and group not in _PRIOR:
            numbered = [part.assign_coords(chain=[k]) for k, part in enumerate(parts)]
            joined = xr.concat(
                numbered,
                "chain",
                data_vars="all",
                coords="minimal",
                compat="override",
                join="exact",
            )
            datasets[group] = joined.assign_attrs(parts[best].attrs)
    return generations.wrap(datasets, chains[best].attrs)


@contextmanager
def _held_at(guide: FlatGuide, params: tuple[Tensor, ...]) -> Iterator[None]:
    """Give a guide other parameters inside a ``with`` block."""
    own = current_params(guide)
    restore_params(guide, params)
    try:
        yield
    finally:
        restore_params(guide, own)
