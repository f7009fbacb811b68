"""What a guide reads off its model: where parameters live, where they start, what is subsampled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.checks import is_discrete
from pyro_mf.density.prototype import plates_of, run_prototype
from pyro_mf.density.sites import Layout, Site
from pyro_mf.density.supports import value_at_zero
from pyro_mf.guides.discrete_factors import (
    DiscreteSite,
    DiscreteSpec,
    check_enumerable,
    read_discrete,
)
from pyro_mf.guides.matching import check_plates, check_same_sites
from pyro_mf.guides.plates import MinibatchPlates

Model = Callable[..., Any]
InitFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Start:
    """Where a guide starts.

    Args:
        layout: The latent sites, subsampled plates at full size.
        loc: Initial unconstrained values, shape ``(D,)``.
        trace: A trace of the model that holds the guide's sites only.
        frames: The vectorised plates around them, by name.
        minibatch: Which of the plates are subsampled.
        discrete: The discrete latent sites that have factors.
        summed_out: Names of those that have none.
    """

    layout: Layout
    loc: Tensor
    trace: Any
    frames: dict[str, Any]
    minibatch: MinibatchPlates
    discrete: tuple[DiscreteSite, ...] = ()
    summed_out: tuple[str, ...] = ()


def init_to_origin(site: Any = None) -> Any:
    """Start at zero on the unconstrained axis, without sampling from the prior.

    For use as ``init_loc_fn``. Improper priors, which cannot be sampled, are fine.

    Args:
        site: A site of a Pyro trace, or nothing.

    Returns:
        The site's value, or this function where no site is given (as Pyro's own do).
    """
    return init_to_origin if site is None else value_at_zero(site)


def start_guide(
    model: Model,
    whole_model: Model,
    init_loc_fn: InitFn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    discrete: DiscreteSpec | None = None,
) -> Start:
    """Run the model and decide where a guide's parameters live and start.

    Args:
        model: The guide's model, in a list of guides often a part of one with the rest blocked.
        whole_model: The list's model, which shows plates that blocking hides; else the same.
        init_loc_fn: Per-site initial value in the model's space.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        discrete: Families of discrete sites that are to have factors.

    Raises:
        ModelError: If the model or its arguments are bad (see ``run_prototype``), if nothing is
            left for a guide, or if an initial value does not fit.
        FamilyError: If a discrete site cannot have the factor that is asked for.
    """
    spec: DiscreteSpec = {} if discrete is None else discrete
    kwargs = _accepted_kwargs(model, kwargs)
    try:
        prototype = run_prototype(model, args, kwargs)
    except ModelError:
        if spec:
            check_enumerable(spec, _latents_as_drawn(model, args, kwargs))
        raise
    layout = prototype.full_layout
    names = prototype.discrete
    trace, given = _trace_latents(model, layout, init_loc_fn, args, kwargs, discrete=names)
    continuous = tuple(site.name for site in layout.sites)
    sites = read_discrete(spec, continuous, {name: trace.nodes[name] for name in names})
    own = {*continuous, *(site.name for site in sites)}
    if not own:
        raise ModelError(
            f"every latent site of the model is discrete ({list(names)}): nothing is left for a "
            "mean-field guide once they are summed out. For a factor that is not summed out, ask "
            f"for it by name: family={{'{names[0]}': 'categorical'}}."
        )
    summed_out = tuple(name for name in names if name not in own)
    for name in summed_out:
        trace.remove_node(name)
    if whole_model is not model:
        _, given = _trace_latents(whole_model, layout, init_to_origin, args, kwargs)
    frames = {name: frame for node in trace.nodes.values() for name, frame in _frames(node)}
    loc = torch.empty(0)
    if layout.sites:
        loc = layout.pack({s.name: _initial_loc(s, trace.nodes[s.name]) for s in layout.sites})
    subsampled = {name for name, frame in frames.items() if _is_subsampled(frame)}
    minibatch = MinibatchPlates(frozenset(subsampled | (given & frames.keys())), given)
    return Start(layout, loc, trace, frames, minibatch, sites, summed_out)


def _frames(node: Any) -> Iterator[tuple[str, Any]]:
    """Vectorised plates around a site, by name.

    Raises:
        ModelError: If the site is in a sequential plate that is subsampled.
    """
    for frame in node["cond_indep_stack"]:
        if frame.vectorized:
            yield frame.name, frame
        elif _is_subsampled(frame):
            raise ModelError(
                f"latent site '{node['name']}' is in the sequential plate '{frame.name}', which "
                "is subsampled, so other sites exist at every call. Use a vectorised plate: "
                f'with pyro.plate("{frame.name}", ...).'
            )


def read_call(
    model: Model,
    layout: Layout,
    minibatch: MinibatchPlates,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    discrete: tuple[DiscreteSite, ...] = (),
) -> MinibatchPlates:
    """Check that a call with other arguments still has the guide's plates and shapes.

    Returns:
        The plates to follow, those that only this call shows to be subsampled included.

    Raises:
        GuideMismatchError: If a plate or a site has another size.
    """
    kwargs = _accepted_kwargs(model, kwargs)
    names = tuple(site.name for site in discrete)
    trace, given = _trace_latents(model, layout, init_to_origin, args, kwargs, discrete=names)
    # Sites that this call does not visit, or visits besides, are for the objective to judge:
    # a model without its data, as in Predictive, has its observed sites as latents.
    now = Layout.from_trace({s.name: trace.nodes[s.name] for s in layout.sites if s.name in trace})
    check_same_sites(now, Layout(tuple(site for site in layout.sites if site.name in trace)))
    around = [site.plates for site in now.sites]
    for own in discrete:
        if own.name in trace:
            around.append(plates_of(trace.nodes[own.name]))
            check_plates(own.name, around[-1], own.plates)
    plates = {plate.name: plate for each in around for plate in each}
    subsampled = {name for name, plate in plates.items() if plate.is_subsampled}
    followed = minibatch.followed | subsampled | (given & plates.keys())
    return MinibatchPlates(frozenset(followed), minibatch.given | given)


def call_key(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Everything about a call that can change the size of a plate.

    Args:
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
    """
    leaves, tree = tree_flatten((args, dict(kwargs)))
    return str(tree), tuple(map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> Any:
    if hasattr(leaf, "shape"):
        return tuple(leaf.shape)
    return leaf if isinstance(leaf, int | str) else type(leaf)


class _AllKnown(Exception):
    """A signal: every plate asked for has been seen."""


def model_indices(
    model: Model,
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plates: frozenset[str],
) -> dict[str, Tensor]:
    """Ask the model which elements of its subsampled plates this call visits.

    The model runs, hidden from outer handlers, only until the last of these plates is made: what
    comes after it, usually the likelihood, is not computed.

    Returns:
        Long tensors by plate name. A plate that the model does not show is left out.
    """
    found: dict[str, Tensor] = {}
    latents = {site.name for site in layout.sites}

    def follow(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            if msg["value"] is None:
                msg["value"], msg["done"] = msg["fn"](), True
            found[msg["name"]] = torch.as_tensor(msg["value"])
            if plates <= found.keys():
                raise _AllKnown
        elif msg["name"] in latents and not msg["is_observed"]:
            msg["value"], msg["done"] = value_at_zero(msg), True

    try:
        with torch.no_grad(), poutine.block(), _pyro.substitute(follow):
            model(*args, **_accepted_kwargs(model, kwargs))
    except _AllKnown:
        pass
    return {name: found[name] for name in plates if name in found}


def _trace_latents(
    model: Model,
    layout: Layout,
    init_loc_fn: InitFn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    discrete: tuple[str, ...] = (),
) -> tuple[Any, frozenset[str]]:
    """A trace of the layout's sites at chosen values, and the plates that were given indices.

    Discrete sites are kept where they are named, as they were drawn.
    """
    latents = {site.name for site in layout.sites}
    kept = latents.union(discrete)
    given = set()

    def start(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            if msg["value"] is not None:
                given.add(msg["name"])
        elif msg["name"] in latents and not msg["is_observed"]:
            msg["value"], msg["done"] = _initial_value(msg, init_loc_fn), True

    with torch.no_grad(), poutine.block(), _pyro.substitute(start):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    for name, node in list(trace.nodes.items()):
        if node["type"] != "sample" or node["is_observed"] or name not in kept:
            trace.remove_node(name)
    return trace, frozenset(given)


def _latents_as_drawn(
    model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Latent sites of a model that has no density for us, continuous ones at the origin."""

    def put(msg: Any) -> None:
        if not (_pyro.is_subsample(msg) or msg["is_observed"] or is_discrete(msg["fn"])):
            msg["value"], msg["done"] = value_at_zero(msg), True

    try:
        with torch.no_grad(), poutine.block(), _pyro.substitute(put):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
    except (ModelError, ValueError, RuntimeError, IndexError, TypeError):
        return {}  # the error that is being handled says more
    return dict(trace.iter_stochastic_nodes())


def _accepted_kwargs(model: Model, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without ``observations``, which sleep phases hand to guides, where the model lacks it."""
    kwargs = dict(kwargs)
    if "observations" in kwargs:
        target = model.forward if isinstance(model, torch.nn.Module) else model
        parameters = inspect.signature(target).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "observations" not in parameters and not takes_any:
            del kwargs["observations"]
    return kwargs


def _is_subsampled(frame: Any) -> bool:
    return frame.full_size not in {None, frame.size}


def _initial_value(msg: Any, init_loc_fn: InitFn) -> Tensor:
    value = init_loc_fn(msg)
    shape = msg["fn"].shape()
    try:
        value = value.expand(shape)
    except (AttributeError, RuntimeError):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"init_loc_fn must return a tensor of shape {tuple(shape)} for latent site "
            f"'{msg['name']}'; got {got}."
        ) from None
    if not bool(msg["fn"].support.check(value).all()):
        raise ModelError(
            f"init_loc_fn must return a value in the support {msg['fn'].support} of latent site "
            f"'{msg['name']}'; got {value}."
        )
    return value


def _initial_loc(site: Site, node: Any) -> Tensor:
    """The unconstrained start of a site; a subsample's is repeated to the full plate.

    Raises:
        ModelError: If the start is on the support's boundary or beyond.
    """
    value = node["value"].detach()
    loc: Tensor = site.transform.inv(value).detach()
    if not bool(torch.isfinite(loc).all()):
        raise ModelError(
            f"init_loc_fn must return a value inside the support {site.support} of latent site "
            f"'{site.name}', not on its boundary; got {value}."
        )
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and _is_subsampled(frame):
            dim = frame.dim - site.unconstrained_event_dim
            loc = periodic_repeat(loc, frame.full_size, dim)
    return loc
