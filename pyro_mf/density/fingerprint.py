"""What a model can see besides its arguments: a key that changes when that does.

A graph holds the closure variables, globals and module state that the model read when it was
captured. Rebinding one of them would make the graph silently stale; comparing this key before each
use makes it a new capture instead.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

_MAX_DEPTH = 3


def fingerprint(model: Any) -> tuple[Any, ...]:
    """A cheap key of everything a model reads that is not an argument or a parameter.

    Tensors count by identity and version, numbers and strings by value, modules by their training
    flags and buffers, other objects by identity.
    """
    found: list[Any] = []
    _visit(model, found, _MAX_DEPTH, set())
    return tuple(found)


def _visit(value: Any, found: list[Any], depth: int, seen: set[int]) -> None:
    if isinstance(value, int | float | str | bool | type(None)):
        found.append(value)
        return
    if isinstance(value, Tensor):
        # Learnable leaves are inputs of the graph; optimisers change them in place at every step.
        found.append(id(value) if value.requires_grad else (id(value), value._version))
        return
    if isinstance(value, functools.partial | types.MethodType):  # made anew at every access
        for part in _parts(value):
            _visit(part, found, depth, seen)
        return
    found.append(id(value))
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            found.extend((id(b), b._version) for b in module._buffers.values() if b is not None)
            for name, item in vars(module).items():
                if not name.startswith("_"):
                    _visit(item, found, depth - 1, seen)
    elif isinstance(value, types.FunctionType):
        _visit_function(value, found, depth - 1, seen)
    elif isinstance(value, list | tuple):
        for item in value[:100]:
            _visit(item, found, depth - 1, seen)
    elif isinstance(value, dict):
        for item in list(value.values())[:100]:
            _visit(item, found, depth - 1, seen)
    elif not isinstance(value, type | types.ModuleType) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            _visit(item, found, depth - 1, seen)


def _parts(value: functools.partial[Any] | types.MethodType) -> list[Any]:
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    return [value.func, *value.args, *value.keywords.values()]


def _visit_function(
    function: types.FunctionType, found: list[Any], depth: int, seen: set[int]
) -> None:
    for cell in function.__closure__ or ():
        try:
            _visit(cell.cell_contents, found, depth, seen)
        except ValueError:  # an empty cell
            continue
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        _visit(wrapped, found, depth, seen)
    if function.__module__ and function.__module__.split(".")[0] in ("torch", "pyro"):
        return
    scope = function.__globals__
    for name in function.__code__.co_names:
        if name in scope and not isinstance(scope[name], types.ModuleType | type):
            _visit(scope[name], found, depth, seen)
