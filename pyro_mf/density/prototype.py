"""One eager execution of the model: its structure, and everything that can be wrong at the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.checks import (
    check_latents,
    check_observed,
    check_shapes,
    check_signature,
    describe_arguments,
    headline,
    is_data,
    is_discrete,
)
from pyro_mf.density.fingerprint import fingerprint
from pyro_mf.density.sites import Layout, Plate
from pyro_mf.density.supports import check_supports_are_fixed, value_at_zero
from pyro_mf.density.tracing import GradientWatch


@dataclass(frozen=True)
class Prototype:
    """What one execution of a model shows.

    Args:
        layout: The continuous latent sites, plates at the size that this call subsamples.
        full_layout: The same with subsampled plates at their full size.
        discrete: Names of the latent sites that are summed out.
        max_plate_nesting: Number of batch dimensions that the model's plates use.
        plates: Vectorised plates around each sample site.
        event_dims: Event dimensions of each sample site.
        subsamples: Subsampled plates whose indices the model draws at random.
        sequential: Names of the plates that a Python loop visits only part of.
        given: Plates whose indices the model is given, in any order and number.
        observed: Names of the observed sites.
        params: Learnable parameters: name to unconstrained leaf tensor.
        has_side_effects: The model changed its own state when it ran, as BatchNorm does in
            training.
        has_foreign_gradients: The model uses tensors that require gradients and are not parameters
            in Pyro's sense: an argument, or a module that was not registered.
        dtype: Floating dtype of the latents.
        device: Device of the latents.
    """

    layout: Layout
    full_layout: Layout
    discrete: tuple[str, ...]
    max_plate_nesting: int
    plates: dict[str, tuple[Plate, ...]]
    event_dims: dict[str, int]
    subsamples: dict[str, Plate]
    sequential: tuple[str, ...]
    given: tuple[str, ...]
    observed: tuple[str, ...]
    params: dict[str, Tensor]
    has_side_effects: bool
    has_foreign_gradients: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def subsampled(self) -> tuple[str, ...]:
        """Names of the plates of which the model sees only part."""
        plates = {p.name: p for around in self.plates.values() for p in around}
        return tuple(n for n, p in plates.items() if p.is_subsampled) + self.sequential


def run_prototype(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Prototype:
    """Run ``model`` once, latents at the unconstrained zero, and read its structure.

    Nothing is sampled from a continuous prior, so improper priors are fine.

    Raises:
        ModelError: If the arguments do not fit, there is no latent site, a latent has neither a
            bijection nor an enumeration, a support depends on other latents, or the data are not
            finite or outside their support.
    """
    check_signature(model, args, kwargs)
    given: list[str] = []

    last_site: list[str] = []
    watch = GradientWatch()

    def run(value: Callable[[Any], Tensor]) -> Any:
        def put(msg: Any) -> None:
            if _pyro.is_subsample(msg):
                if msg["value"] is not None:
                    given.append(msg["name"])
                return
            last_site.append(msg["name"])
            if not msg["is_observed"] and not is_discrete(msg["fn"]):
                msg["value"], msg["done"] = value(msg), True

        with torch.no_grad(), poutine.block(), pyro.validation_enabled(True), watch:
            with _pyro.substitute(put):
                return poutine.trace(model).get_trace(*args, **kwargs)

    before = fingerprint(model)
    try:
        trace = run(value_at_zero)
    except ModelError as error:
        raise ModelError(str(error).split("Trace Shapes")[0].strip()) from error.__cause__
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        place = f"at or after site '{last_site[-1]}'" if last_site else "before its first site"
        raise ModelError(
            f"the model fails {place}, run with all latents at the unconstrained zero"
            f"{describe_arguments(args, kwargs)}: {headline(error)}."
        ) from error
    has_side_effects = fingerprint(model) != before
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not _pyro.is_subsample(node)
    }
    latent = {name: node for name, node in nodes.items() if not node["is_observed"]}
    if not latent:
        raise ModelError(
            "the model has no latent site: every pyro.sample statement is observed. "
            "Leave out `obs=` at the sites to infer."
        )
    check_latents(latent)
    discrete = tuple(n for n, node in latent.items() if is_discrete(node["fn"]))
    continuous = {n: node for n, node in latent.items() if n not in discrete}
    check_observed(trace, args, kwargs)
    check_shapes(trace)
    check_supports_are_fixed(continuous, run)
    like: Any = next((node["value"] for node in continuous.values()), torch.empty(0))
    plates = {n: plates_of(node) for n, node in nodes.items()}
    subsampled = {p.name: p for ps in plates.values() for p in ps if p.is_subsampled}
    params = {
        name: _pyro.param_leaf(node)
        for name, node in trace.nodes.items()
        if node["type"] == "param"
    }
    return Prototype(
        layout=Layout.from_trace(continuous),
        full_layout=Layout.from_trace(continuous, full_size=True),
        discrete=discrete,
        max_plate_nesting=max((-p.dim for ps in plates.values() for p in ps), default=0),
        plates=plates,
        event_dims={n: _event_dim(node) for n, node in nodes.items()},
        subsamples={n: p for n, p in subsampled.items() if n not in given},
        sequential=tuple(n for n in _pyro.subsampled_plates(trace) if n not in subsampled),
        given=tuple(dict.fromkeys(given)),
        observed=tuple(n for n, node in nodes.items() if is_data(node)),
        params=params,
        has_side_effects=has_side_effects,
        has_foreign_gradients=watch.saw_others_than(params.values()),
        dtype=like.dtype,
        device=like.device,
    )


def _event_dim(node: Any) -> int:
    if _pyro.is_deterministic(node):
        nesting = max((-p.dim for p in plates_of(node)), default=0)
        return max(0, int(node["value"].dim()) - nesting)
    return int(node["fn"].event_dim)


def plates_of(node: Any) -> tuple[Plate, ...]:
    """The vectorised plates around a site of a trace, outermost first.

    Args:
        node: The site.
    """
    plates = [
        Plate(f.name, f.dim, f.size, f.full_size or f.size)
        for f in node["cond_indep_stack"]
        if f.vectorized
    ]
    return tuple(sorted(plates, key=lambda p: p.dim))
