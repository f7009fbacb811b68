"""Which family describes which latent site: what the user asked for, and whether it fits."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import transforms

from pyro_mf._errors import FamilyError
from pyro_mf.density.sites import Layout, Site
from pyro_mf.families import FAMILIES, Family, get_family, nearest_name
from pyro_mf.families.discrete import DISCRETE_FAMILIES, DiscreteFamily
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.families.product import Part, Product
from pyro_mf.families.protocol import Params, event_dim_of, home_of, spans_site

OneFamily: TypeAlias = str | Family | DiscreteFamily
FamilySpec: TypeAlias = OneFamily | Mapping[str, OneFamily] | Callable[[Site], OneFamily]
"""A family for all sites, one per site by name, or a function of the site."""

AUTO = "auto"
_NAMES = [*FAMILIES, *DISCRETE_FAMILIES, AUTO]
# Of one parameter in double precision. An optimiser that remembers thirty steps holds sixty such.
_MAX_BLOCK_BYTES = 2**26


def read_spec(spec: FamilySpec) -> FamilySpec:
    """Look up the names in what the user asked for, before any model is seen.

    Raises:
        ValueError: If a name is unknown; says which there are, and the nearest.
        TypeError: If something is neither a name, a family, a mapping nor a function.
    """
    if isinstance(spec, str):
        return spec if spec == AUTO else _find(spec)
    if isinstance(spec, Mapping):
        return {_site_name(name): _read_one(name, family) for name, family in spec.items()}
    if isinstance(spec, Family) and not isinstance(spec, type):
        return spec
    if callable(spec) and not isinstance(spec, type | torch.distributions.Distribution):
        return spec
    raise TypeError(_described(spec))


def _site_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"family={{...}} takes names of sites, strings, as keys; got {name!r}.")
    return name


def _read_one(site: str, family: object) -> OneFamily:
    """The family of one site.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(family, str):
        return family if family == AUTO else _find(family)
    if isinstance(family, Family) and not isinstance(family, type):
        return family
    raise TypeError(f"site '{site}': {_described(family)}")


def _described(given: object) -> str:
    return (
        f"family must be a name ({', '.join(map(repr, _NAMES))}), an object with the methods of "
        "pyro_mf.families.Family, a dict of them by site, or a function of the site that returns "
        f"one; got {given!r}."
    )


def known_before_setup(spec: FamilySpec) -> Family | None:
    """The family, where it does not depend on the model's sites."""
    if isinstance(spec, str | Mapping) or not isinstance(spec, Family):
        return None
    return None if home_of(spec) or event_dim_of(spec) else spec


def resolve(spec: FamilySpec, layout: Layout) -> Family:
    """One family over a layout's flat vector.

    Args:
        spec: What :func:`read_spec` returned.
        layout: The latent sites.

    Raises:
        FamilyError: If a site is unknown, or its family does not fit its support.
    """
    known = known_before_setup(spec)
    if known is not None:
        return known
    if isinstance(spec, Mapping):
        _check_names(spec, layout)
    if not layout.sites:
        return get_family("normal")  # of no elements, beside factors of discrete sites
    grouped: dict[tuple[Family, int], list[Site]] = {}
    for site in layout.sites:
        family = family_of_site(spec, site)
        _check_fits(family, site)
        grouped.setdefault((family, _block_size(family, site)), []).append(site)
    if len(grouped) == 1:
        [(family, block_size)] = grouped
        if not event_dim_of(family):
            return family
    return Product(
        tuple(
            Part(family, _joined([(s.start, s.stop) for s in sites]), block_size)
            for (family, block_size), sites in grouped.items()
        )
    )


def settle(spec: FamilySpec, layout: Layout) -> FamilySpec:
    """What a function of the site said of each, so that it is asked once and need not be kept.

    Args:
        spec: What was asked for.
        layout: The latent sites.
    """
    if isinstance(spec, str | Mapping | Family) or not callable(spec):
        return spec
    return {site.name: _asked_for(spec, site) for site in layout.sites}


