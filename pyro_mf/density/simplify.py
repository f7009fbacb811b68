"""Make a captured graph smaller without changing its values.

On small models the time of a graph is the number of its nodes, and tracing a probabilistic program
leaves many that do nothing: views of the shape a tensor has already, sums with zero, constants
computed from constants, the same subexpression twice.

Shapes are static in a captured graph. The recorder leaves them in ``node.meta["shape"]`` and
``node.meta["dtype"]``, which every rule here reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from pyro_mf.density.recorder import Recording

_aten = torch.ops.aten

# The same value under another name.
_ALIASES = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
}
# The same value where shape and dtype do not change.
_RESHAPES = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.expand.default,
    _aten._to_copy.default,
}
# The first argument where the second is this number.
_NEUTRAL = {
    _aten.add.Tensor: 0,
    _aten.add.Scalar: 0,
    _aten.sub.Tensor: 0,
    _aten.mul.Tensor: 1,
    _aten.mul.Scalar: 1,
    _aten.div.Tensor: 1,
    _aten.div.Scalar: 1,
    _aten.pow.Tensor_Scalar: 1,
}
_COMMUTES = {_aten.add.Tensor, _aten.mul.Tensor}
# What reads only the shape of its argument.
_SHAPED = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
}
# The Python bindings of an operation cost about half of what its overload does.
_BINDINGS: dict[Any, Any] = {
    _aten.add.Tensor: torch.add,
    _aten.sub.Tensor: torch.sub,
    _aten.mul.Tensor: torch.mul,
    _aten.div.Tensor: torch.div,
    _aten.neg.default: torch.neg,
    _aten.exp.default: torch.exp,
    _aten.log.default: torch.log,
    _aten.log1p.default: torch.log1p,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.tanh.default: torch.tanh,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.squeeze.dim: torch.squeeze,
    _aten.select.int: torch.select,
    _aten.mean.default: torch.mean,
    _aten.mm.default: torch.mm,
    _aten.bmm.default: torch.bmm,
    _aten.t.default: torch.t,
    _aten.permute.default: torch.permute,
    _aten.transpose.int: torch.transpose,
    # Reshape, since dropping a node can change strides and so what a view can do.
    _aten.view.default: Tensor.reshape,
    _aten._unsafe_view.default: Tensor.reshape,
    _aten.expand.default: Tensor.expand,
}
_MAX_FOLDED_ELEMENTS = 1_000_000


def has_mutation(recording: Recording) -> bool:
    """Whether some node changes one of its inputs."""
    return any(_is_mutation(node) for node in recording.graph.nodes)


def replace_private_mutations(recording: Recording) -> None:
    """Turn in-place operations on tensors that share no memory into ordinary ones.

    Torch makes some by itself, as in ``logsumexp``. Its own way to the same end works for all
    mutations, and loads its compiler, which takes two seconds.
    """
    place = {node: number for number, node in enumerate(recording.graph.nodes)}
    for node in recording.graph.nodes:
        operation = _out_of_place(node) if _is_mutation(node) else None
        changed = node.args[0] if operation else None
        if not isinstance(changed, Node) or not _is_fresh(changed):
            continue
        earlier = [user for user in changed.users if place[user] < place[node]]
        if all(map(_is_fresh, earlier)):  # none of them a view, which would see the change
            node.target = operation
            for user in [user for user in changed.users if place[user] > place[node]]:
                user.replace_input_with(changed, node)


def _out_of_place(node: Node) -> Any:
    """The operation that returns what an in-place one writes, where torch has it."""
    target: Any = node.target
    name, overload = target._schema.name.split("::")[1], target._overloadname
    packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if packet is None or packet is _aten.copy or overload not in packet.overloads():
        return None
    return getattr(packet, overload)


def _is_fresh(node: Node) -> bool:
    """Whether a node's result shares its memory with no other."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(r.alias_info is None for r in schema.returns)


def simplify(recording: Recording) -> Recording:
    """Fold constants, drop nodes that change nothing, join equal ones, remove what is not used."""
    graph = recording.graph
    constants = _Constants(recording)
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        replacement = _equal_to(node, constants) or constants.fold(node)
        if replacement is None and not _is_random(node):
            key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
            replacement = seen.get(key)
            seen.setdefault(key, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if not node.kwargs:
            node.target = _BINDINGS.get(node.target, node.target)
    return recording


class _Constants:
    """Nodes whose value is known now."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.values: dict[Node, Tensor] = {
            node: recording.constants[str(node.target)]
            for node in recording.graph.nodes
            if node.op == "get_attr"
        }

    def fold(self, node: Node) -> Node | None:
        """A constant in place of a node that depends on none of the inputs."""
        if "shape" not in node.meta or _is_random(node):
            return None
        if node.meta["shape"].numel() > _MAX_FOLDED_ELEMENTS:
            return None
        inputs = node.all_input_nodes
        if not inputs and node.target not in _FACTORIES:
            return None
        if not all(n in self.values for n in inputs) and node.target not in _SHAPED:
            return None
        value = self._evaluate(node)
        name = f"folded{len(self.values)}"
        self.recording.constants[name] = value
        with self.recording.graph.inserting_before(node):
            constant = self.recording.graph.get_attr(name)
        constant.meta.update(node.meta)
        self.values[constant] = value
        return constant

    def is_filled_with(self, argument: Any, number: float) -> bool:
        """Whether an argument is this number, or a constant that holds nothing else."""
        if isinstance(argument, Node):
            value = self.values.get(argument)
            return value is not None and value.numel() > 0 and bool((value == number).all())
        return isinstance(argument, int | float) and argument == number

    def _evaluate(self, node: Node) -> Tensor:
        def known(n: Node) -> Tensor:
            if n in self.values:
                return self.values[n]
            return torch.empty(n.meta["shape"], dtype=n.meta["dtype"], device=n.meta["device"])

        args = torch.fx.map_arg(node.args, known)
        kwargs = torch.fx.map_arg(node.kwargs, known)
        with torch.no_grad():
            return node.target(*args, **kwargs).detach()  # type: ignore[operator,no-any-return]


_FACTORIES = {
    _aten.zeros.default,
    _aten.ones.default,
    _aten.full.default,
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.eye.default,
    _aten.scalar_tensor.default,
}


def _equal_to(node: Node, constants: _Constants) -> Node | None:
    """An earlier node with the same value, where that is plain from the operation."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if node.target in _ALIASES:
        return first
    if node.target in _RESHAPES and _same_type(node, first):
        return first
    number = _NEUTRAL.get(node.target)  # type: ignore[call-overload]
    if number is None or node.kwargs:
        return None
    second = node.args[1]
    if constants.is_filled_with(second, number) and _same_type(node, first):
        return first
    if node.target in _COMMUTES and isinstance(second, Node):
        if constants.is_filled_with(first, number) and _same_type(node, second):
            return second
    return None


def _same_type(node: Node, other: Node) -> bool:
    if "shape" not in node.meta or "shape" not in other.meta:
        return False
    return all(node.meta[key] == other.meta[key] for key in ("shape", "dtype", "device"))


def _is_mutation(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
