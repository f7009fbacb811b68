"""Guides whose parameters are flat: how they are set up, saved and copied."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, GuideNotSetUpError
from pyro_mf.density.sites import Layout
from pyro_mf.guides.discrete_factors import DiscreteSite, split_spec, without_discrete
from pyro_mf.guides.flat_params import FlatParams
from pyro_mf.guides.plates import MinibatchPlates
from pyro_mf.guides.prototype import InitFn, Model, Start, start_guide
from pyro_mf.guides.site_families import (
    FamilySpec,
    known_before_setup,
    resolve,
    settle,
)

_Self = TypeVar("_Self", bound="FlatGuide")


class FlatGuide(FlatParams):
    """The part of a guide that is set up and holds parameters, and does not yet run.

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
        self._discrete_spec = {site.name: site.family for site in start.discrete}
        self._family_spec = without_discrete(self._family_spec, start.summed_out)
        self._family_spec = settle(self._family_spec, start.layout)
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
