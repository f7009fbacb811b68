"""One eager execution of the model: its structure, and everything that can be wrong at the door."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.sites import Layout, Plate
from pyro_mf.density.supports import check_supports_are_fixed, value_at_zero
from pyro_mf.density.tracing import without_validation


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
        given: Plates whose indices the model is given, in any order and number.
        observed: Names of the observed sites.
        params: Learnable parameters: name to unconstrained leaf tensor.
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
    given: tuple[str, ...]
    observed: tuple[str, ...]
    params: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    @property
    def subsampled(self) -> tuple[str, ...]:
        """Names of the plates of which the model sees only part."""
        plates = {p.name: p for around in self.plates.values() for p in around}
        return tuple(name for name, plate in plates.items() if plate.is_subsampled)


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

    def run(value: Callable[[Any], Tensor]) -> Any:
        def put(msg: Any) -> None:
            if _pyro.is_subsample(msg):
                if msg["value"] is not None:
                    given.append(msg["name"])
            elif not msg["is_observed"] and not _is_discrete(msg["fn"]):
                msg["value"], msg["done"] = value(msg), True

        with torch.no_grad(), poutine.block(), pyro.validation_enabled(True):
            with _pyro.substitute(put):
                return poutine.trace(model).get_trace(*args, **kwargs)

    try:
        trace = run(value_at_zero)
    except ModelError:
        raise
    except ValueError as error:
        reason = str(error).split("Trace Shapes")[0].strip()
        raise ModelError(
            f"the model cannot be run at its starting point (latents at the unconstrained zero)"
            f"{_describe_arguments(args, kwargs)}: {reason}"
        ) from error
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
    discrete = tuple(n for n, node in latent.items() if _is_discrete(node["fn"]))
    for name in discrete:
        _check_enumerable(name, latent[name])
    continuous = {n: node for n, node in latent.items() if n not in discrete}
    check_observed(trace, args, kwargs)
    check_supports_are_fixed(continuous, run)
    like: Any = next((node["value"] for node in continuous.values()), torch.empty(0))
    plates = {n: _plates(node) for n, node in nodes.items()}
    subsampled = {p.name: p for ps in plates.values() for p in ps if p.is_subsampled}
    return Prototype(
        layout=Layout.from_trace(continuous),
        full_layout=Layout.from_trace(continuous, full_size=True),
        discrete=discrete,
        max_plate_nesting=max((-p.dim for ps in plates.values() for p in ps), default=0),
        plates=plates,
        event_dims={n: _event_dim(node) for n, node in nodes.items()},
        subsamples={n: p for n, p in subsampled.items() if n not in given},
        given=tuple(dict.fromkeys(given)),
        observed=tuple(n for n, node in nodes.items() if is_data(node)),
        params={
            name: _pyro.param_leaf(node)
            for name, node in trace.nodes.items()
            if node["type"] == "param"
        },
        dtype=like.dtype,
        device=like.device,
    )


def is_data(node: Any) -> bool:
    """Whether a trace node is an observed site that has a likelihood."""
    return (
        node["type"] == "sample"
        and node["is_observed"]
        and not _pyro.is_deterministic(node)
        and not _pyro.is_factor(node)
    )


def check_signature(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check that the model can be called with these arguments.

    Raises:
        ModelError: If it cannot; says what it takes.
    """
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise ModelError(
            f"the arguments do not fit the model: {error}. Expected {name}{signature}; got "
            f"{len(args)} positional and keyword arguments {sorted(kwargs)}."
        ) from error


def check_observed(trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the data of every observed site.

    Raises:
        ModelError: If data are outside their support, NaN or infinite, and not masked.
    """
    for name, node in trace.nodes.items():
        if not is_data(node):
            continue
        value = node["value"]
        with torch.no_grad():
            log_prob = without_validation(node["fn"]).log_prob(value)
        if node["mask"] is not None:
            log_prob = torch.where(torch.as_tensor(node["mask"]), log_prob, 0.0)
        is_infinite = value.is_floating_point() and bool(value.isinf().any())
        if torch.isnan(log_prob).any() or (is_infinite and torch.isinf(log_prob).any()):
            raise ModelError(
                f"observed site '{name}' has a log probability that is not finite at "
                f"{int((~torch.isfinite(log_prob)).sum())} of {log_prob.numel()} elements; its data"
                f" hold {_describe(value)}{_describe_arguments(args, kwargs)}. "
                "Remove or mask the missing values (poutine.mask)."
            )
        try:
            with torch.no_grad():
                node["fn"].log_prob(value)
        except ValueError as error:
            raise ModelError(
                f"observed site '{name}' ({type(node['fn']).__name__}) cannot score its data: "
                f"{error} Check the values, shape and dtype given as `obs=`."
            ) from error


def _is_discrete(fn: Any) -> bool:
    return bool(fn.has_enumerate_support) or bool(getattr(fn.support, "is_discrete", False))


def _check_enumerable(name: str, node: Any) -> None:
    if not node["fn"].has_enumerate_support:
        raise ModelError(
            f"latent site '{name}' ({type(node['fn']).__name__}) is discrete with an unbounded "
            f"support ({node['fn'].support}), so it has no bijection to an unconstrained space and "
            "cannot be summed out. Marginalise it by hand, or bound its support."
        )


def _event_dim(node: Any) -> int:
    if _pyro.is_deterministic(node):
        nesting = max((-p.dim for p in _plates(node)), default=0)
        return max(0, int(node["value"].dim()) - nesting)
    return int(node["fn"].event_dim)


def _plates(node: Any) -> tuple[Plate, ...]:
    plates = [
        Plate(f.name, f.dim, f.size, f.full_size or f.size)
        for f in node["cond_indep_stack"]
        if f.vectorized
    ]
    return tuple(sorted(plates, key=lambda p: p.dim))


def _describe(value: Tensor) -> str:
    if not value.is_floating_point():
        return "no missing values"
    nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
    return f"{nan} NaN and {inf} infinite values" if nan or inf else "no missing values"


def _describe_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named = {f"argument {i}": value for i, value in enumerate(args)}
    named |= {f"'{name}'": value for name, value in kwargs.items()}
    bad = [
        f"{name} holds {_describe(value)}"
        for name, value in named.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and not bool(torch.isfinite(value).all())
    ]
    return f" ({'; '.join(bad)})" if bad else ""
