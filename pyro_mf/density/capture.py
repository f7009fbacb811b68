"""A pure function of tensors, captured once per input signature and run from its graph.

Nothing here knows Pyro. A :class:`GraphFunction` is called like the function it captures; the first
call with new shapes, dtypes or devices records it as one ATen graph. ``torch.jit``
is not used: it is deprecated.
"""

from __future__ import annotations

import functools
import getpass
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule

from pyro_mf._errors import CaptureWarning
from pyro_mf.density.recorder import paused, record
from pyro_mf.density.simplify import has_mutation, replace_private_mutations, simplify

Backend = Literal["auto", "graph", "compile", "eager"]
BACKENDS: tuple[Backend, ...] = ("auto", "graph", "compile", "eager")

# What compiling was seen to take on two shared cores, from 100 to 3500 nodes. The first time on a
# machine inductor also gets to know the compiler, about 20 s in all, and keeps that on disk.
_COMPILE_SECONDS, _FIRST_COMPILE_SECONDS, _COMPILE_SECONDS_PER_NODE = 4.0, 15.0, 0.012

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
            ``"auto"`` starts with the graph and compiles when that pays.

    Attributes:
        planned_calls: How many calls are to come, where that is known; 0 where not.
        num_captures: Captures so far.
        capture_seconds: Seconds they took.

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
        self.planned_calls = 0
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
            runner = self._runners[key] = _Runner(self._capture(tensors), self)
            self.num_captures += 1
            self.capture_seconds += time.perf_counter() - start
        return runner(*tensors)


class _Runner:
    """One graph, and when to compile it.

    As in the ski-rental problem, waiting until the graph has cost as much as compiling it would
    keeps the total within a factor of two of the better choice. Where it is known how many calls
    are to come, there is no need to wait.
    """

    def __init__(self, run: PureFunction, owner: GraphFunction) -> None:
        self._run = run
        self._owner = owner
        self._calls = 0
        self._spent = 0.0
        self._may_compile = isinstance(run, GraphModule) and owner.backend in ("auto", "compile")
        self._nodes = len(run.graph.nodes) if isinstance(run, GraphModule) else 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self._may_compile:
            with torch.no_grad():
                return self._run(*tensors)
        if self._is_compiling_due():
            self._compile(tensors)
        start = time.perf_counter()
        with torch.no_grad():
            out = self._run(*tensors)
        self._spent += time.perf_counter() - start
        self._calls += 1
        return out

    def _is_compiling_due(self) -> bool:
        if self._owner.backend == "compile":
            return True
        cost = _COMPILE_SECONDS if _has_compiled_before() else _FIRST_COMPILE_SECONDS
        cost += _COMPILE_SECONDS_PER_NODE * self._nodes
        if self._spent >= cost:
            return True
        if self._calls < 3:  # the first calls are not typical
            return False
        return self._owner.planned_calls * self._spent / self._calls >= cost

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


@functools.cache
def _has_compiled_before() -> bool:
    """Whether inductor has left its files on this machine; only a guess of time hangs on it."""
    try:
        default = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    except (KeyError, OSError):  # a user without a name, as in some containers
        return False
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", default)).is_dir()


def capture_graph(fn: PureFunction, tensors: tuple[Tensor, ...]) -> GraphModule:
    """Trace a pure function into one simplified ATen graph without in-place operations."""
    examples = tuple(t.detach() for t in tensors)
    with warnings.catch_warnings():
        # Tracing runs the model's own Python; what it warns about was said by the eager run.
        warnings.simplefilter("ignore")
        recording = record(fn, examples)
        replace_private_mutations(recording)
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
