"""Run a random Pyro program many times at once.

``torch.func.vmap`` does so where it can, and a plain loop, which can everything, where it cannot.
Unlike ``Predictive(parallel=True)`` neither needs a model that broadcasts, and no value comes back
with padded axes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

_CHUNK = 250  # runs at a time, to bound memory


def run_many(run: Run, num: int, inputs: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Call ``run`` ``num`` times with independent randomness, hidden from handlers around us.

    Args:
        run: A random function of a mapping of tensors; its results have the same shapes each time.
        num: Number of runs S, at least 1.
        inputs: Tensors of shape ``(S, ...)``, of which each run gets one row.
        seed: Seed; torch's global generators are left as they were.

    Returns:
        The results, each stacked to shape ``(S, ...)``, without gradients.

    Example:
        >>> draws = run_many(lambda row: {"x": row["loc"] + torch.randn(2)}, 3,
        ...                  {"loc": torch.tensor([0.0, 100.0, 200.0])}, seed=0)
        >>> draws["x"].shape
        torch.Size([3, 2])
    """
    inputs = dict(inputs)
    with forked_seed(seed), torch.no_grad(), poutine.block():
        try:
            return _vmapped(run, num, inputs)
        except Exception:  # whatever vmap cannot do; if the model is to blame, the loop says so
            rows = [run({k: v[i] for k, v in inputs.items()}) for i in range(num)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@contextmanager
def forked_seed(seed: int) -> Iterator[None]:
    """Seed torch's generators inside a ``with`` block, and put them back after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _vmapped(run: Run, num: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    def one(marker: Tensor, row: dict[str, Tensor]) -> dict[str, Tensor]:
        with _BatchedBlanks(marker), pyro.validation_enabled(False):
            return dict(run(row))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # anything else that vmap warns of may be wrong
        warnings.filterwarnings("ignore", "There is a performance drop")
        vectorised = torch.func.vmap(one, randomness="different", chunk_size=_CHUNK)
        result: dict[str, Tensor] = vectorised(torch.zeros(num), inputs)
    return result


class _BatchedBlanks(TorchFunctionMode):
    """Make fresh tensors differ between the runs of a vmap, so that they can be filled at random.

    Samplers do ``torch.empty(shape).normal_()``, which vmap refuses: one tensor, shared by all
    runs, cannot hold different numbers. Adding a zero that vmap takes for the run's own makes it
    one tensor per run.
    """

    _BLANK = frozenset({torch.empty, torch.empty_like, torch.Tensor.new, torch.Tensor.new_empty})

    def __init__(self, marker: Tensor) -> None:
        super().__init__()
        self._marker = marker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._BLANK and isinstance(result, Tensor):
            return result + self._marker.to(result)
        return result
