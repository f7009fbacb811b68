"""How much memory a computation allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_mf.density.dispatch import DispatchMode


def allocated_bytes(run: Callable[[], Any]) -> int:
    """Run a computation and add up the sizes of the tensors that it makes, views apart.

    Args:
        run: What to measure; what it returns is dropped.
    """
    with _Allocations() as allocations:
        run()
    return int(allocations.total)


class _Allocations(DispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
        return out
