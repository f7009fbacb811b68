"""Make a captured graph smaller without changing its values.

On small models the time of a graph is the number of its nodes, and tracing a probabilistic program
leaves many that do nothing: detaches, copies of constants, the same subexpression twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_ALIASES = {_aten.detach.default, _aten.lift_fresh_copy.default, _aten.lift_fresh.default, _aten.alias.default}
_RANDOM = "nondeterministic_seeded"


def simplify(graph: GraphModule) -> GraphModule:
    """Drop nodes that change nothing, join equal ones, and remove what is not used."""
    for node in list(graph.graph.nodes):
        replacement = _equal_to(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.graph.erase_node(node)
    _join_equal_nodes(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def has_mutation(graph: GraphModule) -> bool:
    """Whether some node changes one of its inputs."""
    return any(_is_mutation(node) for node in graph.graph.nodes)


def _equal_to(node: Node) -> Node | None:
    """An earlier node with the same value, where that is plain from the operation."""
    if node.op != "call_function":
        return None
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if node.target in _ALIASES:
        return first
    return None


def _join_equal_nodes(graph: GraphModule) -> None:
    seen: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "get_attr") or _is_random(node):
            continue
        key = (node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.graph.erase_node(node)
        else:
            seen[key] = node


def _is_mutation(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _is_random(node: Node) -> bool:
    return _RANDOM in str(getattr(node.target, "tags", ""))
