"""Discrete latent sites that a guide has factors for: which they are, and how they are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_mf._errors import FamilyError
from pyro_mf.density.checks import is_discrete
from pyro_mf.density.prototype import plates_of
from pyro_mf.density.sites import Plate, Site
from pyro_mf.families import Family
from pyro_mf.families.discrete import DISCRETE_FAMILIES, DiscreteFamily
from pyro_mf.guides.site_families import AUTO, FamilySpec, read_spec

Kind: TypeAlias = Literal["boolean", "integer", "one_hot"]
DiscreteSpec: TypeAlias = (
    DiscreteFamily | dict[str, DiscreteFamily] | Callable[[Site], str | Family | DiscreteFamily]
)
"""A family for all discrete sites, or one per site; sites without are summed out."""

_CHOICES = ", ".join(map(repr, DISCRETE_FAMILIES))


@dataclass(frozen=True)
class DiscreteSite:
    """One discrete latent site with a factor, subsampled plates at full size.

    Args:
        name: The site's name in the model.
        family: Family of its factor.
        kind: What its values are: 0 and 1, integers from 0, or one-hot vectors.
        num_values: Number K of values.
        shape: Shape of the site without the dimension of one-hot vectors.
        plates: Vectorised plates around the site, outermost first.
        dtype: Type of the site's values.
    """

    name: str
    family: DiscreteFamily
    kind: Kind
    num_values: int
    shape: torch.Size
    plates: tuple[Plate, ...]
    dtype: torch.dtype

    @property
    def param_name(self) -> str:
        """Name of the parameter in the guide; dots are not allowed there."""
        return f"{self.name.replace('.', '__')}_logits"

    def initial_logits(self, like: Tensor) -> Tensor:
        """Logits under which all values are equally probable."""
        weights = torch.zeros(*self.shape, self.num_values, dtype=like.dtype, device=like.device)
        return self.family.init(weights)[0]

    def distribution(self, logits: Tensor) -> Any:
        """The factor as one of Pyro's distributions over the site's own values.

        Args:
            logits: The family's parameter, for the elements that are visited.
        """
        log_probs = self.family.log_probs((logits,))
        if self.kind == "boolean":
            return dist.Bernoulli(logits=log_probs[..., 1] - log_probs[..., 0])
        if self.kind == "integer":
            return dist.Categorical(logits=log_probs)
        return dist.OneHotCategorical(logits=log_probs)

    def value_of(self, index: Tensor) -> Tensor:
        """The site's own values from their indices."""
        if self.kind == "one_hot":
            return torch.nn.functional.one_hot(index, self.num_values).to(self.dtype)
        return index.to(self.dtype)

    def index_of(self, value: Tensor) -> Tensor:
        """Indices of the site's values."""
        return value.argmax(-1) if self.kind == "one_hot" else value.long()


def split_spec(spec: FamilySpec) -> tuple[FamilySpec, DiscreteSpec]:
    """Part what was asked for into families of continuous and of discrete sites.

    Args:
        spec: What the user asked for, names not yet looked up.

    Returns:
        The families of continuous sites, as ``read_spec`` gives them, and those of discrete ones.

    Raises:
        ValueError: If a name is unknown.
        TypeError: If something is no family.
    """
    if _is_discrete(spec):
        return AUTO, _look_up(spec)
    if not isinstance(spec, Mapping):
        known = read_spec(spec)
        is_function = callable(known) and not isinstance(known, Family)
        # A function is asked about sites of both kinds.
        return known, cast(DiscreteSpec, known) if is_function else {}
    discrete = {name: _look_up(family) for name, family in spec.items() if _is_discrete(family)}
    return read_spec({n: f for n, f in spec.items() if n not in discrete}), discrete


def without_discrete(spec: FamilySpec, discrete: tuple[str, ...]) -> FamilySpec:
    """Families of continuous sites, after discrete ones with ``"auto"`` are taken out.

    Args:
        spec: Families of continuous sites.
        discrete: Names of the model's discrete latent sites.

    Raises:
        FamilyError: If a discrete site has a family of continuous ones.
    """
    if not isinstance(spec, Mapping):
        return spec
    for name in discrete:
        family = spec.get(name, AUTO)
        if family != AUTO:
            raise FamilyError(
                f"family '{getattr(family, 'name', family)}' is for continuous sites; site "
                f"'{name}' is discrete. Take {_CHOICES}, or leave it out to have it summed out."
            )
    return {name: family for name, family in spec.items() if name not in discrete}


