"""A model at one signature of arguments: vectorised over draws, and checked against eager Pyro."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_mf import _pyro
from pyro_mf._errors import CaptureWarning
from pyro_mf.density.capture import Backend, _first_line, capture_graph, check_backend
from pyro_mf.density.model_function import Inputs, ModelFunction
from pyro_mf.density.prototype import Prototype, run_prototype

# How a batch of draws is computed, fastest first. Each is tried, and checked, in turn.
#   vmap   the Python model under torch.func.vmap
#   graph  the model captured for one draw, its graph under vmap (in-place operations, own autograd
#          functions)
#   loop   the model once per draw inside the capture
#   eager  no capture: Pyro runs the model at every call
MODES = ("vmap", "graph", "loop", "eager")


class Program:
    """What is shared by all calls of a model with arguments of one shape.

    Args:
        model: A Pyro model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        backend: See :class:`~pyro_mf.density.capture.GraphFunction`.

    Attributes:
        prototype: The model's structure.
        mode: How draws are vectorised, one of ``vmap``, ``graph``, ``loop``, ``eager``.
        frozen: The argument tensors are constants of the graph, since control flow depends on them.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        backend: Backend = "auto",
    ) -> None:
        self.model = model
        self.backend = check_backend(backend)
        self.prototype: Prototype = run_prototype(model, args, kwargs)
        self.signature = signature(args, kwargs)
        self.function = ModelFunction(model, args, kwargs, self.prototype)
        self.mode = "eager"
        self._frozen_key: tuple[Any, ...] = ()
        if self.backend != "eager":
            self.mode = self._choose_mode(args, kwargs)

    @property
    def frozen(self) -> bool:
        """Whether the arguments' tensors are constants of the graph."""
        return self.function.frozen

    @property
    def graph_backend(self) -> Backend:
        """The backend for functions built on :meth:`batch`."""
        return "eager" if self.mode == "eager" else self.backend

    def matches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this program is right for these arguments and the model as it is now."""
        if signature(args, kwargs) != self.signature:
            return False
        if self.frozen and _identity(args, kwargs) != self._frozen_key:
            return False
        return all(
            _pyro.is_current_leaf(name, leaf, self.model)
            for name, leaf in self.prototype.params.items()
        )

    def inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: tuple[Tensor, ...] = ()
    ) -> Inputs:
        """The tensors that :meth:`batch` depends on, for these arguments."""
        return self.function.inputs(args, kwargs, indices)

    def batch(self, z: Tensor, inputs: Inputs) -> Tensor:
        """``log p(x, z)`` at each row of ``(S, D)``: shape ``(S,)``. Can be traced and differentiated."""
        return self._batch_in(self.mode, z, inputs)

    def _batch_in(self, mode: str, z: Tensor, inputs: Inputs) -> Tensor:
        with pyro.validation_enabled(False):
            if mode == "vmap":
                one = self.function.log_joint
                return torch.func.vmap(lambda row: one(row, inputs))(z)
            if mode == "graph":
                graph = self._graph_of_one_draw(z[0], inputs)
                flat = inputs.flat()
                return torch.func.vmap(lambda row: graph(row, *flat)[0])(z)
            return self.function.eager_batch(z, inputs)

    def _graph_of_one_draw(self, z: Tensor, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
        key = tuple(t.shape for t in inputs.flat())
        cache: dict[Any, Any] = self.__dict__.setdefault("_graphs", {})
        if key not in cache:
            def one(z: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                return (self.function.log_joint(z, inputs.unflatten(flat)),)

            examples = (torch.zeros_like(z), *inputs.flat())
            graph = capture_graph(one, examples)
            cache[key] = capture_graph(
                torch.func.functionalize(graph, remove="mutations"), examples
            )
        return cache[key]  # type: ignore[no-any-return]

    def _choose_mode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        reasons: list[str] = []
        for frozen in (False, True):
            if frozen:
                self.function = ModelFunction(
                    self.model, args, kwargs, self.prototype, frozen=True
                )
                self._frozen_key = _identity(args, kwargs)
                if not any(isinstance(x, Tensor) for x in tree_flatten((args, dict(kwargs)))[0]):
                    break
            check = _Check(self.function, args, kwargs)
            for mode in MODES[:-1]:
                try:
                    reason = check.compare(lambda z, i, m=mode: self._batch_in(m, z, i))
                except Exception as error:
                    reason = _first_line(error)
                if reason is None:
                    return mode
                reasons.append(reason)
                self.__dict__.pop("_graphs", None)
        self.function = ModelFunction(self.model, args, kwargs, self.prototype)
        warnings.warn(
            f"the model cannot be captured as a graph, so eager Pyro runs it at every call: "
            f"{reasons[0]}. Control flow on latent values, random operations and calls into NumPy "
            "are what to look for.",
            CaptureWarning,
            stacklevel=5,
        )
        return "eager"


class _Check:
    """Holds a vectorised form against the eager model at random points."""

    def __init__(
        self, function: ModelFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.function = function
        generator = torch.Generator().manual_seed(20)
        layout = function.prototype.layout
        indices = tuple(
            torch.randperm(p.full_size, generator=generator)[: p.size]
            for p in function.prototype.subsamples.values()
        )
        first = function.inputs(args, kwargs, indices)
        like = _like(first)
        z = torch.randn(3, layout.size, generator=generator, dtype=torch.float64)
        self.z = (0.5 * z).to(like)
        self.points = [first]
        if first.tensors:
            self.points.append(first._replace(tensors=_perturb(first.tensors, generator)))

    def compare(self, batch: Callable[[Tensor, Inputs], Tensor]) -> str | None:
        """``None`` where captured and eager agree in value and gradient, else what differs."""
        first = self.points[0]

        def with_gradient(z: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            return value_and_gradients(batch, z, first.unflatten(flat))

        graph = capture_graph(with_gradient, (self.z, *first.flat()))
        for number, inputs in enumerate(self.points):
            try:
                truth = value_and_gradients(self.function.eager_batch, self.z, inputs)
            except Exception:
                if number == 0:
                    raise
                continue  # the changed arguments are not valid for this model
            again = self.function.eager_batch(self.z, inputs)
            if not torch.equal(again.nan_to_num(), truth[0].nan_to_num()):
                return "the model's log density is random: two runs at the same point differ"
            with torch.no_grad():
                got = graph(self.z, *inputs.flat())
            reason = _difference(truth, got)
            if reason is not None:
                where = "" if number == 0 else " for other values of the arguments"
                return f"captured and eager {reason}{where}"
        return None


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What must be equal for two sets of arguments to share one graph."""
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    return str(tree), tuple(_leaf_key(x) for x in leaves)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if isinstance(leaf, np.ndarray):
        return (leaf.shape, str(leaf.dtype), leaf.tobytes())
    if isinstance(leaf, int | float | bool | str | bytes | type(None)):
        return (type(leaf), leaf)
    return (type(leaf), id(leaf))


