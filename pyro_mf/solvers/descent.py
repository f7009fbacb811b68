"""One run of the stochastic solver: look for the optimum, then average around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf.solvers import random_state
from pyro_mf.solvers.averaging import (
    MIN_BLOCKS,
    Accuracy,
    Average,
    compare,
    stationary_average,
)
from pyro_mf.solvers.leaves import Leaves
from pyro_mf.solvers.noisy_loss import NoisyLoss
from pyro_mf.solvers.outcome import Progress
from pyro_mf.solvers.steps import Steps
from pyro_mf.solvers.units import Units
from pyro_mf.solvers.window import Window

_SEARCH_RATE, _LARGEST_RATE = 0.5, 0.25
# The variance of the iterates that the first average is taken at, in squared units.
_SPREAD = 0.0625
_REFRESH = 10  # steps between looks at the units while they change
_CHECK_BLOCKS, _FIRST_CHECK = 32, 64
_MAX_FAILURES, _MAX_SKIPS = 10, 3
_RUNAWAY = 1e10
# Losses this much above the best, in units of the best interval's spread, are a divergence.
_WORSE = 20.0


class Divergence(Exception):  # noqa: N818, the end of a run and not a fault
    """The run cannot go on; the message says why and what to do."""


class Descent:
    """Parameters, steps, window and averages of one run; mutable.

    Args:
        loss: The loss.
        leaves: Its parameters.
        tolerance: See ``solve_stochastic``.
        state: What :meth:`state` returned, to go on from there.

    Attributes:
        losses: Loss at each step.
        notes: What went wrong on the way.
        num_gradients: Gradients so far.
        is_done: Whether the parameters are known as well as asked for.
    """

    def __init__(
        self, loss: NoisyLoss, leaves: Leaves, tolerance: float, state: Mapping[str, Any] | None
    ) -> None:
        self._loss, self._leaves, self._tolerance = loss, leaves, tolerance
        self.losses: list[float] = []
        self.notes: list[str] = []
        self.num_gradients = 0
        self.is_done = False
        self._level = 0  # 0 is the search
        self._rate = _SEARCH_RATE
        self._previous: Average | None = None
        self._accuracy: Accuracy | None = None
        self._skips = self._failures = 0
        self._checked = 0
        if state is None:
            self._x = self._origin = self._best_x = leaves.flatten()
            self._best_loss, self._best_spread = math.inf, 0.0
            self._steps, self._window = Steps(self._x), Window(self._x)
            self._units = Units(loss, leaves)
        else:
            self._restore(state)
        leaves.write(self._x)

    @property
    def _is_searching(self) -> bool:
        return self._level == 0

    # -- stepping ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take one step; whether it was one after which the averages were looked at.

        Raises:
            Divergence: If the run cannot go on.
        """
        if self._is_searching and len(self.losses) % _REFRESH == 0:
            self._measure_while_searching()
        estimate = self._loss.gradient(self._leaves)
        self.num_gradients += 1
        if estimate is None:
            self._skip()
            return False
        self._skips = 0
        loss, gradient = estimate
        self.losses.append(loss)
        direction = self._steps.direction(gradient, searching=self._is_searching)
        self._x = self._x - self._rate * self._units.values * direction
        self._leaves.write(self._x)
        is_block = self._window.add(self._x)
        num_blocks = self._window.num_blocks
        if is_block and num_blocks >= _FIRST_CHECK and num_blocks % _CHECK_BLOCKS == 0:
            self._check()
            return True
        return False

    def _measure_while_searching(self) -> None:
        count = len(self.losses)
        looks = count // _REFRESH
        # Gradients for curvatures are spent at steps 0, 10, 20, 40, 80, ...
        before = self._units.num_gradients
        self._units.measure(self._x, num_draws=4, weight=0.5, curvature=looks & (looks - 1) == 0)
        self.num_gradients += self._units.num_gradients - before

    def _skip(self) -> None:
        """Pass over draws at which the loss is not finite; go back where that is the rule."""
        self._skips += 1
        if self._skips > _MAX_SKIPS:
            self._go_back(f"the loss was not finite at {self._skips} steps in a row")

    def _go_back(self, reason: str) -> None:
        self._failures += 1
        if self._failures > _MAX_FAILURES:
            raise Divergence(
                f"diverged: {reason}, and {_MAX_FAILURES} smaller learning rates did not help. The "
                "parameters are the best seen. Start elsewhere (the guide's init_loc_fn), look for "
                "a log or a division of zero in the model, or use float64."
            )
        self._rate /= 2
        self.notes.append(
            f"step {len(self.losses)}: {reason}; went back and halved the learning rate to "
            f"{self._rate:.2g}"
        )
        self._skips = 0
        self._start_at(self._best_x)

    def _start_at(self, x: Tensor) -> None:
        self._x = x.clone()
        self._leaves.write(self._x)
        self._window = Window(self._x, self._window.block_size if self._level else 2)

    # -- looking at the averages -----------------------------------------------------------------

    def _check(self) -> None:
        recent = torch.tensor(self.losses[self._checked :], dtype=torch.float64)
        self._checked = len(self.losses)
        low, middle, high = (
            float(q) for q in recent.quantile(torch.tensor([0.25, 0.5, 0.75]).double())
        )
        if middle < self._best_loss:
            self._best_loss, self._best_spread, self._best_x = middle, high - low, self._x
        elif middle > self._best_loss + _WORSE * (self._best_spread + 1.0):
            self._go_back(f"the loss rose from {self._best_loss:.6g} to {middle:.6g}")
            return
        self._check_runaway()
        average = stationary_average(self._window.blocks, self._units.values)
        if average is None:
            return
        if self._is_searching:
            self._settle(average)
            return
        self._accuracy = compare(self._previous, average, self._units.values)
        verdict = self._accuracy.verdict(self._tolerance)
        if verdict == "done":
            self.is_done = True
        if verdict != "longer":
            self._average = average
            self._next_level(average)

    def _settle(self, average: Average) -> None:
        """End the search; the first rate makes the iterates' spread a fraction of a unit."""
        self._steps.settle()
        noise = (self._units.values * self._steps.gradient_sd).sort().values
        typical = float(noise[int(0.95 * (len(noise) - 1))])
        self._rate = min(self._rate, _LARGEST_RATE, 2.0 * _SPREAD / max(typical, 1e-6))
        self._level = 1
        self._measure_and_start(average.mean)

    def _next_level(self, average: Average) -> None: ...
