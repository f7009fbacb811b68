"""Arrays of draws as :class:`xarray.Dataset`: what each axis is called and how it is labelled.

Axes made by plates take the plates' names, all others ``{site}_dim_{i}``. This file knows xarray,
and neither ArviZ nor Pyro.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_mf.density.sites import Plate

if TYPE_CHECKING:
    import xarray as xr

# What the InferenceData schema keeps for itself.
RESERVED = frozenset({"chain", "draw", "sample", "pred_id"})


@dataclass(frozen=True)
class Axes:
    """Names and labels for the axes of variables.

    Args:
        plates: For each variable the plates around it.
        event_dims: For each variable its number of event dimensions. A variable without an entry
            has no plates, and all its axes are kept.
        dims: Names that the user gives to a variable's axes, from the left.
        coords: Labels that the user gives to a dimension.
        value_shapes: For variables that hold one number per batch element (log likelihoods), the
            shape of the site's value, whose leading axes they share.

    Example:
        >>> axes = Axes({"x": (Plate("row", -2, 4, 4),)}, {"x": 1})
        >>> axes.names("x", (4, 1, 3))
        ('row', None, 'x_dim_1')
    """

    plates: Mapping[str, tuple[Plate, ...]] = field(default_factory=dict)
    event_dims: Mapping[str, int] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    value_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def names(self, variable: str, shape: Sequence[int]) -> tuple[str | None, ...]:
        """A name per axis of one value; ``None`` for a batch axis of size 1 that no plate made.

        Args:
            variable: The site's name in the model.
            shape: Shape of one value, without chain and draw.

        Raises:
            ValueError: If the user names more axes than there are, or one name twice.
        """
        whole = tuple(self.value_shapes.get(variable, ()))
        if whole != tuple(shape) and whole[: len(shape)] == tuple(shape):
            return replace(self, value_shapes={}).names(variable, whole)[: len(shape)]
        num_batch = max(0, len(shape) - self.event_dims.get(variable, len(shape)))
        by_axis = {num_batch + p.dim: p for p in self.plates.get(variable, ())}
        plates = {a: p.name for a, p in by_axis.items() if a >= 0 and shape[a] == p.size}
        given = [safe_name(d) for d in self.dims.get(variable, ())]
        kept = [
            axis
            for axis, size in enumerate(shape)
            if axis >= num_batch or axis in plates or size != 1 or len(given) == len(shape)
        ]
        if len(given) > len(kept):
            raise ValueError(
                f"dims names {len(given)} axes of '{variable}' ({', '.join(given)}); it has "
                f"{len(kept)}, of shape {tuple(shape[a] for a in kept)}. Name at most that many."
            )
        names: list[str | None] = [None] * len(shape)
        for position, axis in enumerate(kept):
            default = plates.get(axis, f"{variable}_dim_{position}")
            names[axis] = given[position] if position < len(given) else safe_name(default)
        used = [n for n in names if n is not None]
        if len(set(used)) < len(used):
            raise ValueError(
                f"two axes of '{variable}' have one name: {used}. Give `dims` different names."
            )
        return tuple(names)


def to_dataset(
    arrays: Mapping[str, Tensor | np.ndarray],
    axes: Axes,
    sample: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Build a dataset, one variable per array.

    Args:
        arrays: For each variable its values, the sample dimensions first.
        axes: Names and labels of the other axes.
        sample: Coordinates of the leading dimensions, such as ``{"chain": [0], "draw": range(9)}``;
            nothing for data.
        attrs: Attributes of the dataset.

    Returns:
        The dataset. Variables and dimensions with a reserved name get an underscore behind it, and
        a slash (which NetCDF refuses) becomes a dot.

    Raises:
        ValueError: If labels do not fit an axis, or two things would have one name.

    Example:
        >>> axes = Axes({"theta": (Plate("school", -1, 2, 2),)}, {"theta": 0},
        ...             coords={"school": ["a", "b"]})
        >>> ds = to_dataset({"theta": torch.zeros(1, 3, 2)}, axes, {"chain": [0], "draw": range(3)})
        >>> ds["theta"].dims
        ('chain', 'draw', 'school')
    """
    import xarray as xr

    sample = {k: np.asarray(v) for k, v in (sample or {}).items()}
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for variable, array in arrays.items():
        values = to_numpy(array)
        names = axes.names(variable, values.shape[len(sample) :])
        dropped = tuple(len(sample) + a for a, n in enumerate(names) if n is None)
        kept = tuple(n for n in names if n is not None)
        values = values.squeeze(dropped) if dropped else values
        for name, size in zip(kept, values.shape[len(sample) :], strict=True):
            if sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"dimension '{name}' has size {sizes[name]} in one variable and {size} in "
                    f"'{variable}'. Give one of them another name with `dims`."
                )
        if safe_name(variable) in variables:
            raise ValueError(
                f"two variables would be called '{safe_name(variable)}', one of them '{variable}'. "
                "Rename a site of the model."
            )
        variables[safe_name(variable)] = ((*sample, *kept), values)
    if clash := sorted(set(sizes) & set(variables)):
        raise ValueError(
            f"dimensions {clash} have the names of variables. Give them others with `dims`."
        )
    labels = {name: _labels(name, size, axes.coords) for name, size in sizes.items()}
    return xr.Dataset(variables, {**sample, **labels}, dict(attrs or {}))


def check_all_used(
    datasets: Mapping[str, xr.Dataset],
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
) -> None:
    """Check that ``coords`` and ``dims`` all name something, so that no typing error is lost.

    Raises:
        ValueError: If one names a dimension or a variable that no group has.
    """
    dimensions = {str(d) for ds in datasets.values() for d in ds.dims} - RESERVED
    variables = {str(v) for ds in datasets.values() for v in ds.data_vars}
    if unknown := sorted(set(map(safe_name, coords)) - dimensions):
        raise ValueError(
            f"coords labels dimensions {unknown} that no variable has; the dimensions are "
            f"{sorted(dimensions)}."
        )
    if unknown := sorted(set(map(safe_name, dims)) - variables):
        raise ValueError(
            f"dims names axes of {unknown}, which are no variables; the variables are "
            f"{sorted(variables)}."
        )


def safe_name(name: str) -> str:
    """A name that neither the schema nor NetCDF refuses."""
    name = name.replace("/", ".")
    return f"{name}_" if name in RESERVED else name


def to_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    """A tensor's values as an array that NetCDF can store."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        return values.numpy()
    return np.asarray(values)


def _labels(name: str, size: int, coords: Mapping[str, Sequence[Any]]) -> np.ndarray:
    given = {safe_name(k): v for k, v in coords.items()}.get(name)
    if given is None:
        return np.arange(size)
    if len(given) != size:
        raise ValueError(
            f"coords has {len(given)} labels for dimension '{name}', whose size is {size}. "
            "Give one label per element."
        )
    return np.asarray(given)
