"""The one file that knows the two generations of ArviZ.

ArviZ 0.x keeps results in its own ``InferenceData``, ArviZ 1.x in :class:`xarray.DataTree`. The
rest of the package builds plain :class:`xarray.Dataset` objects and wraps or reads them here.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr


def arviz_major() -> int:
    """Major version of the installed ArviZ, read without importing it.

    Raises:
        ImportError: If ArviZ is not installed.
    """
    try:
        version = importlib.metadata.version("arviz")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "converting results needs ArviZ (0.22 or later), which is not installed. "
            "Run: pip install 'arviz[h5netcdf,matplotlib]>=0.22,<2,!=1.0.*'"
        ) from error
    return int(version.split(".")[0])


def import_arviz() -> ModuleType:
    """Import ArviZ (about two seconds the first time) without its daily notice of 1.0."""
    arviz_major()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def wrap(datasets: Mapping[str, xr.Dataset], attrs: Mapping[str, Any] | None = None) -> Any:
    """Put groups together as the installed ArviZ wants them.

    Args:
        datasets: One dataset per group, in order; groups without variables are left out.
        attrs: Attributes of the whole result: strings, numbers or lists of strings.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x).

    Example:
        >>> import xarray as xr
        >>> draws = xr.Dataset({"mu": (("chain", "draw"), [[0.1, 0.2]])})
        >>> result = wrap({"posterior": draws})
        >>> groups(result)
        ['posterior']
        >>> dataset(result, "posterior")["mu"].shape
        (1, 2)
    """
    full = {group: ds for group, ds in datasets.items() if len(ds.data_vars)}
    if arviz_major() >= 1:
        import xarray as xr

        tree = xr.DataTree.from_dict(full)
        tree.attrs.update(attrs or {})
        return tree
    return import_arviz().InferenceData(attrs=dict(attrs or {}), **full)


def is_result(value: Any) -> bool:
    """Whether a value is an ``InferenceData`` or a ``DataTree``."""
    return _is_tree(value) or type(value).__name__ == "InferenceData"


def groups(result: Any) -> list[str]:
    """Names of the groups of a result, in order."""
    return list(result.children) if _is_tree(result) else list(result.groups())


def dataset(result: Any, group: str) -> xr.Dataset:
    """One group of a result.

    Args:
        result: An ``InferenceData`` or ``DataTree``.
        group: The group's name, such as ``"posterior"``.

    Raises:
        KeyError: If the result has no such group.
    """
    if group not in groups(result):
        raise KeyError(f"expected a group '{group}'; the result has {groups(result)}.")
    node = result[group]
    found: xr.Dataset = node.to_dataset() if _is_tree(node) else node
    return found


def load(path: str | Path) -> Any:
    """Read a result back from the NetCDF file that its ``to_netcdf`` wrote.

    Files are the same in both generations: what one writes the other reads.

    Args:
        path: The file.

    Returns:
        The result, in memory, as the installed ArviZ keeps it.
    """
    if arviz_major() >= 1:
        import xarray as xr

        with xr.open_datatree(path) as tree:
            return tree.load()
    return import_arviz().from_netcdf(str(path))


def _is_tree(value: Any) -> bool:
    import xarray as xr

    return isinstance(value, xr.DataTree)
