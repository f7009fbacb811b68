"""What a guide reads off its model: where parameters live, where they start, what is subsampled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.prototype import run_prototype, value_at_zero
from pyro_mf.density.sites import Layout, Site
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.plates import MinibatchPlates


@dataclass(frozen=True)
class Start:
    """Where a guide starts.

    Args:
        layout: The latent sites, subsampled plates at full size.
        loc: Initial unconstrained values, shape ``(D,)``.
        trace: A trace of the model that holds the guide's sites only.
        frames: The vectorised plates around them, by name.
        minibatch: Which of the plates are subsampled.
    """

    layout: Layout
    loc: Tensor
    trace: Any
    frames: dict[str, Any]
    minibatch: MinibatchPlates


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
    model: Callable[..., Any],
    init_loc_fn: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Start:
    """Run the model and decide where a guide's parameters live and start.

    Raises:
        ModelError: If the model or its arguments are bad (see ``run_prototype``), if nothing is
            left for a guide, or if an initial value does not fit.
    """
    kwargs = accepted_kwargs(model, kwargs)
    prototype = run_prototype(model, args, kwargs)
    layout = prototype.full_layout
    if not layout.sites:
        raise ModelError(
            f"every latent site of the model is discrete ({list(prototype.discrete)}): nothing is "
            "left for a mean-field guide once they are summed out."
        )
    trace, given = trace_latents(model, layout, init_loc_fn, args, kwargs)
    frames = {}
    parts = {}
    for site in layout.sites:
        node = trace.nodes[site.name]
        for frame in node["cond_indep_stack"]:
            if frame.vectorized:
                frames[frame.name] = frame
            elif frame.full_size not in {None, frame.size}:
                raise ModelError(
                    f"latent site '{site.name}' is in the sequential plate '{frame.name}', which is "
                    "subsampled, so other sites exist at every call. Use a vectorised plate: "
                    f'with pyro.plate("{frame.name}", ...).'
                )
        parts[site.name] = _initial_loc(site, node)
    subsampled = {name for name, f in frames.items() if f.full_size not in {None, f.size}}
    minibatch = MinibatchPlates(frozenset(subsampled | (given & frames.keys())), given)
    return Start(layout, layout.pack(parts), trace, frames, minibatch)


def read_call(
    model: Callable[..., Any],
    layout: Layout,
    minibatch: MinibatchPlates,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> MinibatchPlates:
    """Check that a call with other arguments still has the guide's plates and shapes.

    Raises:
        GuideMismatchError: If a plate or a site has another size.
    """
    kwargs = accepted_kwargs(model, kwargs)
    trace, given = trace_latents(model, layout, init_to_origin, args, kwargs)
    nodes = {site.name: trace.nodes[site.name] for site in layout.sites if site.name in trace.nodes}
    now = Layout.from_trace(nodes)
    check_same_sites(now, Layout(tuple(site for site in layout.sites if site.name in nodes)))
    plates = {plate.name: plate for site in now.sites for plate in site.plates}
    subsampled = {name for name, plate in plates.items() if plate.is_subsampled}
    followed = minibatch.followed | subsampled | (given & plates.keys())
    return MinibatchPlates(frozenset(followed), minibatch.given | given)


def trace_latents(
    model: Callable[..., Any],
    layout: Layout,
    init_loc_fn: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Any, frozenset[str]]:
    """Run the model with its latents at chosen values.

    Returns:
        The trace of the layout's sites, and the names of the plates that were given their indices.
    """
    latents = {site.name for site in layout.sites}
    given = set()

    def start(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            if msg["value"] is not None:
                given.add(msg["name"])
        elif msg["name"] in latents and not msg["is_observed"]:
            msg["value"], msg["done"] = _initial_value(msg, init_loc_fn), True

    def is_other(msg: Any) -> bool:
        return msg["type"] != "sample" or msg["is_observed"] or msg["name"] not in latents

    with torch.no_grad(), poutine.block(), _pyro.substitute(start):
        trace = poutine.trace(poutine.block(model, hide_fn=_is_no_sample)).get_trace(
            *args, **kwargs
        )
    for name, node in list(trace.nodes.items()):
        if is_other(node):
            trace.remove_node(name)
    return trace, frozenset(given)


def accepted_kwargs(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out ``observations``, which Pyro's sleep phase hands to guides, where models lack it."""
    kwargs = dict(kwargs)
    if "observations" in kwargs:
        target = model.forward if isinstance(model, torch.nn.Module) else model
        parameters = inspect.signature(target).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "observations" not in parameters and not takes_any:
            del kwargs["observations"]
    return kwargs


def _is_no_sample(msg: Any) -> bool:
    return bool(msg["type"] != "sample")


def _initial_value(msg: Any, init_loc_fn: Callable[[Any], Tensor]) -> Tensor:
    value = init_loc_fn(msg)
    shape = msg["fn"].shape()
    try:
        return value.expand(shape)
    except (AttributeError, RuntimeError) as error:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(
            f"init_loc_fn must return a tensor that fits latent site '{msg['name']}', of shape "
            f"{tuple(shape)}; got {got}."
        ) from error


def _initial_loc(site: Site, node: Any) -> Tensor:
    value = node["value"].detach()
    loc = site.transform.inv(value).detach()
    if not bool(torch.isfinite(loc).all()):
        raise ModelError(
            f"init_loc_fn must return a value inside the support {site.support} of latent site "
            f"'{site.name}'; got {value}, which is not finite on the unconstrained axis."
        )
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and frame.full_size not in {None, frame.size}:
            dim = frame.dim - site.unconstrained_event_dim
            loc = periodic_repeat(loc, frame.full_size, dim)
    return loc