def read_discrete(
    spec: DiscreteSpec, continuous: tuple[str, ...], nodes: Mapping[str, Any]
) -> tuple[DiscreteSite, ...]:
    """The discrete sites that get a factor, in the order in which the model visits them.

    Args:
        spec: Which families were asked for.
        continuous: Names of the model's continuous latent sites.
        nodes: Its discrete latent sites, as a trace shows them.

    Raises:
        FamilyError: If a site is unknown or continuous, or its family does not fit it.
    """
    if callable(spec):
        asked = {name: spec(_as_site(node)) for name, node in nodes.items()}
        spec = {name: _look_up(family) for name, family in asked.items() if _is_discrete(family)}
    if isinstance(spec, dict):
        for name, family in spec.items():
            _check_is_discrete(name, family, continuous, nodes)
        return tuple(_read_site(node, spec[name]) for name, node in nodes.items() if name in spec)
    if continuous:
        example = next(iter(nodes), "k")
        raise FamilyError(
            f"family '{spec.name}' is for discrete sites; site '{continuous[0]}' is continuous. "
            f"Say which sites are to have it: family={{'{example}': '{spec.name}'}}."
        )
    return tuple(_read_site(node, spec) for node in nodes.values())


def check_enumerable(spec: DiscreteSpec, nodes: Mapping[str, Any]) -> None:
    """Refuse a factor for a site whose values cannot be listed.

    Args:
        spec: Which families were asked for.
        nodes: The model's latent sites, as a trace shows them.

    Raises:
        FamilyError: If there is one.
    """
    for name, node in nodes.items():
        fn = node["fn"]
        family = None if callable(spec) else spec.get(name) if isinstance(spec, dict) else spec
        if family is None or not is_discrete(fn) or fn.has_enumerate_support:
            continue
        cure = (
            "Put its elements into a plate (without to_event) to have a factor for each."
            if isinstance(fn, torch.distributions.Independent)
            else "Bound its support (a Categorical over its first values), or marginalise it."
        )
        raise FamilyError(
            f"site '{name}' ({type(fn).__name__}) has no factor of family '{family.name}': its "
            f"values cannot be listed. {cure} Families of discrete sites: {_CHOICES}."
        )


def _as_site(node: Any) -> Site:
    """A discrete site as functions of the site are shown one."""
    fn, shape = node["fn"], node["value"].shape
    return Site(node["name"], fn.support, shape, shape, fn.event_dim, (), 0)


def _is_discrete(spec: object) -> bool:
    if isinstance(spec, str):
        return spec in DISCRETE_FAMILIES
    return isinstance(spec, DiscreteFamily) and not isinstance(spec, type)


def _look_up(family: Any) -> DiscreteFamily:
    return DISCRETE_FAMILIES[family]() if isinstance(family, str) else family


def _check_is_discrete(
    name: str, family: DiscreteFamily, continuous: tuple[str, ...], nodes: Mapping[str, Any]
) -> None:
    if name in continuous:
        raise FamilyError(
            f"family '{family.name}' is for discrete sites; site '{name}' is continuous. The "
            f"discrete latent sites are {list(nodes)}."
        )
    if name not in nodes:
        raise FamilyError(
            f"family names site '{name}', which is no latent site of the model. Its latent sites "
            f"are {[*continuous, *nodes]}, of which {list(nodes)} are discrete."
        )


def _read_site(node: Any, family: DiscreteFamily) -> DiscreteSite:
    name, fn = node["name"], node["fn"]
    kind, num_values, dtype = _read_values(name, fn)
    if family.native_to == "boolean" and kind != "boolean":
        raise FamilyError(
            f"family '{family.name}' is for sites of the values 0 and 1; site '{name}' "
            f"({type(fn).__name__}) has {num_values} values. Take 'categorical'."
        )
    wanted = getattr(family, "num_values", None) or num_values
    if wanted != num_values:
        raise FamilyError(
            f"family '{family.name}' was asked for {wanted} values; site '{name}' "
            f"({type(fn).__name__}) has {num_values}. Leave num_values out to have as many."
        )
    shape = list(fn.batch_shape)
    plates = []
    for plate in plates_of(node):
        shape[plate.dim] = plate.full_size
        plates.append(Plate(plate.name, plate.dim, plate.full_size, plate.full_size))
    return DiscreteSite(name, family, kind, num_values, torch.Size(shape), tuple(plates), dtype)


def _read_values(name: str, fn: Any) -> tuple[Kind, int, torch.dtype]:
    """What a site's values are, how many, and of which type.

    Raises:
        FamilyError: If they are not the integers from 0, nor one-hot vectors.
    """
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise FamilyError(
            f"site '{name}' ({type(fn).__name__}) cannot have a factor: {error}. Leave it out of "
            "family, or give all its elements the same values."
        ) from error
    count = len(values)
    if fn.event_shape == (count,) and torch.equal(
        values.reshape(count, count), torch.eye(count).to(values)
    ):
        return "one_hot", count, values.dtype
    integers = torch.arange(count).to(values)
    if fn.event_shape or not torch.equal(values.reshape(-1), integers):
        raise FamilyError(
            f"site '{name}' ({type(fn).__name__}) cannot have a factor: its values are not the "
            "integers from 0. Use a Categorical, and look its values up in a table."
        )
    is_boolean = fn.support is constraints.boolean
    return ("boolean" if is_boolean else "integer"), count, values.dtype
