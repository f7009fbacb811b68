"""What can be wrong with a model's arguments and data, said at the door."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.supports import has_tensor_bounds
from pyro_mf.density.tracing import without_validation


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


def check_shapes(trace: Any) -> None:
    """Check that every site's batch shape is that of its plates, as Pyro's own objectives do.

    A column of data against a row of means broadcasts to a square, and the posterior is wrong.

    Raises:
        ModelError: If a site has batch dimensions that no plate declares.
    """
    for node in trace.nodes.values():
        if node["type"] == "sample" and not _pyro.is_subsample(node):
            with torch.no_grad():
                node["log_prob"] = without_validation(node["fn"]).log_prob(node["value"])
            try:
                _pyro.check_site_shape(node)
            except ValueError as error:
                raise ModelError(" ".join(str(error).split())) from error


def check_latents(latent: Mapping[str, Any]) -> None:
    """Check that every latent can be inferred at all.

    Raises:
        ModelError: If a latent is a point mass, or discrete without a finite support.
    """
    for name, node in latent.items():
        fn = node["fn"]
        if is_discrete(fn) and not fn.has_enumerate_support:
            raise ModelError(
                f"latent site '{name}' ({type(fn).__name__}) is discrete with an unbounded "
                f"support ({fn.support}), so it has no bijection to an unconstrained space and "
                "cannot be summed out. Marginalise it by hand, or bound its support."
            )
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        if isinstance(fn, dist.Delta):
            raise ModelError(
                f"latent site '{name}' is a Delta, a point mass without a density. Use "
                "pyro.deterministic for a value that is computed."
            )


def check_observed(trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the data of every observed site.

    Raises:
        ModelError: If data are outside their support, NaN or infinite, and not masked, or do not
            fit the site's distribution.
    """
    for name, node in trace.nodes.items():
        if not is_data(node):
            continue
        kind = type(node["fn"]).__name__
        value = node["value"]
        if not isinstance(value, Tensor):
            raise ModelError(
                f"observed site '{name}' ({kind}) needs a torch tensor as `obs=`; got "
                f"{type(value).__name__}. Convert it with torch.as_tensor."
            )
        try:
            with torch.no_grad():
                log_prob = without_validation(node["fn"]).log_prob(value)
                outside = invalid_data(node)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise ModelError(
                f"observed site '{name}' ({kind}) cannot score its data, values of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}: {headline(error)}. Check the "
                "values, shape and dtype given as `obs=`."
            ) from error
        if outside is not None and bool(outside.any()) and bool(torch.isfinite(value).all()):
            raise ModelError(
                f"observed site '{name}' ({kind}) cannot score its data: {int(outside.sum())} "
                f"values are outside its support {node['fn'].support}. Check what is given as "
                "`obs=`."
            )
        log_prob = _where_observed(node, log_prob)
        is_infinite = value.is_floating_point() and bool(value.isinf().any())
        if torch.isnan(log_prob).any() or (is_infinite and torch.isinf(log_prob).any()):
            raise ModelError(
                f"observed site '{name}' has a log probability that is not finite at "
                f"{int((~torch.isfinite(log_prob)).sum())} of {log_prob.numel()} elements; its data"
                f" hold {_describe(value)}{describe_arguments(args, kwargs)}. Remove missing "
                "values, or mask them with poutine.mask and put a valid number in their place."
            )


def invalid_data(node: Any) -> Tensor | None:
    """Where observed data are outside their support, masked elements apart.

    ``None`` where the support is not known or its bounds may depend on latents: a value outside is
    then no error but has density zero.
    """
    fn, value = node["fn"], node["value"]
    try:
        support = fn.support
    except NotImplementedError:
        return None
    if support is None or has_tensor_bounds(support) or not hasattr(support, "check"):
        return None
    try:
        outside = ~support.check(value)
    except NotImplementedError:
        return None
    return _where_observed(node, outside)


def _where_observed(node: Any, x: Tensor) -> Tensor:
    """Per batch element, zero where the site is masked."""
    if node["mask"] is None or node["mask"] is True:
        return x
    return torch.where(torch.as_tensor(node["mask"]), x, torch.zeros_like(x))


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is over discrete values."""
    return bool(fn.has_enumerate_support) or bool(getattr(fn.support, "is_discrete", False))


def headline(error: Exception) -> str:
    """The first line of an exception's message, without Pyro's table of shapes."""
    lines = [x.strip() for x in str(error).split("Trace Shapes")[0].splitlines() if x.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _describe(value: Tensor) -> str:
    if not value.is_floating_point():
        return "no missing values"
    nan, inf = int(value.isnan().sum()), int(value.isinf().sum())
    return f"{nan} NaN and {inf} infinite values" if nan or inf else "no missing values"


def describe_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Which arguments hold NaN or infinite values, in parentheses; else nothing."""
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
