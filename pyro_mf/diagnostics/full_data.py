"""A model that subsamples its data, run on all of them.

Importance weights of a minibatch are noise: its log density stands for the full one with an error
of many nats, which the weights exponentiate. Whatever rests on weights needs the full density.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.density.checks import headline, is_data
from pyro_mf.density.prototype import Prototype, plates_of, run_prototype
from pyro_mf.density.sites import Plate

_ADVICE = (
    "Give the full data as model_args, and let the model take its minibatch by the plate's own "
    'indices, as in `with pyro.plate("data", len(x), subsample_size=100) as index: ... x[index]`. '
    "Indices that the caller hands in have to be all of them, torch.arange(len(x))."
)


class FullData:
    """A model whose plates visit all of their elements; see :func:`on_full_data`.

    Args:
        model: The model.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        update_wrapper(self, model, updated=())
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with _pyro.full_plates():
            return self.model(*args, **kwargs)


class FullDataModule(torch.nn.Module):
    """The same for a model that is a module, with its parameters.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.__signature__ = inspect.signature(model.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with _pyro.full_plates():
            return self.model(*args, **kwargs)


def on_full_data(
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The model with every subsampled plate at its full size, for :class:`~pyro_mf.LogJoint`.

    It works where the model takes its minibatch by the plate's indices (``x[index]``, or
    ``pyro.subsample``). That it does is checked, not believed: at a minibatch and one point every
    site's log density must be that of the full model at the same indices.

    Cost: five runs of the model. Where it lies: not at all in what it compares, one random point
    and one minibatch. While it runs, plates that other threads create are full, too.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments: the full data.
        model_kwargs: Its keyword arguments.

    Returns:
        A model for the same arguments; the model itself where it subsamples nothing.

    Raises:
        ModelError: If the model takes its minibatch in any other way: data that are handed in as a
            minibatch, indices of its own, or a factor outside of the plate.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_mf.density import LogJoint
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x), subsample_size=10) as index:
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])
        >>> x = torch.zeros(1000)
        >>> LogJoint(on_full_data(model, (x,)), (x,))(torch.zeros(1)).round().item()
        -920.0
    """
    kwargs = dict(model_kwargs or {})
    part = run_prototype(model, model_args, kwargs)
    subsampled = _subsampled(model, part, model_args, kwargs)
    if not subsampled:
        return model
    full: Callable[..., Any]
    full = FullDataModule(model) if isinstance(model, torch.nn.Module) else FullData(model)
    name = next(iter(subsampled))
    try:
        whole = run_prototype(full, model_args, kwargs)
    except ModelError as error:
        raise ModelError(
            f"the model cannot be run on the full data: with plate '{name}' at its full size, "
            f"{headline(error)}. {_ADVICE}"
        ) from error
    _check_indices(model, full, whole, model_args, kwargs, subsampled)
    return full


def _subsampled(
    model: Callable[..., Any], part: Prototype, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Plates that the model sees part of, sequential ones included, with some indices."""
    zeros = part.layout.constrain(
        torch.zeros(part.layout.size, dtype=part.dtype, device=part.device)
    )
    return _pyro.subsampled_plates(_run(model, args, kwargs, zeros, {}))


def _check_indices(
    model: Callable[..., Any],
    full: Callable[..., Any],
    whole: Prototype,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: dict[str, Tensor],
) -> None:
    """Compare the log densities of a minibatch to those of the full model at its indices.

    Raises:
        ModelError: If they differ.
    """
    generator = torch.Generator().manual_seed(0)
    z = 2.0 * torch.rand(whole.layout.size, generator=generator, dtype=whole.dtype) - 1.0
    values = whole.layout.constrain(z.to(whole.device))
    at_full = _run(full, args, kwargs, values, {})
    latents = {
        name: _take(node, node["value"], indices, event_dim=node["fn"].event_dim)
        for name, node in at_full.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _pyro.is_subsample(node)
    }
    at_part = _run(model, args, kwargs, latents, indices)
    for name, node in at_part.nodes.items():
        if node["type"] != "sample" or _pyro.is_subsample(node) or _pyro.is_deterministic(node):
            continue
        twin = at_full.nodes.get(name)
        if twin is None or not _agree(node, twin, indices):
            raise ModelError(
                f"site '{name}' does not take its minibatch by the indices of its plate "
                f"({', '.join(map(repr, indices))}): its log density at a minibatch is not that of "
                f"the full model at the same indices. {_ADVICE}"
            )


def _agree(node: Any, twin: Any, indices: dict[str, Tensor]) -> bool:
    around = plates_of(node)
    if is_data(node) and any(_is_blind(twin["value"], twin["fn"], p) for p in around):
        return False
    expected = _take(twin, twin["unscaled_log_prob"], indices, event_dim=0)
    found = node["unscaled_log_prob"]
    if expected.dim() != found.dim():
        expected = expected.expand_as(found) if expected.dim() < found.dim() else expected
    tolerance = 1e3 * torch.finfo(found.dtype).eps
    try:
        return torch.allclose(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except RuntimeError:  # shapes that do not broadcast
        return False


def _is_blind(value: Tensor, fn: Any, plate: Plate) -> bool:
    """Whether a minibatch of one is there for all elements of the full plate."""
    if plate.size != 1 or plate.full_size == 1:
        return False
    dim = plate.dim - int(fn.event_dim)
    return value.dim() < -dim or value.shape[dim] != plate.full_size


def _take(node: Any, value: Tensor, indices: dict[str, Tensor], *, event_dim: int) -> Tensor:
    """The elements of a tensor of the full model that a minibatch visits."""
    for plate in plates_of(node):
        dim = plate.dim - event_dim
        if plate.name in indices and value.dim() >= -dim and value.shape[dim] == plate.full_size:
            value = value.index_select(dim, indices[plate.name].to(value.device))
    return value


def _run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
) -> Any:
    """A trace with log densities, at values of latents and at indices of plates that draw them."""

    def put(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            if msg["value"] is None and msg["name"] in indices:
                msg["value"] = indices[msg["name"]]
        elif msg["name"] in values and not msg["is_observed"]:
            msg["value"], msg["done"] = values[msg["name"]], True

    with _quiet(), _pyro.substitute(put):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    return trace


@contextmanager
def _quiet() -> Iterator[None]:
    """No gradients, no handlers around us, no check of values, the same draws every time."""
    with forked_seed(0), torch.no_grad(), cast(Any, poutine.block()):
        with pyro.validation_enabled(False):
            yield
