"""Posterior draws of several results as arrays over the same scalar parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_mf.convert import generations

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class AlignedDraws:
    """Draws of several posteriors, element by element of the variables that all have.

    Args:
        parameters: Names such as ``theta[Choate]``, by label where the first result has labels.
        draws: By result, shape (chain, draw, parameter).
        notes: What was left out, in sentences.
    """

    parameters: list[str]
    draws: dict[str, np.ndarray] = field(repr=False)
    notes: list[str]

    def varying(self) -> AlignedDraws:
        """Without the parameters that are constant in the first result, such as structural zeros.

        Raises:
            ValueError: If nothing is left.
        """
        first, reference = next(iter(self.draws.items()))
        moves = np.ptp(reference, axis=(0, 1)) > 0
        if moves.all():
            return self
        if not moves.any():
            raise ValueError(
                f"every parameter is constant in the draws of '{first}'; there is nothing to "
                "compare. Look at that run first."
            )
        still = [p for p, m in zip(self.parameters, moves, strict=True) if not m]
        shown = ", ".join(still[:5]) + (", ..." if len(still) > 5 else "")
        return AlignedDraws(
            parameters=[p for p, m in zip(self.parameters, moves, strict=True) if m],
            draws={name: values[..., moves] for name, values in self.draws.items()},
            notes=[*self.notes, f"Left out, constant in {first}: {shown} ({len(still)} in all)."],
        )


def align_draws(results: Mapping[str, Any], *, min_draws: int) -> AlignedDraws:
    """Read the posterior draws of every result, in the order of the first one's elements.

    Args:
        results: ``InferenceData`` or ``DataTree`` objects by name; the first gives names and order.
        min_draws: Least number of draws, over all chains, that a result must have.

    Returns:
        The draws of the variables that all results have.

    Raises:
        ValueError: If no variable is shared, shapes differ, draws are too few or not finite, or a
            posterior has not the dimensions chain and draw.

    Example:
        >>> import xarray as xr
        >>> ds = xr.Dataset({"x": (("chain", "draw", "row"), np.ones((1, 3, 2)))})
        >>> align_draws({"a": generations.wrap({"posterior": ds})}, min_draws=1).parameters
        ['x[0]', 'x[1]']
    """
    posteriors = {name: _posterior(result, name, min_draws) for name, result in results.items()}
    reference = next(iter(posteriors.values()))
    variables = _shared_variables(posteriors)
    targets = {v: reference[v].transpose("chain", "draw", ...) for v in variables}
    notes = [
        f"Left out, not in every result: {', '.join(extra)} (of '{name}')."
        for name, posterior in posteriors.items()
        if (extra := sorted(set(map(str, posterior.data_vars)) - set(variables)))
    ]
    return AlignedDraws(
        parameters=[e for variable, target in targets.items() for e in _elements(variable, target)],
        draws={name: _flat(posterior, targets, name) for name, posterior in posteriors.items()},
        notes=notes,
    )


def _posterior(result: Any, name: str, min_draws: int) -> xr.Dataset:
    posterior = generations.dataset(result, "posterior")
    if not {"chain", "draw"} <= set(posterior.dims):
        raise ValueError(
            f"the posterior of '{name}' must have the dimensions chain and draw; it has "
            f"{sorted(map(str, posterior.dims))}. Give it both, one chain for independent draws."
        )
    if (count := posterior.sizes["chain"] * posterior.sizes["draw"]) < min_draws:
        raise ValueError(f"'{name}' has {count} draws; at least {min_draws} are needed. Draw more.")
    return posterior


def _shared_variables(posteriors: Mapping[str, xr.Dataset]) -> list[str]:
    first = next(iter(posteriors.values()))
    shared = [v for v in map(str, first.data_vars) if all(v in p for p in posteriors.values())]
    if not shared:
        have = "; ".join(f"{n}: {sorted(map(str, p.data_vars))}" for n, p in posteriors.items())
        raise ValueError(
            f"the posteriors share no variable ({have}). Give results of one model, or rename."
        )
    return shared


def _flat(posterior: xr.Dataset, targets: Mapping[str, xr.DataArray], name: str) -> np.ndarray:
    parts = []
    for variable, target in targets.items():
        values = in_order_of(posterior[variable], target)
        if values.shape[2:] != target.shape[2:]:
            raise ValueError(
                f"one draw of '{variable}' has shape {values.shape[2:]} in '{name}', and "
                f"{target.shape[2:]} was expected. Give results of one model and the same data."
            )
        array = np.asarray(values.values, float)
        if bad := int((~np.isfinite(array)).sum()):
            raise ValueError(
                f"{bad} of {array.size} draws of '{variable}' in '{name}' are NaN or infinite. "
                "Look at that run first."
            )
        parts.append(array.reshape(*array.shape[:2], -1))
    return np.concatenate(parts, -1)


def in_order_of(values: xr.DataArray, target: xr.DataArray) -> xr.DataArray:
    """Axes and labels in the order of ``target``, where both have the same ones.

    Args:
        values: Draws; chain and draw come first.
        target: Others, with chain and draw in front.
    """
    values = values.transpose("chain", "draw", ...)
    if set(values.dims) != set(target.dims):
        return values
    values = values.transpose(*target.dims)
    for dim in target.dims[2:]:
        if dim in values.indexes and dim in target.indexes:
            here, there = values.indexes[dim], target.indexes[dim]
            if not here.equals(there) and here.is_unique and set(here) == set(there):
                values = values.sel({dim: there})
    return values


def _elements(variable: str, target: xr.DataArray) -> list[str]:
    labels = [
        list(target.indexes[d]) if d in target.indexes else list(range(target.sizes[d]))
        for d in target.dims[2:]
    ]
    names = []
    for index in np.ndindex(*map(len, labels)):
        inside = ",".join(str(axis[i]) for axis, i in zip(labels, index, strict=True))
        names.append(f"{variable}[{inside}]" if labels else variable)
    return names
