"""`pyro_mf.fit`, which needs to be told nothing."""

from __future__ import annotations

import re
import time

from benchmarks.peers.contract import BySite, Fit, Task
from benchmarks.problems import load
from pyro_mf.fitting import FitResult, fit


class Ours:
    """The default fit; linear response is a part of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.posterior = load(task.problem)

    def fit(self) -> Fit:  # noqa: D102
        begin = time.perf_counter()
        posterior = self.posterior
        result = fit(posterior.model, posterior.args, seed=self.task.seed, progress=False)
        seconds = time.perf_counter() - begin
        unpack = result.layout.unpack
        loc, sd = (unpack(p.detach()) for p in result.guide.flat_params())
        response = result.known_response().found
        return Fit(
            seconds,
            result.num_gradients,
            draws_of(result),
            {name: value.numpy() for name, value in loc.items()},
            {name: value.numpy() for name, value in sd.items()},
            result.stop_reason,
            None if response is None else response.scale_tril.numpy(),
        )

    def log_density(self, points: BySite) -> None:
        """There is nothing to compare our own model with."""


def draws_of(result: FitResult) -> int:
    """The number of fixed draws at the end, which only the message has; 0 where it does not."""
    found = re.search(r"(\d+) fixed draws", result.message)
    return int(found.group(1)) if found else 0
