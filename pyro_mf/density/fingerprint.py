"""What a model can see besides its arguments: a key that changes when that does.

A graph holds the closure variables, globals and module state that the model read when it was
captured. Rebinding one of them would make the graph silently stale; comparing this key before each
use makes it a new capture instead. It is made at every training step, so what a type or a code
object determines is found once.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyro.infer
import pyro.optim
import torch
from torch import Tensor

_MAX_VALUES = 20_000  # in all: a few milliseconds
_MAX_ITEMS = 1_000  # of one container, or elements of one array

_LIBRARIES = sys.stdlib_module_names | {"numpy", "pandas", "pyro", "pyro_mf", "scipy", "torch"}
_PLAIN = (int, float, complex, str, bytes, type(None), np.generic, torch.device)
# Training changes these at each step; a model does not read them.
_TRAINING = (
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    pyro.optim.PyroOptim,
    pyro.infer.SVI,
    pyro.infer.ELBO,
)
# A module's own book-keeping, and the parts of it that matter to its output.
_BOOK_KEEPING = frozenset(vars(pyro.nn.PyroModule())) - {"training"}
_STATE = ("_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_pyro_samples")
_CACHES = frozenset({"_inv", "_cached_x_y"})  # of torch's transforms, renewed as they are used


class Fingerprint(tuple[Any, ...]):
    """A key, equal to another one where the model saw the same.

    Attributes:
        kept: The objects that the key names by identity. While they live no other object can have
            their place in memory, so their identity.
    """

    kept: tuple[Any, ...]


def fingerprint(model: Any) -> Fingerprint:
    """A cheap key of everything a model reads that is not an argument or a parameter's value.

    Numbers and strings count by value, parameters by identity, other tensors by identity and
    version, and all other objects by identity and what they hold. Functions and methods are
    followed to the globals that they, and functions within them, name. The walk goes breadth first
    and stops after 20,000 values.

    Args:
        model: A function, module, bound method, ``functools.partial`` or other callable.

    Example:
        >>> settings = {"scale": 1.0}
        >>> def model(settings=settings):
        ...     return settings["scale"]
        >>> before = fingerprint(model)
        >>> before == fingerprint(model)
        True
        >>> settings["scale"] = 2.0
        >>> before == fingerprint(model)
        False
    """
    found: list[Any] = []
    queue = [model]
    seen: dict[int, Any] = {}
    for value in islice(queue, _MAX_VALUES):  # the queue grows meanwhile
        kind = type(value)
        visit = _visitors[kind]
        if visit is None:
            found += kind, value
            continue
        key = id(value)
        if visit is not _visit_parts:
            found.append(key)
        if key not in seen:
            seen[key] = value
            visit(value, found, queue)
    result = Fingerprint(found)
    result.kept = tuple(seen.values())
    return result


Visitor = Callable[[Any, list[Any], list[Any]], None]
_Found = TypeVar("_Found")


class _PerType(dict[type, _Found]):
    """What a function finds out about types, found once for each; a plain look-up is fastest."""

    def __init__(self, find: Callable[[type], _Found]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, kind: type) -> _Found:
        self[kind] = self.find(kind)
        return self[kind]


@_PerType
def _visitors(kind: type) -> Visitor | None:
    """How values of a type are looked into; ``None`` for those that count by value."""
    if issubclass(kind, _PLAIN):
        return None
    for base, visit in _VISITORS:
        if issubclass(kind, base):
            return visit
    root = kind.__module__.split(".")[0]
    # Loggers, locks and the like lead far away from the model.
    is_opaque = root in sys.stdlib_module_names and not _user_classes[kind]
    return _visit_nothing if is_opaque else _visit_object


@functools.lru_cache(maxsize=4096)
def _is_library(module: str) -> bool:
    return module.split(".")[0] in _LIBRARIES


@_PerType
def _user_classes(kind: type) -> tuple[type, ...]:
    return tuple(c for c in kind.__mro__ if not _is_library(c.__module__))


def _visit_nothing(value: Any, found: list[Any], queue: list[Any]) -> None:
    pass


def _visit_tensor(value: Tensor, found: list[Any], queue: list[Any]) -> None:
    # Learnable leaves are inputs of the graph; optimisers change them in place at every step.
    if not value.requires_grad and not value.is_inference():
        found.append(value._version)


def _visit_array(value: np.ndarray[Any, Any], found: list[Any], queue: list[Any]) -> None:
    if value.size <= _MAX_ITEMS:
        found.append(value.tobytes())


def _visit_items(value: Any, found: list[Any], queue: list[Any]) -> None:
    found.append(len(value))
    queue.extend(_user_classes[type(value)])
    queue.extend(islice(value, _MAX_ITEMS))
    if isinstance(value, dict | types.MappingProxyType):
        queue.extend(islice(value.values(), _MAX_ITEMS))


def _visit_parts(value: Any, found: list[Any], queue: list[Any]) -> None:
    """Look into what may be made anew at each access, and so has no identity of its own."""
    if isinstance(value, types.MethodType):
        queue += value.__self__, value.__func__
    elif isinstance(value, functools.partial):
        queue += value.func, *value.args, *value.keywords, *value.keywords.values()
    elif isinstance(value, weakref.ReferenceType):
        found.append(weakref.ReferenceType)


def _visit_descriptor(value: Any, found: list[Any], queue: list[Any]) -> None:
    names = ("__func__", "fget", "func")  # class and static methods, properties, cached ones
    queue.extend(getattr(value, name) for name in names if hasattr(value, name))


def _visit_object(value: Any, found: list[Any], queue: list[Any]) -> None:
    classes = _user_classes[type(value)]
    queue.extend(classes)
    for name, item in getattr(value, "__dict__", {}).items():
        if name not in _CACHES:
            found.append(name)
            queue.append(item)
    for slot in _slots[type(value)]:
        found.append(slot)
        queue.append(getattr(value, slot, None))


@_PerType
def _slots(kind: type) -> tuple[str, ...]:
    members = (vars(c).items() for c in _user_classes[kind])
    return tuple(
        name
        for items in members
        for name, item in items
        if isinstance(item, types.MemberDescriptorType)
    )


def _visit_module(value: torch.nn.Module, found: list[Any], queue: list[Any]) -> None:
    state = value.__dict__
    queue.extend(_user_classes[type(value)])
    names = _own_names(tuple(state))
    found.append(names)
    queue.extend([state[name] for name in names])
    queue.extend(state["_parameters"].values())
    for name in _STATE:
        held = state.get(name)
        if held:
            found += name, len(held)
            queue.extend(held.values())


@functools.lru_cache(maxsize=4096)
def _own_names(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in _BOOK_KEEPING)


def _visit_class(value: type, found: list[Any], queue: list[Any]) -> None:
    for cls in _user_classes[value]:
        for name, item in vars(cls).items():
            if not name.startswith("__") or isinstance(item, types.FunctionType):
                found.append(name)
                queue.append(item)


def _visit_function(value: types.FunctionType, found: list[Any], queue: list[Any]) -> None:
    queue += value.__code__, value.__defaults__, value.__kwdefaults__
    queue.extend(value.__dict__.values())  # __wrapped__ among them
    for cell in value.__closure__ or ():
        try:
            queue.append(cell.cell_contents)
        except ValueError:  # an empty cell
            found.append(None)
    scope = value.__globals__
    if _is_library(scope.get("__name__") or ""):
        return
    names, attributes = _reads(value.__code__)
    for name in names:
        if name in scope:
            found.append(name)
            _visit_global(scope[name], attributes, queue, set())


def _visit_global(
    value: Any, attributes: Iterable[str], queue: list[Any], seen: set[types.ModuleType]
) -> None:
    """Queue a global; of a user's module, also what the reading code may read of it."""
    queue.append(value)
    if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
        content = vars(value)
        seen.add(value)
        for name in attributes:
            if name in content and content[name] not in seen:
                _visit_global(content[name], attributes, queue, seen)


