"""A model at one signature of arguments: vectorised over draws, and checked against eager Pyro."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_mf import _pyro
from pyro_mf._errors import CaptureWarning
from pyro_mf.density.capture import (
    Backend,
    GraphFunction,
    PureFunction,
    capture_graph,
    check_backend,
    first_line,
)
from pyro_mf.density.fingerprint import fingerprint
from pyro_mf.density.model_function import Inputs, ModelFunction
from pyro_mf.density.prototype import Prototype, run_prototype

# How a batch of draws is computed, fastest first. Each is tried, and checked, in turn.
#   vmap   the Python model under torch.func.vmap
#   graph  the model captured for one draw, its graph under vmap (in-place operations, autograd
#          functions of one's own)
#   loop   the model once per draw inside the capture
#   eager  no capture: Pyro runs the model at every call
Mode = Literal["vmap", "graph", "loop", "eager"]
_CAPTURED: tuple[Mode, ...] = ("vmap", "graph", "loop")

Batch = Callable[[Tensor, Inputs], Tensor]

# The eager model runs one draw after another; beyond this many the check takes a few of them.
_MAX_CHECKED_DRAWS, _FEW_DRAWS = 16, 2


class Program:
    """What is shared by all calls of a model with arguments of one shape.

    Args:
        model: A Pyro model.
        args: Positional arguments.
        kwargs: Keyword arguments.
        backend: See :class:`~pyro_mf.density.capture.GraphFunction`; ``"eager"`` captures nothing.
        checks_data: As in :class:`ModelFunction`.

    Attributes:
        prototype: The model's structure.
        mode: How draws are vectorised: ``vmap``, ``graph``, ``loop`` or ``eager``. It is known, and
            checked, from the first capture on.
        function: The model as a pure function of one draw.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        backend: Backend = "auto",
        checks_data: bool = False,
    ) -> None:
        self.model = model
        self.backend = check_backend(backend)
        self.prototype: Prototype = run_prototype(model, args, kwargs)
        self._checks_data = checks_data
        self.function = self._make_function(args, kwargs)
        self.mode: Mode = "eager" if self.backend == "eager" else "vmap"
        self.is_checked = self.backend == "eager"
        self._signature = signature(args, kwargs)
        self._arguments = (args, kwargs)
        self._identity = _identity(args, kwargs)
        self._fingerprint = fingerprint(model)
        self._graphs: dict[Any, PureFunction] = {}

    def _make_function(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_frozen: bool = False
    ) -> ModelFunction:
        return ModelFunction(
            self.model,
            args,
            kwargs,
            self.prototype,
            is_frozen=is_frozen,
            checks_data=self._checks_data,
        )

    def matches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether this program is right for these arguments and for the model as it is now."""
        if not self._is_same_call(args, kwargs) and signature(args, kwargs) != self._signature:
            return False
        if self.function.is_frozen and _identity(args, kwargs) != self._identity:
            return False
        return fingerprint(self.model) == self._fingerprint and self.has_current_params()

    def has_current_params(self) -> bool:
        """Whether the model would still read the same leaf tensors for its parameters."""
        return all(
            _pyro.is_current_leaf(name, leaf, self.model)
            for name, leaf in self.prototype.params.items()
        )

    def _is_same_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether these are the very tensors that the program was made for, as in a full fit."""
        first = self._arguments[0]
        return (
            not kwargs
            and not self._arguments[1]
            and len(args) == len(first)
            and all(a is b and isinstance(a, Tensor) for a, b in zip(args, first, strict=True))
        )

    def inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: tuple[Tensor, ...] = ()
    ) -> Inputs:
        """All that the log joint depends on besides the latents, for these arguments."""
        return self.function.inputs(args, kwargs, indices)

    def unflatten(self, flat: tuple[Tensor, ...]) -> Inputs:
        """Inputs from a row of tensors, as :meth:`Inputs.flat` made it."""
        second = len(flat) - len(self.prototype.subsamples)
        first = second - len(self.prototype.params)
        return Inputs(flat[:first], flat[first:second], flat[second:])

    def graph_function(
        self, build: Callable[[Batch], PureFunction], *, is_per_draw: bool = False
    ) -> GraphFunction:
        """A captured function that is built on the log joint of a batch of draws.

        Args:
            build: Takes ``batch(z, inputs)``, the log joint at each row of ``(S, D)``, and returns
                a pure function of tensors, of which the first leads with the draws and the last
                are the model's :class:`Inputs`, flat.
            is_per_draw: Whether each output has one entry per draw that depends on that draw alone.
        """
        return GraphFunction(
            lambda tensors: self._capture(build, tensors, is_per_draw), self.backend
        )

    def batch(self, mode: Mode) -> Batch:
        """The log joint at each row of ``(S, D)``, computed in one of the modes."""
        if mode == "vmap":
            one = self.function.log_joint
            return lambda z, inputs: torch.func.vmap(lambda row: one(row, inputs))(z)
        if mode == "graph":
            return self._batch_of_graphs
        return self.function.eager_batch

    def _batch_of_graphs(self, z: Tensor, inputs: Inputs) -> Tensor:
        graph = self._graph_of_one_draw(z[0], inputs)
        flat = inputs.flat()
        return torch.func.vmap(lambda row: graph(row, *flat)[0])(z)

    def _graph_of_one_draw(self, z: Tensor, inputs: Inputs) -> PureFunction:
        key = tuple(t.shape for t in inputs.flat())
        if key not in self._graphs:

            def one(row: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
                return (self.function.log_joint(row, self.unflatten(flat)),)

            self._graphs[key] = capture_graph(one, (z, *inputs.flat()))
        return self._graphs[key]

    def _capture(
        self,
        build: Callable[[Batch], PureFunction],
        tensors: tuple[Tensor, ...],
        is_per_draw: bool,  # noqa: FBT001
    ) -> PureFunction:
        if not self.is_checked:
            if len(tensors[0]) <= _MAX_CHECKED_DRAWS:
                return self._choose_mode(build, tensors)
            if is_per_draw:
                return self._choose_mode(build, tensors, num_checked=_FEW_DRAWS)
            self._choose_mode(build, (tensors[0][:_FEW_DRAWS], *tensors[1:]))
        fn = build(self.batch(self.mode))
        return fn if self.mode == "eager" else capture_graph(fn, tensors)

    def _choose_mode(
        self,
        build: Callable[[Batch], PureFunction],
        tensors: tuple[Tensor, ...],
        num_checked: int | None = None,
    ) -> PureFunction:
        """Find the fastest mode whose graph agrees with eager Pyro, and return that graph.

        Args:
            build: As in :meth:`graph_function`.
            tensors: Where to capture.
            num_checked: Draws at which to run eager Pyro, where outputs are per draw; else all.
        """
        args, kwargs = self._arguments
        run_eager = build(self.function.eager_batch)

        def eager(draws: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return run_eager(draws[:num_checked], *rest)

        truth = eager(*tensors)  # raises where the model itself does
        self.is_checked = True
        reasons: list[str] = []
        if difference(truth, eager(*tensors)) is not None:
            reasons.append("the log density is random: two runs at one point differ")
        for is_frozen in (False, True) if not reasons else ():
            self.function = self._make_function(args, kwargs, is_frozen=is_frozen)
            self._graphs.clear()
            others = self._other_values(tensors)
            for mode in _CAPTURED:
                try:
                    graph = capture_graph(build(self.batch(mode)), tensors)
                    reason = _disagreement(eager, graph, [tensors, *others], num_checked)
                except Exception as error:
                    reason = f"{self._place()}: {first_line(error)}"
                if reason is None:
                    self.mode = mode
                    return graph
                reasons.append(reason)
        self.mode = "eager"
        self.function = self._make_function(args, kwargs)
        warnings.warn(
            "the model cannot be captured as a graph, so eager Pyro runs it at every call. Reason, "
            f"{reasons[0]}. Look for control flow on latent values, random operations and calls "
            "into NumPy.",
            CaptureWarning,
            stacklevel=2,
        )
        return build(self.function.eager_batch)

    def _place(self) -> str:
        site = self.function.last_site
        return "at the start" if site is None else f"at or after site '{site}'"

    def _other_values(self, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Other inputs at which captured and eager have to agree as well."""
        generator = torch.Generator().manual_seed(20)
        inputs = self.inputs(*self._arguments)
        first = len(tensors) - len(inputs.flat()) - len(self.prototype.subsamples)
        own, rest = tensors[:first], tensors[first:]
        data, rest = rest[: len(inputs.tensors)], rest[len(inputs.tensors) :]
        moved = tuple(_move(x, generator) for x in own)
        points = [(*moved, *data, *rest)]
        if data and not self.function.is_frozen:
            points.append((*moved, *(_move(x, generator) for x in data), *rest))
        return points


def value_and_gradients(batch: Batch, z: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """``batch(z, inputs)`` and its sum's gradients by ``z`` and by each learnable parameter."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        params = tuple(p.detach().requires_grad_(True) for p in inputs.params)
        value = batch(z, inputs._replace(params=params))
        if not value.requires_grad:  # no continuous latents
            return (value, *map(torch.zeros_like, (z, *params)))
        gradients = torch.autograd.grad(
            value.sum(), (z, *params), allow_unused=True, materialize_grads=True
        )
    return (value.detach(), *gradients)


def signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What must be equal for two sets of arguments to share one graph."""
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    return tree, tuple(_leaf_key(x) for x in leaves)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
    if isinstance(leaf, np.ndarray):
        return (leaf.shape, str(leaf.dtype), leaf.tobytes())
    if isinstance(leaf, int | float | bool | str | bytes | type(None)):
        return (type(leaf), leaf)
    return (type(leaf), fingerprint(leaf))


def _identity(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    leaves = tree_flatten((tuple(args), dict(kwargs)))[0]
    return tuple((id(x), x._version) for x in leaves if isinstance(x, Tensor))


def _disagreement(
    eager: PureFunction,
    graph: PureFunction,
    points: list[tuple[Tensor, ...]],
    num_checked: int | None,
) -> str | None:
    """``None`` where graph and eager function agree at all points, else what differs where.

    Of the graph's outputs the first ``num_checked`` entries are compared, all if that is ``None``.
    """
    for number, point in enumerate(points):
        try:
            truth = eager(*point)
        except Exception:
            if number == 0:
                raise
            continue  # values of our own making need not be valid for the model
        with torch.no_grad():
            out = graph(*point)
        if num_checked is not None:
            out = tuple(x[:num_checked] for x in out)
        reason = difference(truth, out)
        if reason is not None:
            where = ("", " at another point", " for other values of the arguments")[number]
            return f"captured and eager outputs differ by {reason}{where}"
    return None


def difference(truth: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> str | None:
    """``None`` where two results agree to rounding, else by how much they do not."""
    for a, b in zip(truth, got, strict=True):
        # Rounding in sums of many terms, relative to the largest.
        tolerance = 1e-8 if a.dtype == torch.float64 else 2e-3
        scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + scale), equal_nan=True):
            return f"{float((a - b).nan_to_num(torch.inf).abs().max()):.3g}"
    return None


def _move(x: Tensor, generator: torch.Generator) -> Tensor:
    """Other values like these, close enough to be valid for most models."""
    if x.is_floating_point():
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x)
        return x * (1 + 0.01 * noise) + 0.003 * noise
    return x.flip(0) if x.dim() else x
