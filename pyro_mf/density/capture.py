"""A pure function of tensors, captured once per input signature and run from its graph.

Nothing here knows Pyro. A :class:`GraphFunction` is called like the function it captures; the first
call with new shapes, dtypes or devices traces it with ``make_fx`` into one ATen graph. ``torch.jit``
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
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mf._errors import CaptureWarning
from pyro_mf.density.simplify import simplify

Backend = Literal["auto", "graph", "compile", "eager"]
BACKENDS: tuple[Backend, ...] = ("auto", "graph", "compile", "eager")

# torch.compile takes 3 to 20 s. As in the ski-rental problem, waiting until the graph tier has cost
# as much as compiling does keeps the total within a factor of two of the better choice.
COMPILE_AFTER_SECONDS = 10.0

PureFunction = Callable[..., tuple[Tensor, ...]]


class GraphFunction:
    """Runs ``fn(*tensors) -> tuple of tensors`` from a graph; gradients do not flow through it.

    Args:
        fn: A pure function of tensors. It may differentiate inside.
        backend: ``"graph"`` runs the ATen graph as it is, ``"compile"`` compiles it with inductor,
            ``"auto"`` starts with the graph and compiles when that has paid for itself, ``"eager"``
            calls ``fn``.

    Example:
        >>> square = GraphFunction(lambda x: (x * x,), backend="graph")
        >>> square(torch.tensor([1.0, 2.0]))[0].tolist()
        [1.0, 4.0]
        >>> square.num_captures
        1
    """

    def __init__(self, fn: PureFunction, backend: Backend = "auto") -> None:
        self.fn = fn
        self.backend = check_backend(backend)
        self.num_captures = 0
        self.capture_seconds = 0.0
        self._runners: dict[Any, _Runner] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self.backend == "eager":
            return self.fn(*tensors)
        key = tuple((t.shape, t.dtype, t.device) for t in tensors)
        runner = self._runners.get(key)
        if runner is None:
            runner = self._runners[key] = self._capture(tensors)
        return runner(*tensors)

    def _capture(self, tensors: tuple[Tensor, ...]) -> _Runner:
        start = time.perf_counter()
        graph = capture_graph(self.fn, tensors)
        self.num_captures += 1
        self.capture_seconds += time.perf_counter() - start
        return _Runner(graph, self.backend)


class _Runner:
    """One graph, and when to compile it."""

    def __init__(self, graph: GraphModule, backend: Backend) -> None:
        self._run: Callable[..., tuple[Tensor, ...]] = graph
        self._graph = graph
        self._spent = 0.0
        self._may_compile = backend in ("auto", "compile")
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
            compiled = torch.compile(self._graph, dynamic=False)
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's own, about its own choices
                compiled(*tensors)
        except Exception as error:
            warnings.warn(
                f"torch.compile failed ({_first_line(error)}), so the graph runs as it is.",
                CaptureWarning,
                stacklevel=4,
            )
            return
        self._run = compiled


def capture_graph(fn: PureFunction, tensors: tuple[Tensor, ...]) -> GraphModule:
    """Trace a pure function into one simplified ATen graph."""
    with warnings.catch_warnings():
        # Tracing runs the model's own Python; what it warns about was said by the eager run.
        warnings.simplefilter("ignore")
        return simplify(make_fx(fn)(*(t.detach() for t in tensors)))


def check_backend(backend: str) -> Backend:
    """Return ``backend`` or raise a ``ValueError`` that names the choices."""
    for known in BACKENDS:
        if backend == known:
            return known
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
