"""Records the ATen operations of a pure function into one graph.

The same idea as ``torch.fx.experimental.proxy_tensor.make_fx``, of which only the part is kept that
a density needs: no fake tensors, no symbolic shapes and no stack trace per node, which make that
tracer about ten times slower on models with long loops.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_flatten

from pyro_mf.density.dispatch import DispatchMode

_aten = torch.ops.aten
_READS_VALUE = {_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default}

# Only this recorder records; one that is further out sees the operations pass.
_active: ContextVar[_Recorder | None] = ContextVar("pyro_mf_recorder", default=None)


@contextmanager
def paused() -> Iterator[None]:
    """Run operations without recording them: their results become constants of the graph."""
    with _recording_to(None):
        yield


def is_recording() -> bool:
    """Whether operations become part of a graph here."""
    return _active.get() is not None


@contextmanager
def _recording_to(recorder: _Recorder | None) -> Iterator[None]:
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass
class Recording:
    """A graph and the tensors that it reads besides its inputs.

    Args:
        graph: ATen operations; every node says in ``meta`` what shape, dtype and device it has.
        constants: Tensors by the name under which the graph gets them.
    """

    graph: Graph
    constants: dict[str, Tensor]

    def to_module(self) -> GraphModule:
        """The recording as something that can be called."""
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return GraphModule({name: self.constants[name] for name in used}, self.graph)


def record(
    fn: Callable[..., tuple[Tensor, ...]],
    examples: tuple[Tensor, ...],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Recording:
    """Run ``fn`` once and return its ATen operations.

    Args:
        fn: A pure function of tensors that returns a tuple of them. It may use vmap and autograd.
        examples: The tensors to run it on. Their shapes become part of the graph.
        decompositions: Replacements for operations.

    Raises:
        RuntimeError: If ``fn`` reads a value of a tensor that depends on its arguments.
    """
    recorder = _Recorder(decompositions or {})
    for number, example in enumerate(examples):
        recorder.name(example, recorder.graph.placeholder(f"input{number}"))
    with _recording_to(recorder), recorder:
        out = fn(*examples)
    recorder.graph.output(tuple(recorder.node_of(t) for t in out))
    return Recording(recorder.graph, recorder.constants)


class _Recorder(DispatchMode):
    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}
        self.constants: dict[str, Tensor] = {}
        self._decompositions = decompositions
        self._alive: list[Any] = []  # so that no identity is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _active.get() is not self:
            return func(*args, **kwargs)
        if func in self._decompositions:
            with self:
                return self._decompositions[func](*args, **kwargs)
        if func in _READS_VALUE and self._is_recorded((args, kwargs)):
            raise RuntimeError(
                "control flow or a Python number depends on the value of a tensor that varies "
                f"(through {func})"
            )
        out = func(*args, **kwargs)
        if _has_tensor(out):
            nodes = map_tensors(args, self.node_of), map_tensors(kwargs, self.node_of)
            self._remember(out, self.graph.call_function(func, *nodes))
        returns = [r.name for r in func._schema.returns]
        if "info" in returns:
            with self:
                return _nan_where_failed(out, returns.index("info"))
        return out

    def node_of(self, tensor: Tensor) -> Node:
        """The node that computes a tensor; a tensor from outside becomes a constant."""
        node = self.nodes.get(id(tensor))
        if node is None:
            name = f"constant{len(self.constants)}"
            self.constants[name] = tensor.detach()
            node = self.name(tensor, self.graph.get_attr(name))
        return node

    def name(self, tensor: Tensor, node: Node) -> Node:
        """Remember which node computes a tensor, and what kind of tensor it is."""
        node.meta.update(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self.nodes[id(tensor)] = node
        self._alive.append(tensor)
        return node

    def _is_recorded(self, values: Any) -> bool:
        return any(id(x) in self.nodes for x in tree_flatten(values)[0] if isinstance(x, Tensor))

    def _remember(self, out: Any, node: Node) -> None:
        if isinstance(out, Tensor):
            self.name(out, node)
            return
        for index, item in enumerate(out):
            if isinstance(item, Tensor | list | tuple):
                self._remember(item, self.graph.call_function(operator.getitem, (node, index)))


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """Replace every tensor in nested tuples, lists and dicts.

    Called for every operation of a long loop, hence a plain recursion and not a pytree.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(map_tensors(x, fn) for x in value))
    if isinstance(value, tuple | list):
        return type(value)([map_tensors(x, fn) for x in value])
    if isinstance(value, dict):
        return {key: map_tensors(x, fn) for key, x in value.items()}
    return value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _nan_where_failed(out: Any, where: int) -> tuple[Tensor, ...]:
    """Results of a matrix factorisation, NaN for the matrices for which it failed.

    In eager torch a check raises after such an operation, for the whole batch. In a graph one draw
    whose matrix is not positive definite must not stop the others, and must not pass unseen either.
    """
    failed = out[where] != 0

    def masked(x: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            return x
        return torch.where(
            failed.reshape(failed.shape + (1,) * (x.dim() - failed.dim())), torch.nan, x
        )

    return tuple(masked(x) for x in out)