def open_sites(spec: FamilySpec, layout: Layout) -> frozenset[str]:
    """Sites whose family is left to a fit: those for which ``"auto"`` was asked."""
    return frozenset(site.name for site in layout.sites if _asked_for(spec, site) == AUTO)


def _asked_for(spec: FamilySpec, site: Site) -> OneFamily:
    """What was asked for at one site."""
    if isinstance(spec, Mapping):
        return spec.get(site.name, AUTO)
    if isinstance(spec, str | Family) or not callable(spec):
        return spec
    return _read_one(site.name, spec(site))


def family_of_site(spec: FamilySpec, site: Site) -> Family:
    """The family that was asked for at one site.

    Raises:
        ValueError: If a function gives an unknown name.
        TypeError: If it gives something else.
    """
    chosen = _asked_for(spec, site)
    if chosen == AUTO:
        return get_family("von_mises" if site.is_circular else "normal")
    return get_family(chosen)  # type: ignore[arg-type]


def kind_of_support(site: Site) -> str:
    """Name of the kind of a site's support, in the words of ``native_to``.

    ``"real"``, ``"circular"``, ``"positive"`` (also from another lower bound, or downwards),
    ``"unit_interval"`` (also another interval), ``"simplex"``, or the support's own name.
    """
    if site.is_circular:
        return "circular"
    if site.is_real:
        return "real"
    steps = _steps(site.transform)
    if steps and all(isinstance(x, transforms.AffineTransform) for x in steps[1:]):
        for kind, transform in _KINDS.items():
            if isinstance(steps[0], transform):
                return kind
    return str(site.support)


def is_canonical(site: Site) -> bool:
    """Whether a native family's own distribution has this very support, not a shifted one."""
    return kind_of_support(site) == "circular" or len(_steps(site.transform)) == 1


def own_family(family: Family, site: Site) -> Family:
    """One site's family, of a family over the whole flat vector."""
    return (
        family.parts[family.part_of(site.start)].family if isinstance(family, Product) else family
    )


