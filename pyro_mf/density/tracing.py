"""What lets an ordinary Pyro model run while it is being traced into a graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_mf.density.recorder import is_recording, map_tensors, paused

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_READS_VALUES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.data_ptr}


class TracingMode(TorchFunctionMode):
    """Watches every torch function that a model calls, and changes three things.

    * A learnable parameter is replaced by the tensor that was handed in for it. This goes by
      identity, because a parameter reaches the model along many ways: ``pyro.param``, an attribute
      of a ``PyroModule``, or an ``nn.Module`` that holds its own reference.
    * What depends on no input is computed at once instead of being traced: constants fold, and
      control flow on constants works.
    * ``.data`` becomes ``.detach()``, which vmap allows.

    Args:
        leaves: Learnable parameters, name to leaf tensor.
        values: What takes their place, in the same order.
        inputs: All other tensors that the traced function depends on.
    """

    def __init__(
        self, leaves: Mapping[str, Tensor], values: tuple[Tensor, ...], inputs: Iterable[Tensor]
    ) -> None:
        self._table = {id(a): b for a, b in zip(leaves.values(), values, strict=True)}
        # Held, so that no identity is reused while the mode is active.
        self._dependent: dict[int, Tensor] = {id(t): t for t in (*values, *inputs)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DATA:
            func = Tensor.detach
        if getattr(func, "__name__", "") == "__get__":
            attribute = func(*args, **kwargs)
            if not isinstance(attribute, Tensor):
                return attribute  # requires_grad and the like stay those of the parameter
        tensors: list[Tensor] = []
        if func in _READS_VALUES and is_recording() and id(args[0]) in self._dependent:
            raise RuntimeError(
                f"a tensor that varies leaves torch through Tensor.{func.__name__}, where no graph "
                "can follow"
            )

        def replaced(tensor: Tensor) -> Tensor:
            tensors.append(self._table.get(id(tensor), tensor))
            return tensors[-1]

        args, kwargs = map_tensors(args, replaced), map_tensors(kwargs, replaced)
        is_in_place = _is_in_place(func, kwargs)
        if any(id(t) in self._dependent for t in tensors):
            out = func(*args, **kwargs)
            map_tensors(out, self._mark)
            if is_in_place:
                map_tensors(args[:1], self._mark)
            return out
        if tensors and not is_in_place:
            with paused():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _mark(self, tensor: Tensor) -> None:
        self._dependent[id(tensor)] = tensor


class GradientWatch(TorchFunctionMode):
    """Notes every tensor that requires a gradient among those that torch functions are given."""

    def __init__(self) -> None:
        self._seen: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def note(tensor: Tensor) -> None:
            with torch._C.DisableTorchFunction():
                if tensor.requires_grad:
                    self._seen[id(tensor)] = tensor

        map_tensors((args, kwargs or {}), note)
        return func(*args, **(kwargs or {}))

    def saw_others_than(self, known: Iterable[Tensor]) -> bool:
        """Whether there was a tensor besides these."""
        return bool(self._seen.keys() - {id(t) for t in known})


def _is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    operators = ("__invert__", "__int__", "__index__")
    in_place_operator = name.startswith("__i") and name not in operators
    return (
        "out" in kwargs
        or name in ("__setitem__", "__set__")
        or in_place_operator
        or (name.endswith("_") and not name.endswith("__"))
    )


def without_validation(fn: Any) -> Any:
    """A distribution that does not check its arguments: ``fn`` itself or a copy.

    Distributions made outside the model (a ``PyroSample``'s prior) keep the setting they were made
    with, and their checks read values, which a trace cannot.
    """
    if not _validates(fn):
        return fn
    fn = copy.copy(fn)
    for name, value in list(vars(fn).items()):
        if isinstance(value, torch.distributions.Distribution):
            setattr(fn, name, without_validation(value))
    # Last, since an Independent hands this on to its base, which is a copy by now.
    fn._validate_args = False
    return fn


def _validates(fn: Any) -> bool:
    if not isinstance(fn, torch.distributions.Distribution):
        return False
    return bool(fn._validate_args) or any(map(_validates, vars(fn).values()))