_known_reads: dict[int, tuple[types.CodeType, tuple[Iterable[str], Iterable[str]]]] = {}


def _reads(code: types.CodeType) -> tuple[Iterable[str], Iterable[str]]:
    """The globals and the attributes that code, and code within it, names.

    They are kept by identity, with the code that it belongs to: to hash code takes longer.
    """
    known = _known_reads.get(id(code))
    if known is not None:
        return known[1]
    names: dict[str, None] = {}
    attributes: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opcode in dis.hasname:
            is_global = step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            (names if is_global else attributes)[step.argval] = None
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner = _reads(const)
            names.update(dict.fromkeys(inner[0]))
            attributes.update(dict.fromkeys(inner[1]))
    _known_reads[id(code)] = code, (tuple(names), tuple(attributes))
    return _known_reads[id(code)][1]


_VISITORS: tuple[tuple[Any, Visitor], ...] = (
    (Tensor, _visit_tensor),
    (np.ndarray, _visit_array),
    (torch.nn.Module, _visit_module),
    (types.FunctionType, _visit_function),
    ((types.MethodType, functools.partial, weakref.ReferenceType), _visit_parts),
    ((classmethod, staticmethod, property, functools.cached_property), _visit_descriptor),
    ((list, tuple, dict, set, frozenset, deque, types.MappingProxyType), _visit_items),
    (types.SimpleNamespace, _visit_object),
    (type, _visit_class),
    ((types.ModuleType, types.CodeType, *_TRAINING), _visit_nothing),
)
