"""The flat parameters of a guide: how they are made, named, read and written.

One tensor per parameter of the family, however many sites there are, because an optimiser pays for
every tensor and not for its length.
"""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf import _pyro
from pyro_mf._errors import FamilyError, GuideMismatchError, GuideNotSetUpError
from pyro_mf.density.sites import Layout, Site
from pyro_mf.families import Family
from pyro_mf.guides.site_families import (
    FamilySpec,
    cut,
    known_before_setup,
    open_sites,
    own_family,
    read_spec,
    resolve,
)
from pyro_mf.guides.site_view import SiteView


class FlatParams(AutoGuide):
    """The part of a guide that knows its family and holds the family's parameters."""

    _family_spec: FamilySpec
    _family: Family | None
    _known_shapes: tuple[int, list[torch.Size]] | None = None

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector, subsampled plates at full size."""
        raise NotImplementedError

    @property
    def family(self) -> Family:
        """The factors' family over the flat vector; sites' own families joined to one.

        Raises:
            GuideNotSetUpError: If it depends on the sites, and the guide has not seen them.
        """
        if self._family is None:
            raise GuideNotSetUpError(
                "the guide's families depend on the model's sites, and it has not seen its model "
                "run yet. Call guide.setup(*args, **kwargs) with the model's arguments first."
            )
        return self._family

    @property
    def families(self) -> dict[str, Family]:
        """Every site's own family, by the site's name."""
        return {site.name: own_family(self.family, site) for site in self.layout.sites}

    @property
    def open_sites(self) -> frozenset[str]:
        """Sites whose family is left to a fit (``"auto"``)."""
        return open_sites(self._family_spec, self.layout)

    @property
    def is_auto(self) -> bool:
        """Whether the choice of some family is left to a fit."""
        return bool(self.open_sites)

    def family_over(self, layout: Layout) -> Family:
        """The family over another layout of the same sites, such as a minibatch's.

        Args:
            layout: The layout.
        """
        return known_before_setup(self._family_spec) or resolve(self._family_spec, layout)

    @pyro_method
    def flat_params(self) -> tuple[Tensor, ...]:
        """The family's parameters, constrained and differentiable.

        Handlers around the call see them read, so ``SVI.step`` optimises them.
        """
        layout = self.layout
        _pyro.own_parameters(self, self._own_names)
        params = tuple(getattr(self, name) for name in self.family.param_names)
        if [p.shape for p in params] != self._shapes(layout):
            self._check_sizes(layout)
        return params

    @pyro_method
    def flat_leaves(self) -> tuple[Tensor, ...]:
        """The unconstrained leaf tensors behind :meth:`flat_params`.

        Handlers around the call see the parameters read, as with :meth:`flat_params`.
        """
        names, shapes = self.family.param_names, self._shapes(self.layout)
        leaves = tuple(self.get_parameter(f"{name}_unconstrained") for name in names)
        if _pyro.holds_parameters(self, self._own_names) and [x.shape for x in leaves] == shapes:
            for name, leaf in zip(names, leaves, strict=True):
                _pyro.emit_param(f"{self._pyro_name}.{name}", leaf)
            return leaves
        with torch.no_grad():
            self.flat_params()  # makes module and store agree
        return tuple(self.get_parameter(f"{name}_unconstrained") for name in names)

    @property
    def locs(self) -> SiteView:
        """Locations site by site, on the unconstrained axis."""
        return SiteView(self, "loc")

    @property
    def scales(self) -> SiteView:
        """Scales site by site, on the unconstrained axis."""
        return SiteView(self, "scale")

    def site_params(self, name: str) -> SiteView:
        """Any parameter of the family, site by site.

        Args:
            name: One of ``guide.family.param_names``.

        Raises:
            ValueError: If the family has no such parameter.
        """
        families = [own_family(self.family, site) for site in self.layout.sites]
        known = dict.fromkeys(param for family in families for param in family.param_names)
        if name not in known:
            raise ValueError(
                f"family {self.family.name!r} has parameters {tuple(known)}; got {name!r}."
            )
        return SiteView(self, name)

    def site_family(self, site: Site) -> tuple[Family, dict[str, Tensor]]:
        """One site's family, and its parameters by the family's names.

        Args:
            site: A site of the guide's layout.

        Returns:
            The family, and differentiable tensors of shape ``(*batch, *extra)``: the batch is the
            site's unconstrained shape, for a block family the number of its blocks.
        """
        family, own = cut(self.family, self.flat_params(), site)
        return family, dict(zip(family.param_names, own, strict=True))

    def set_site_param(self, param: str, site: Site, value: Tensor) -> None:
        """Write one site's part of a parameter; :class:`SiteView` assigns through this.

        Raises:
            KeyError: If the site's family has no such parameter.
            ValueError: If the value does not fit the site or the parameter's constraint.
        """
        family, own = self.site_family(site)
        old = own[param]
        index = family.param_names.index(param)
        constraint = _storage(family.constraints[index])
        try:
            value = value.detach().to(old).expand(old.shape)
        except RuntimeError:
            raise ValueError(
                f"{param} of site '{site.name}' has unconstrained shape {tuple(old.shape)}; got "
                f"{tuple(value.shape)}."
            ) from None
        if not bool(constraint.check(value).all() and torch.isfinite(value).all()):
            raise ValueError(
                f"{param} of site '{site.name}' must be finite and satisfy {constraint}; "
                f"got {value}."
            )
        with torch.no_grad():
            views = cut(self.family, self.flat_leaves(), site)[1]
            views[index].copy_(transform_to(constraint).inv(value))

    def adopt(self, family: FamilySpec, params: tuple[Tensor, ...] | None = None) -> None:
        """Change the factors' families, with new parameters in place of the old ones.

        Args:
            family: As for the guide itself.
            params: Parameters of the new families; by default the members nearest to the medians
                and spreads of the old ones.

        Raises:
            FamilyError: If a family does not fit its site.
        """
        spec = read_spec(family)
        new = resolve(spec, self.layout)
        old = tuple(p.detach() for p in self.flat_params())
        if params is None:
            at = torch.tensor([[0.158655], [0.5], [0.841345]]).to(old[0])
            low, median, high = self.family.quantile(old, at)
            params = new.init(median, (high - low) / 2)
        for name in self.family.param_names:
            delattr(self, name)
        self._family_spec, self._family, self._known_shapes = spec, new, None
        self._make_params(tuple(p.detach().to(old[0]) for p in params))
        self._check_sizes(self.layout)

    def _make_params(self, values: tuple[Tensor, ...]) -> None:
        """Create the parameters.

        Raises:
            FamilyError: If the guide has another attribute of the same name.
        """
        names = self.family.param_names
        taken = [name for name in names if hasattr(type(self), name)]
        if taken:
            raise FamilyError(
                f"family '{self.family.name}' calls a parameter '{taken[0]}', which is an "
                f"attribute of {type(self).__name__}. Give it another name."
            )
        for name, value, constraint in zip(names, values, self.param_constraints, strict=True):
            setattr(self, name, PyroParam(value, constraint))
        _pyro.own_parameters(self, self._own_names)

    @property
    def _own_names(self) -> tuple[str, ...]:
        """Names of all parameters of the guide."""
        return self.family.param_names

    def set_flat_params(self, params: tuple[Tensor, ...]) -> None:
        """Write the family's parameters, as :meth:`flat_params` gives them.

        Args:
            params: Constrained parameters in the family's order.

        Raises:
            ValueError: If one has another shape or does not satisfy its constraint.
        """
        for leaf, old, value, name, constraint in zip(
            self.flat_leaves(),
            self.flat_params(),
            params,
            self.family.param_names,
            self.param_constraints,
            strict=True,
        ):
            if value.shape != old.shape or not bool(constraint.check(value).all()):
                raise ValueError(
                    f"{name} must have shape {tuple(old.shape)} and satisfy {constraint}; got "
                    f"shape {tuple(value.shape)}: {value}."
                )
            with torch.no_grad():
                leaf.copy_(transform_to(constraint).inv(value.detach().to(leaf)))

    @property
    def param_constraints(self) -> tuple[constraints.Constraint, ...]:
        """How parameters are stored: positive ones through softplus, as in Pyro's AutoNormal."""
        return tuple(map(_storage, self.family.constraints))

    def _shapes(self, layout: Layout) -> list[torch.Size]:
        """Shapes of the parameters over a layout."""
        if self._known_shapes is None or self._known_shapes[0] != layout.size:
            ones = torch.ones(layout.size)
            shapes = [p.shape for p in self.family_over(layout).init(torch.zeros_like(ones), ones)]
            self._known_shapes = (layout.size, shapes)
        return self._known_shapes[1]

    def _check_sizes(self, layout: Layout) -> None:
        for name, expected in zip(self.family.param_names, self._shapes(layout), strict=True):
            value = getattr(self, name)
            if value.shape != expected:
                raise GuideMismatchError(
                    f"parameter '{self._pyro_name}.{name}' has shape {tuple(value.shape)}, but the "
                    f"latent sites {[s.name for s in layout.sites]} have {layout.size} elements, "
                    f"for which it has shape {tuple(expected)}: it was loaded from, or belongs to, "
                    "another model's guide. Call pyro.clear_param_store(), or load this model's "
                    "parameters."
                )


def _storage(constraint: constraints.Constraint) -> constraints.Constraint:
    return constraints.softplus_positive if constraint is constraints.positive else constraint
