"""Guides whose parameters are flat: how they are made, named, read, saved and copied.

One parameter tensor per parameter of the family, however many sites there are, because an optimiser
pays for every tensor and not for its length.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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
from pyro_mf.guides.discrete_factors import DiscreteSite, split_spec, without_discrete
from pyro_mf.guides.plates import MinibatchPlates
from pyro_mf.guides.prototype import InitFn, Model, Start, start_guide
from pyro_mf.guides.site_families import (
    AUTO,
    FamilySpec,
    cut,
    known_before_setup,
    own_family,
    read_spec,
    resolve,
)
from pyro_mf.guides.site_view import SiteView

_Self = TypeVar("_Self", bound="FlatGuide")


class FlatGuide(AutoGuide):
    """The part of a guide that holds parameters, and does not yet run.

    Args:
        model: A Pyro model.
        family: Name of a family, an object with the methods of ``Family``, a dict of them by site,
            or a function of the site.
        init_loc_fn: Per-site initial value in the model's space.
        init_scale: Initial scale on the unconstrained axis, positive.
        create_plates: As in Pyro's ``AutoGuide``.

    Raises:
        TypeError: If ``model`` or ``init_loc_fn`` cannot be called or ``init_scale`` is no number.
        ValueError: If ``init_scale`` is not positive or the family is unknown.
    """

    def __init__(
        self,
        model: Model,
        family: FamilySpec,
        *,
        init_loc_fn: InitFn,
        init_scale: float | Tensor,
        create_plates: Callable[..., Any] | None,
    ) -> None:
        for name, value in {"model": model, "init_loc_fn": init_loc_fn}.items():
            if not callable(value):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}.")
        super().__init__(model, create_plates=create_plates)  # type: ignore[no-untyped-call]
        self._family_spec, self._discrete_spec = split_spec(family)
        self._discrete: tuple[DiscreteSite, ...] = ()
        self._family = known_before_setup(self._family_spec)
        self.init_loc_fn = init_loc_fn
        self.init_scale = _positive_number(init_scale)
        self._layout: Layout | None = None
        self._minibatch = MinibatchPlates()
        self._loaded_sites: dict[str, list[int]] | None = None
        self._known_shapes: tuple[int, list[torch.Size]] | None = None

    @property
    def model(self) -> Model:
        """The model that the guide was made for.

        Raises:
            GuideNotSetUpError: If the guide lost it in pickling.
        """
        if self._model is None:
            raise GuideNotSetUpError(
                "this guide was unpickled, and a guide is pickled without its model. What needs "
                "only the guide works; to run the model, pass it, or make a new guide with it and "
                "load this one's state_dict()."
            )
        return self._model[0]  # type: ignore[no-any-return]

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
    def is_auto(self) -> bool:
        """Whether the choice of families is left to a fit."""
        return self._family_spec == AUTO

    def family_over(self, layout: Layout) -> Family:
        """The family over another layout of the same sites, such as a minibatch's.

        Args:
            layout: The layout.
        """
        return known_before_setup(self._family_spec) or resolve(self._family_spec, layout)

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector, subsampled plates at full size.

        Raises:
            GuideNotSetUpError: If the guide has not seen its model run.
        """
        if self._layout is None:
            raise GuideNotSetUpError(
                "the guide has not seen its model run yet. Call guide.setup(*args, **kwargs) with "
                "the model's arguments first, or take one step of SVI."
            )
        return self._layout

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has seen its model run."""
        return self._layout is not None

    @pyro_method
    def setup(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """Read the model's structure and create the parameters; a second call does nothing.

        Args:
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.

        Returns:
            The guide itself.
        """
        if not self.is_set_up:
            self._setup_prototype(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        start = start_guide(
            self.model, self._whole_model(), self.init_loc_fn, args, kwargs, self._discrete_spec
        )
        if self.master is not None and self.master().prototype_trace is not None:
            self.master()._check_prototype(start.trace)
        self._discrete = start.discrete
        self._family_spec = without_discrete(self._family_spec, start.summed_out)
        self._family = resolve(self._family_spec, start.layout)
        self._create_params(start)
        self._layout = start.layout
        self._minibatch = start.minibatch
        self._prototype_frames = start.frames
        self.prototype_trace = start.trace

    def _whole_model(self) -> Model:
        """In an ``AutoGuideList`` the list's model: blocking may hide plates in a member's own."""
        return self.model if self.master is None else self.master().model

    def _create_params(self, start: Start) -> None:
        names = self._own_names
        if all(f"{name}_unconstrained" in self._parameters for name in names):
            self._check_loaded(start.layout)  # a state_dict came first
            return
        _pyro.own_parameters(self, names)
        values = self.family.init(start.loc, torch.full_like(start.loc, self.init_scale))
        self._make_params(values)
        self._check_sizes(start.layout)

    # -- parameters --------------------------------------------------------------------------

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

    # -- saving, loading, copying --------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The sites behind the flat parameters, so that states do not land in the wrong guide.

        JSON in a byte tensor: whoever walks a ``state_dict`` expects tensors.
        """
        layout = self._layout
        sites = self._saved_shapes(layout) if layout is not None else self._loaded_sites
        return torch.tensor(list(json.dumps(sites).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check or remember what :meth:`get_extra_state` saved."""
        self._loaded_sites = json.loads(bytes(state.tolist()).decode())
        if self._layout is not None:
            self._check_loaded(self._layout)

    def _saved_shapes(self, layout: Layout) -> dict[str, list[int]]:
        return {site.name: list(site.unconstrained_shape) for site in layout.sites}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        extra = state_dict.get(f"{prefix}_extra_state")
        if extra is not None:
            self.set_extra_state(extra)  # refuse before anything is overwritten
        for name, constraint in zip(self.family.param_names, self.param_constraints, strict=True):
            saved = state_dict.get(f"{prefix}{name}_unconstrained")
            if saved is not None and not self.is_set_up:
                setattr(self, name, PyroParam(transform_to(constraint)(saved), constraint))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_loaded(self, layout: Layout) -> None:
        sites = self._saved_shapes(layout)
        loaded = self._loaded_sites
        if loaded is not None and list(loaded.items()) != list(sites.items()):
            raise GuideMismatchError(
                f"the loaded state belongs to a guide for sites {loaded}, this model has {sites} "
                "(unconstrained shapes). Load it into a guide for the model it was saved from."
            )
        self._check_sizes(layout)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own autoguides forget their model here, on the live guide.
        model, master = self._model, self.master
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[no-untyped-call]
        self._model, self.master = model, master
        return {**state, "_model": None, "master": None, "plates": {}}

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        clone._model = self._model
        return clone


def _storage(constraint: constraints.Constraint) -> constraints.Constraint:
    return constraints.softplus_positive if constraint is constraints.positive else constraint


def _positive_number(value: float | Tensor) -> float:
    expected = "init_scale must be a positive number, the initial sd on the unconstrained axis"
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{expected}; got a tensor of shape {tuple(value.shape)}.")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{expected}; got {value!r}.")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{expected}; got {value}.")
    return float(value)
