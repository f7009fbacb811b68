"""Reverse KL, its linear response, forward KL and NUTS on one model, at what they cost.

Cost is counted in rows: one gradient of the log joint at one point, by whoever asks for it; and in
seconds of CPU, on which other work on the machine has little influence. Rows that only fill up a
block are counted, as they are computed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pyro_mf as mf
from pyro_mf.density import LogJoint


class Entry(NamedTuple):
    """A Gaussian on the unconstrained axis, with its cost.

    Args:
        method: Which contender.
        verdict: How it ended, in a word.
        loc: Means, shape ``(D,)``.
        scale: Sds ``(D,)``, or a lower triangular matrix ``(D, D)``.
        gradients: Gradients of the log joint, each at one point.
        seconds: CPU time, capture included.
        note: What it says of itself.
        elbo: Its ELBO with a standard error, nats.
        eubo: Its EUBO with a standard error, nats; NaN where it has none.
        draws: Those behind it, shape ``(S, D)``, whose own moments are better than a Gaussian's.
    """

    method: str
    verdict: str
    loc: Tensor
    scale: Tensor
    gradients: int
    seconds: float
    note: str = ""
    elbo: tuple[float, float] = (torch.nan, torch.nan)
    eubo: tuple[float, float] = (torch.nan, torch.nan)
    draws: Tensor | None = None

    @property
    def sd(self) -> Tensor:
        """Sds, shape ``(D,)``."""
        return self.scale if self.scale.dim() == 1 else self.scale.square().sum(-1).sqrt()


@contextmanager
def counted_rows() -> Iterator[list[int]]:
    """Count the rows at which log joints are evaluated, values alone included."""
    count = [0]
    wrapped = {name: getattr(LogJoint, name) for name in ("value_and_grad", "__call__")}

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: LogJoint, z: Tensor) -> Any:
            count[0] += z.numel() // z.shape[-1]
            return function(self, z)

        return call

    try:
        for name, function in wrapped.items():
            setattr(LogJoint, name, counting(function))
        yield count
    finally:
        for name, function in wrapped.items():
            setattr(LogJoint, name, function)


def reverse(model: Any, args: tuple[Any, ...], **settings: Any) -> list[Entry]:
    """The default fit, and its linear response where there is one."""
    result, gradients, seconds = _fit(model, args, **settings)
    loc, sd = (p.detach() for p in result.guide.flat_params())
    elbo = result.elbo, result.elbo_se
    cost = {"gradients": gradients, "seconds": seconds}
    entries = [
        Entry("reverse", result.stop_reason, loc, sd, note=result.message, elbo=elbo, **cost)
    ]
    response = result.known_response()
    if response.found is not None:
        scale = response.found.scale_tril
        entries.append(Entry("+ linear response", result.stop_reason, loc, scale, **cost))
    return entries


def forward(model: Any, args: tuple[Any, ...], **settings: Any) -> list[Entry]:
    """The fit under the forward KL."""
    result, gradients, seconds = _fit(model, args, objective=mf.ForwardKL(), **settings)
    loc, sd = (p.detach() for p in result.guide.flat_params())
    entry = Entry(
        "forward",
        result.stop_reason,
        loc,
        sd,
        gradients,
        seconds,
        " ".join([result.message, *result.notes]),
        (result.elbo, result.elbo_se),
        (result.eubo, result.eubo_se),
        result.draws.sample(30_000),
    )
    return [entry]


def nuts(model: Any, args: tuple[Any, ...], **settings: Any) -> list[Entry]:
    """Four chains of 1000 + 1000."""
    begin = time.process_time()
    with counted_rows() as count:
        result = mf.run_nuts(model, args, progress=False, **settings)
    seconds = time.process_time() - begin
    z = result.z.flatten(0, 1)
    divergent = int(result.stats["diverging"].sum())
    verdict = f"{divergent} divergent" if divergent else "done"
    return [Entry("NUTS", verdict, z.mean(0), z.std(0), count[0], seconds, draws=z)]


def _fit(model: Any, args: tuple[Any, ...], **settings: Any) -> tuple[mf.FitResult, int, float]:
    begin = time.process_time()
    with counted_rows() as count, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the verdict is in the table
        result = mf.fit(model, args, progress=False, **settings)
    return result, count[0], time.process_time() - begin


def bound(value: float, se: float) -> str:
    """A bound of the log evidence for a table."""
    return "" if value != value else f"{value:.2f} ± {se:.2f}"