def cut(family: Family, params: Params, site: Site) -> tuple[Family, Params]:
    """One site's family and its parameters, of shape ``(*batch, *extra)``.

    The batch is the site's unconstrained shape; for a block family its batch shape, or nothing
    where one block holds the whole site.

    Args:
        family: A family over the whole flat vector.
        params: Its parameters.
        site: The site.

    Returns:
        Of a mixture over the whole vector, whose elements are dependent, the marginals.
    """
    if isinstance(family, FactorisedMixture):
        family, params = family.marginals(params)
    start, stop, shape = site.start, site.stop, site.unconstrained_shape
    if isinstance(family, Product):
        index = family.part_of(start)
        part, params = family.parts[index], family.own_params(params)[index]
        start = part.local(start)
        stop = start + site.size
        family = part.family
        if event_dim_of(family):
            blocks = slice(start // part.block_size, stop // part.block_size)
            shape = shape[: len(shape) - site.unconstrained_event_dim]
            batch = shape if shape.numel() == stop // part.block_size - blocks.start else ()
            return family, tuple(p[blocks].reshape((*batch, *p.shape[1:])) for p in params)
    return family, tuple(p[start:stop].reshape((*shape, *p.shape[1:])) for p in params)


def param_index(family: Family, position: Tensor) -> tuple[Tensor, ...]:
    """Which entries of every parameter describe some elements of the flat vector.

    Args:
        family: A family over the whole vector.
        position: Positions of the elements, shape ``(d,)``; whole blocks of block families.

    Returns:
        For each parameter positions along its first dimension.
    """
    if not isinstance(family, Product):
        return (position,) * len(family.param_names)
    found: list[Tensor] = []
    for part in family.parts:
        where = torch.full((int(position.max()) + 1,), -1, device=position.device)
        offset = 0
        for start, stop in part.ranges:
            end = min(stop, len(where))
            if start < end:
                where[start:end] = torch.arange(offset, offset + end - start).to(where)
            offset += stop - start
        local = where[position]
        local = local[local >= 0]
        found += [local[:: part.block_size] // part.block_size] * len(part.family.param_names)
    return tuple(found)


_KINDS: dict[str, type[transforms.Transform]] = {
    "positive": transforms.ExpTransform,
    "unit_interval": transforms.SigmoidTransform,
    "simplex": transforms.StickBreakingTransform,
}
_NATIVE = {"positive": "positive", "unit_interval": "between 0 and 1", "simplex": "a simplex"}


def _steps(transform: transforms.Transform) -> list[transforms.Transform]:
    if isinstance(transform, transforms.IndependentTransform):
        return _steps(transform.base_transform)
    if isinstance(transform, transforms.ComposeTransform):
        return [step for part in transform.parts for step in _steps(part)]
    return [] if _is_identity(transform) else [transform]


def _is_identity(transform: transforms.Transform) -> bool:
    """Whether a transform is the shift by nothing that torch has in bijections to (0, inf)."""
    if not isinstance(transform, transforms.AffineTransform):
        return False
    return bool(torch.as_tensor((transform.loc == 0) & (transform.scale == 1)).all())


def _find(name: str) -> Family:
    """A family by name.

    Raises:
        ValueError: If there is none; says which there are, and the nearest.
    """
    if name in FAMILIES:
        return get_family(name)
    if name in DISCRETE_FAMILIES:
        raise ValueError(
            f"family {name!r} is for discrete sites, which ask for it by name: "
            f"family={{'k': {name!r}}}."
        )
    raise ValueError(
        f"Unknown family {name!r}. The families are {', '.join(map(repr, _NAMES))}; did you mean "
        f"{nearest_name(name)!r}?"
    )


def _check_names(spec: Mapping[str, OneFamily], layout: Layout) -> None:
    sites = [site.name for site in layout.sites]
    unknown = [name for name in spec if name not in sites]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sites, n=1, cutoff=0.4)
        raise FamilyError(
            f"family names site '{unknown[0]}', which is no latent site of the model. Its latent "
            f"sites are {sites}" + (f"; did you mean '{near[0]}'?" if near else ".")
        )


def _check_fits(family: Family, site: Site) -> None:
    home = home_of(family)
    if home is not None and home != kind_of_support(site):
        fitting = [
            name
            for name, kind in FAMILIES.items()
            if home_of(kind()) in (None, kind_of_support(site))
        ]
        raise FamilyError(
            f"family '{family.name}' is for sites whose support is "
            f"{_NATIVE.get(home, home)}; site '{site.name}' has support {site.support} "
            f"({kind_of_support(site)}). Families that fit there: {', '.join(fitting)}."
        )
    if not event_dim_of(family):
        return
    k = _block_size(family, site)
    if k == 1 and hasattr(family, "over") and not spans_site(family) and site.size > 1:
        raise FamilyError(
            f"family '{family.name}' over slices of site '{site.name}' would have blocks of one "
            "element. Take over='site' for one block of all, or 'normal'."
        )
    meta = torch.empty(site.size // k, k, device="meta", dtype=torch.float64)
    size = max(p.numel() for p in family.init(meta, meta)) * 8
    if size > _MAX_BLOCK_BYTES:
        smaller = "smaller blocks (over='slice'), " if spans_site(family) and site.plates else ""
        raise FamilyError(
            f"family '{family.name}' at site '{site.name}' needs a parameter of "
            f"{size / 2**20:.0f} MiB for blocks of {k} elements, more than the "
            f"{_MAX_BLOCK_BYTES / 2**20:.0f} MiB of which an optimiser can hold sixty. Take "
            f"{smaller}'low_rank', or 'normal'."
        )


def _block_size(family: Family, site: Site) -> int:
    """Elements of one block: of the event, or of the whole site."""
    if not event_dim_of(family):
        return 1
    if spans_site(family):
        return site.size
    event = site.unconstrained_shape[len(site.unconstrained_shape) - site.unconstrained_event_dim :]
    return event.numel()


def _joined(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges with neighbours that touch made one."""
    joined = ranges[:1]
    for (_, stop), (start, end) in itertools.pairwise(ranges):
        if stop == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
