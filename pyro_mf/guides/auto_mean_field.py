"""``AutoMeanField``: one independent factor per element of every continuous latent site."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, GuideNotSetUpError, ModelError
from pyro_mf.density.sites import Layout, Site
from pyro_mf.families import Family, get_family
from pyro_mf.guides.plates import MinibatchPlates
from pyro_mf.guides.prototype import Start, init_to_origin, read_call, start_guide
from pyro_mf.guides.site_view import SiteView


class AutoMeanField(AutoGuide):  # type: ignore[misc]
    r"""Mean-field guide: :math:`q(z) = \prod_d q_d(z_d)` on the unconstrained space.

    Each latent site is sampled once, under its own name, from a distribution that can score any
    value: a factor on a real support, else a factor pushed through the support's bijection. There
    is no auxiliary site and no Delta, so every objective of Pyro's is right with it, those that
    score values the guide did not draw included.

    Latents that Pyro can enumerate are left out of the guide, for the objective to sum out (with
    stock objectives: ``TraceEnum_ELBO`` on ``config_enumerate(model)``).

    Parameters are flat, one tensor of shape ``(D,)`` per parameter of the family (``guide.loc``,
    ``guide.scale``); ``guide.locs.theta`` and ``guide.scales.theta`` read and write one site's part.
    Sites in subsampled plates have parameters for the full plate, and each call uses those of the
    elements that the model visits.

    Args:
        model: A Pyro model.
        family: Name of the factors' family, or an object with the methods of
            :class:`~pyro_mf.families.Family`.
        init_loc_fn: Per-site initial value in the model's space, as in Pyro's autoguides; the
            default is zero on the unconstrained axis and samples nothing.
        init_scale: Initial standard deviation on the unconstrained axis, positive.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: makes the plates that are
            subsampled by the guide instead of by the model.

    Raises:
        TypeError: If ``model`` or ``init_loc_fn`` cannot be called or ``init_scale`` is no number.
        ValueError: If ``init_scale`` is not positive or the family is unknown.

    Example:
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> guide = AutoMeanField(model).setup(torch.tensor([1.0, 3.0]))
        >>> guide.median()
        {'rate': tensor(1.)}

    References:
        Kucukelbir et al. (2017), Automatic Differentiation Variational Inference,
        https://arxiv.org/abs/1603.00788
    """

    def __init__(
        self,
        model: Callable[..., Any],
        family: str | Family = "normal",
        *,
        init_loc_fn: Callable[[Any], Tensor] = init_to_origin,
        init_scale: float | Tensor = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        for name, value in {"model": model, "init_loc_fn": init_loc_fn}.items():
            if not callable(value):
                raise TypeError(f"{name} must be callable; got {type(value).__name__}.")
        super().__init__(model, create_plates=create_plates)
        self.family = get_family(family)
        self.init_loc_fn = init_loc_fn
        self._init_scale = _positive_number(init_scale)
        self._layout: Layout | None = None
        self._minibatch = MinibatchPlates()
        self._calls: set[Any] = set()
        self._loaded_sites: dict[str, list[int]] | None = None

    # -- structure -----------------------------------------------------------------------------

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the guide was made for."""
        if self._model is None:
            raise GuideNotSetUpError(
                "this guide was unpickled, and a guide is pickled without its model. What needs "
                "only the guide works; to run the model, pass it, or make a new guide with it and "
                "load this one's state_dict()."
            )
        return self._model[0]  # type: ignore[no-any-return]

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector, subsampled plates at full size."""
        if self._layout is None:
            raise GuideNotSetUpError(
                "the guide has not seen its model run yet. Call guide.setup(*args, **kwargs) with "
                "the model's arguments first, or take one step of SVI."
            )
        return self._layout

    @property
    def is_set_up(self) -> bool:
        """Whether the guide has read its model."""
        return self._layout is not None

    @pyro_method  # type: ignore[untyped-decorator]
    def setup(self, *args: Any, **kwargs: Any) -> AutoMeanField:
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
        start = start_guide(self.model, self.init_loc_fn, args, kwargs)
        if self.master is not None:
            self.master()._check_prototype(start.trace)
        self._create_params(start)
        self._layout = start.layout
        self._minibatch = start.minibatch
        self._prototype_frames = start.frames
        self.prototype_trace = start.trace

    def _create_params(self, start: Start) -> None:
        names = self.family.param_names
        if all(f"{name}_unconstrained" in self._parameters for name in names):
            self._check_loaded(start.layout)  # a state_dict was loaded first
            return
        _pyro.own_parameters(self, names)
        values = self.family.init(start.loc, torch.full_like(start.loc, self._init_scale))
        for name, value, constraint in zip(names, values, self.family.constraints, strict=True):
            setattr(self, name, PyroParam(value, constraint))
        _pyro.own_parameters(self, names)
        self._check_sizes(start.layout)

    # -- parameters ----------------------------------------------------------------------------

    @pyro_method  # type: ignore[untyped-decorator]
    def flat_params(self) -> tuple[Tensor, ...]:
        """The family's parameters, each ``(D,)``, constrained and differentiable.

        Handlers around the call see them read, so ``SVI.step`` optimises them.
        """
        layout = self.layout
        _pyro.own_parameters(self, self.family.param_names)
        params = tuple(getattr(self, name) for name in self.family.param_names)
        if any(p.shape != (layout.size,) for p in params):
            self._check_sizes(layout)
        return params

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
        if name not in self.family.param_names:
            raise ValueError(
                f"family {self.family.name!r} has parameters {self.family.param_names}; got {name!r}."
            )
        return SiteView(self, name)

    def _set_site_param(self, param: str, site: Site, value: Tensor) -> None:
        index = self.family.param_names.index(param)
        flat = self.flat_params()[index]
        constraint = self.family.constraints[index]
        value = value.detach().to(flat).expand(site.unconstrained_shape)
        if not (bool(constraint.check(value).all()) and bool(torch.isfinite(value).all())):
            raise ValueError(
                f"{param} of site '{site.name}' must be finite and satisfy {constraint}; got {value}."
            )
        with torch.no_grad():
            unconstrained = self._parameters[f"{param}_unconstrained"]
            raw = transform_to(constraint).inv(value)
            unconstrained[site.start : site.stop] = raw.reshape(-1)

    # -- running as a Pyro guide -----------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, with the arguments of the model.

        Returns:
            Values by site name, in the model's space.
        """
        if not self.is_set_up:
            self._setup_prototype(*args, **kwargs)
        self._check_call(args, kwargs)
        params = self.flat_params()
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for site in self.layout.sites:
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate.name])
                result[site.name] = pyro.sample(site.name, self._factor(site, params, plates))
        return result

    def _factor(self, site: Site, params: tuple[Tensor, ...], plates: Mapping[str, Any]) -> Any:
        cut = []
        for flat in params:
            value = flat[site.start : site.stop].reshape(site.unconstrained_shape)
            cut.append(self._minibatch.take(value, site, plates))
        base = self.family.distribution(tuple(cut)).to_event(site.unconstrained_event_dim)
        if site.is_real:
            return base  # a plain factor, so that analytic KL divergences apply
        # The cache gives log_prob of a draw the very u it came from, where inverting is inexact.
        return dist.TransformedDistribution(base, [site.transform.with_cache(1)])

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None:
            plates = super()._create_plates(*args, **kwargs)
            self._minibatch.check_followed(plates, self._model, args, kwargs, self.layout)
            return plates  # type: ignore[no-any-return]
        given = _as_plates(self.create_plates(*args, **kwargs)) if self.create_plates else {}
        self.plates = self._minibatch.create(
            given, self._prototype_frames, self._model, args, kwargs, self.layout
        )
        return self.plates

    def _check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the model again when the arguments have shapes that were not seen before."""
        if self._model is None:
            return
        key = _call_key(args, kwargs)
        if key not in self._calls:
            self._minibatch = read_call(self.model, self.layout, self._minibatch, args, kwargs)
            self._calls.add(key)

    # -- densities, draws, summaries ---------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The guide as one distribution over the flat unconstrained vector ``(D,)``."""
        return self.family.distribution(self.flat_params()).to_event(1)

    def log_prob_unconstrained(self, z: Tensor) -> Tensor:
        """Log density of flat unconstrained vectors.

        Args:
            z: Shape ``(..., D)``.

        Returns:
            Shape ``(...)``, in nats.
        """
        return self.family.log_prob(self.flat_params(), z).sum(-1)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of values in the model's space, plates at full size.

        Args:
            values: For every site a tensor ``(..., *shape)``; leading dimensions must agree.

        Returns:
            Shape ``(...)``, in nats.

        Raises:
            GuideMismatchError: If a site is missing.
        """
        missing = [site.name for site in self.layout.sites if site.name not in values]
        if missing:
            raise GuideMismatchError(
                f"log_prob needs a value for every latent site of the guide; {missing} are missing "
                f"from {list(values)}."
            )
        z = self.layout.unconstrain(values)
        total = self.log_prob_unconstrained(z)
        unconstrained = self.layout.unpack(z)
        for site in self.layout.sites:
            if not site.is_real:
                log_det = site.log_abs_det(unconstrained[site.name], values[site.name])
                total = total - log_det.reshape(*total.shape, -1).sum(-1)
        return total

    @torch.no_grad()
    def sample_unconstrained(self, num_draws: int) -> Tensor:
        """Draw flat unconstrained vectors.

        Args:
            num_draws: Number of draws S, at least 1.

        Returns:
            Shape ``(S, D)``, without a gradient.
        """
        params = self.flat_params()
        like = params[0]
        noise = self.family.noise(
            (num_draws, self.layout.size), dtype=like.dtype, device=like.device
        )
        return self.family.transform(params, noise)

    def sample_posterior(self, num_draws: int) -> dict[str, Tensor]:
        """Draw values in the model's space, subsampled plates at full size.

        Args:
            num_draws: Number of draws S, at least 1.

        Returns:
            For every site a tensor ``(S, *shape)``, without a gradient.
        """
        return self.layout.constrain(self.sample_unconstrained(num_draws))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every latent site, plates at full size.

        For vector supports such as the simplex this is the image of the unconstrained medians.
        """
        layout = self.layout
        half = torch.tensor(0.5, dtype=torch.float64)
        return layout.constrain(self.family.quantile(self.flat_params(), half))

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every latent site, plates at full size.

        Args:
            quantiles: Q probabilities between 0 and 1.
            args: Not used; accepted as in Pyro's autoguides.
            kwargs: Not used.

        Returns:
            For every site a tensor ``(Q, *shape)``.

        Raises:
            ValueError: If a probability is not strictly between 0 and 1.
        """
        layout = self.layout
        p = torch.as_tensor(
            quantiles if isinstance(quantiles, Tensor) else list(quantiles), dtype=torch.float64
        ).reshape(-1, 1)
        if not bool(((p > 0) & (p < 1)).all()):
            raise ValueError(f"quantiles must lie strictly between 0 and 1; got {quantiles}.")
        params = self.flat_params()
        return layout.constrain(self.family.quantile(params, p.to(params[0].device)))

    # -- saving, loading, copying --------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The sites behind the flat parameters, so that a state cannot land in another model's guide.

        JSON in a byte tensor: whoever walks a ``state_dict`` expects tensors.
        """
        sites = _site_shapes(self._layout) if self._layout is not None else self._loaded_sites
        return torch.tensor(list(json.dumps(sites).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check or remember what :meth:`get_extra_state` saved."""
        self._loaded_sites = json.loads(bytes(state.tolist()).decode())
        if self._layout is not None:
            self._check_loaded(self._layout)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        extra = state_dict.get(f"{prefix}_extra_state")
        if extra is not None:
            self.set_extra_state(extra)  # refuse before anything is overwritten
        for name, constraint in zip(self.family.param_names, self.family.constraints, strict=True):
            saved = state_dict.get(f"{prefix}{name}_unconstrained")
            if saved is not None and not self.is_set_up:
                setattr(self, name, PyroParam(transform_to(constraint)(saved), constraint))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_loaded(self, layout: Layout) -> None:
        sites = _site_shapes(layout)
        if self._loaded_sites is not None and list(self._loaded_sites.items()) != list(
            sites.items()
        ):
            raise GuideMismatchError(
                f"the loaded state belongs to a guide for sites {self._loaded_sites}, this model "
                f"has {sites} (unconstrained shapes). Load it into a guide for the model that it "
                "was saved from."
            )
        self._check_sizes(layout)

    def _check_sizes(self, layout: Layout) -> None:
        for name in self.family.param_names:
            value = getattr(self, name)
            if value.shape != (layout.size,):
                raise GuideMismatchError(
                    f"parameter '{self._pyro_name}.{name}' has shape {tuple(value.shape)}, but the "
                    f"latent sites {[s.name for s in layout.sites]} have {layout.size} elements: "
                    "it was loaded from, or belongs to, another model's guide. Call "
                    "pyro.clear_param_store(), or load this model's parameters."
                )

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own autoguides forget their model here, on the live guide.
        model, master = self._model, self.master
        state: dict[str, Any] = dict(super().__getstate__())
        self._model, self.master = model, master
        return {**state, "_model": None, "master": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoMeanField:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
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


def _as_plates(plates: Any) -> dict[str, Any]:
    plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            raise ModelError(
                "create_plates must return a pyro.plate or an iterable of them; got "
                f"{type(plate).__name__}."
            )
    return {plate.name: plate for plate in plates}


def _site_shapes(layout: Layout) -> dict[str, list[int]]:
    return {site.name: list(site.unconstrained_shape) for site in layout.sites}


def _call_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Everything about a call that can change the shape of a plate."""
    leaves, tree = torch.utils._pytree.tree_flatten((args, dict(kwargs)))
    return str(tree), tuple(
        tuple(leaf.shape)
        if hasattr(leaf, "shape")
        else leaf
        if isinstance(leaf, int | str | None)
        else type(leaf)
        for leaf in leaves
    )
