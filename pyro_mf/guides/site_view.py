"""Per-site views of a guide's flat parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_mf.density.sites import Site
from pyro_mf.guides.site_families import own_family

if TYPE_CHECKING:
    from pyro_mf.guides.flat_params import FlatParams


class SiteView(Mapping[str, Tensor]):
    """One parameter of a guide, site by site: ``guide.locs.theta`` or ``guide.locs["theta"]``.

    Tensors have the site's unconstrained shape. Reading is differentiable; assigning writes into
    the guide's flat parameter, which is how a guide is given a starting point by hand.
    """

    __slots__ = ("_guide", "_param", "_prefix")

    _guide: FlatParams
    _param: str
    _prefix: str

    def __init__(self, guide: FlatParams, param: str, prefix: str = "") -> None:
        object.__setattr__(self, "_guide", guide)
        object.__setattr__(self, "_param", param)
        object.__setattr__(self, "_prefix", prefix)

    def __getitem__(self, name: str) -> Tensor:
        site = self._guide.layout[self._prefix + name]
        return self._guide.site_family(site)[1][self._param]

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        site = self._guide.layout[self._prefix + name]
        self._guide.set_site_param(self._param, site, torch.as_tensor(value))

    def __iter__(self) -> Iterator[str]:
        for site in self._guide.layout.sites:
            if site.name.startswith(self._prefix) and self._has(site):
                yield site.name[len(self._prefix) :]

    def _has(self, site: Site) -> bool:
        """Whether a site's own family has this parameter."""
        return self._param in own_family(self._guide.family, site).param_names

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getattr__(self, name: str) -> Any:
        names = set(self)
        if name in names:
            return self[name]
        # A site called "layer.weight" is reached as layer.weight, as in Pyro's own autoguides.
        if any(other.startswith(f"{name}.") for other in names):
            return SiteView(self._guide, self._param, f"{self._prefix}{name}.")
        raise AttributeError(
            f"the guide has no latent site '{self._prefix}{name}'; it has "
            f"{[site.name for site in self._guide.layout.sites]}"
        )

    def __setattr__(self, name: str, value: Tensor | float) -> None:
        self[name] = value

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def __repr__(self) -> str:
        return f"SiteView({self._param}: {list(self)})"
