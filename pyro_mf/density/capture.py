"""A pure function of tensors, captured once per input signature and run from its graph.

Nothing here knows Pyro. A :class:`GraphFunction` is called like the function it captures; the first
call with new shapes, dtypes or devices records it as one ATen graph. ``torch.jit``
is not used: it is deprecated.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule

from pyro_mf._errors import CaptureWarning
from pyro_mf.density.recorder import paused, record
from pyro_mf.density.simplify import has_mutation, simplify

Backend = Literal["auto", "graph", "compile", "eager"]
BACKENDS: tuple[Backend, ...] = ("auto", "graph", "compile", "eager")

# torch.compile takes 3 to 20 s. As in the ski-rental problem, waiting until the graph tier has cost
# as much as compiling does keeps the total within a factor of two of the better choice.
COMPILE_AFTER_SECONDS = 10.0

PureFunction = Callable[..., tuple[Tensor, ...]]

# What functionalisation leaves behind without a batching rule, or with a wrong one.
_FUNCTIONAL = {
    **get_decompositions([torch.ops.aten.slice_scatter, torch.ops.aten.select_scatter]),
    torch.ops.aten.copy.default: lambda x, source, non_blocking=False: (
        source.to(x.dtype).expand(x.shape).clone()
    ),
}


class GraphFunction:
    """A function of tensors, captured anew for every set of shapes, strides, dtypes and devices.

    No gradient flows through it; a function that is to be differentiated does so inside.

    Args:
        capture: Turns example tensors into something that runs on tensors like them: a graph, or
            any other callable where there is no graph.
        backend: ``"graph"`` runs the ATen graph as it is, ``"compile"`` compiles it with inductor,
            ``"auto"`` starts with the graph and compiles when that has paid for itself.

    Example:
        >>> square = GraphFunction(lambda t: capture_graph(lambda x: (x * x,), t), "graph")
        >>> square(torch.tensor([1.0, 2.0]))[0].tolist()
        [1.0, 4.0]
        >>> square.num_captures
        1
    """

    def __init__(
        self, capture: Callable[[tuple[Tensor, ...]], PureFunction], backend: Backend = "auto"
    ) -> None:
        self.backend = check_backend(backend)
        self.num_captures = 0
        self.capture_seconds = 0.0
        self._capture = capture
        self._runners: dict[Any, _Runner] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the function; the first call with tensors of this kind captures it."""
        key = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        runner = self._runners.get(key)
        if runner is None:
            start = time.perf_counter()
            runner = self._runners[key] = _Runner(self._capture(tensors), self.backend)
            self.num_captures += 1
            self.capture_seconds += time.perf_counter() - start
        return runner(*tensors)


class _Runner:
    """One graph, and when to compile it."""

    def __init__(self, run: PureFunction, backend: Backend) -> None:
        self._run = run
        self._spent = 0.0
        self._may_compile = isinstance(run, GraphModule) and backend in ("auto", "compile")
        self._compile_after = 0.0 if backend == "compile" else COMPILE_AFTER_SECONDS

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._may_compile:
            if self._spent >= self._compile_after:
                self._compile(tensors)
            start = time.perf_counter()
            with torch.no_grad():
                out = self._run(*tensors)
            self._spent += time.perf_counter() - start
            return out
        with torch.no_grad():
            return self._run(*tensors)

    def _compile(self, tensors: tuple[Tensor, ...]) -> None:
        self._may_compile = False
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            warnings.warn(
                "no C++ compiler was found, so graphs run without torch.compile (about 10 times "
                "slower on small models). Install g++ or clang++.",
                CaptureWarning,
                stacklevel=4,
            )
            return
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's own, about its own choices
                # Not torch.compile: its guards check at every call what the signature has.
                compiled = torch._inductor.compile(self._run, list(tensors))  # type: ignore[arg-type]
                compiled(*tensors)
        except Exception as error:
            warnings.warn(
                f"torch.compile failed ({first_line(error)}), so the graph runs as it is.",
                CaptureWarning,
                stacklevel=4,
            )
            return
        self._run = compiled


def capture_graph(fn: PureFunction, tensors: tuple[Tensor, ...]) -> GraphModule:
    """Trace a pure function into one simplified ATen graph without in-place operations."""
    examples = tuple(t.detach() for t in tensors)
    with warnings.catch_warnings():
        # Tracing runs the model's own Python; what it warns about was said by the eager run.
        warnings.simplefilter("ignore")
        recording = record(fn, examples)
        if has_mutation(recording):
            functional = torch.func.functionalize(recording.to_module(), remove="mutations")
            recording = record(functional, examples, _FUNCTIONAL)
    with paused():
        return simplify(recording).to_module()


def check_backend(backend: str) -> Backend:
    """Return ``backend``.

    Raises:
        ValueError: If there is no such backend; names the choices.
    """
    for known in BACKENDS:
        if backend == known:
            return known
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")


def first_line(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
