"""How much a computation allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_mf.density.dispatch import DispatchMode


class Footprint(NamedTuple):
    """What one run of a computation makes, views apart.

    Args:
        num_bytes: Size of all the tensors that it makes.
        num_operations: Number of operations that make one.
    """

    num_bytes: int
    num_operations: int


def measure(run: Callable[[], Any]) -> Footprint:
    """Run a computation and add up what it makes.

    Args:
        run: What to measure; what it returns is dropped.
    """
    with _Allocations() as allocations:
        run()
    return Footprint(allocations.num_bytes, allocations.num_operations)


class _Allocations(DispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_bytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
            self.num_operations += 1
        return out