def _identity(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves = tree_flatten((tuple(args), dict(kwargs)))[0]
    return tuple((id(x), x._version) for x in leaves if isinstance(x, Tensor))


def value_and_gradients(
    batch: Callable[[Tensor, Inputs], Tensor], z: Tensor, inputs: Inputs
) -> tuple[Tensor, ...]:
    """``batch(z, inputs)`` and its sum's gradients by ``z`` and by each parameter."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        params = tuple(p.detach().requires_grad_(True) for p in inputs.params)
        value = batch(z, inputs._replace(params=params))
        gradients = torch.autograd.grad(
            value.sum(), (z, *params), allow_unused=True, materialize_grads=True
        )
    return (value.detach(), *gradients)


def _difference(truth: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> str | None:
    for name, a, b in zip(("value", *["gradient"] * len(truth)), truth, got, strict=False):
        # Rounding of a sum of many terms; float32 keeps 1e-7 of the largest.
        tolerance = 1e-8 if a.dtype == torch.float64 else 2e-3
        scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True):
            gap = float((a - b).nan_to_num(torch.inf).abs().max())
            return f"{name}s differ by up to {gap:.3g}"
    return None


def _perturb(tensors: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    """Other values of the arguments' tensors, close enough to be valid for most models."""
    out = []
    for x in tensors:
        if x.is_floating_point():
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
            out.append(x * (1 + 0.01 * noise))
        else:
            out.append(x.flip(0) if x.dim() else x)
    return tuple(out)


def _like(inputs: Inputs) -> Tensor:
    for x in (*inputs.params, *inputs.tensors):
        if x.is_floating_point():
            return x
    return torch.empty(0)
