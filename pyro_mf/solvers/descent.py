"""One run of the stochastic solver: look for the optimum, then average around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf.solvers import random_state
from pyro_mf.solvers.averaging import Accuracy, Average, compare, extrapolate, stationary_average
from pyro_mf.solvers.leaves import Leaves, relative_names
from pyro_mf.solvers.noisy_loss import NoisyLoss
from pyro_mf.solvers.outcome import Progress
from pyro_mf.solvers.steps import Steps
from pyro_mf.solvers.units import Units
from pyro_mf.solvers.window import Window

_SEARCH_RATE, _LARGEST_RATE = 0.5, 0.25
_SPREAD = 0.25  # sd of the iterates, in units, that the first average is taken at
_REFRESH = 10  # steps between looks at the units while they change
_CHECK_BLOCKS, _FIRST_CHECK = 32, 64  # an average is looked at after so many blocks
_MAX_FAILURES, _MAX_SKIPS = 10, 20
_WORSE = 20.0  # a loss so many spreads above the best is no noise
_RUNAWAY = 1e10  # a way that no proper posterior asks for, relative to the start


class Divergence(Exception):  # the end of a run, not a fault
    """The run cannot go on; the message says why and what to do."""


class Descent:
    """Parameters, steps, window and averages of one run; mutable.

    Args:
        loss: The loss.
        leaves: Its parameters.
        tolerance: See :func:`~pyro_mf.solvers.stochastic.solve_stochastic`.
        state: What :meth:`state` returned, to go on from there.

    Attributes:
        losses: Loss at each step.
        notes: What went wrong on the way.
        num_gradients: Gradients so far.
        num_skipped: Steps at which the loss was not finite.
        is_done: Whether the parameters are known as well as asked for.

    Raises:
        ValueError: If the state belongs to other parameters.
    """

    def __init__(
        self,
        loss: NoisyLoss,
        leaves: Leaves,
        tolerance: float,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._loss, self._leaves, self._tolerance = loss, leaves, tolerance
        self.losses: list[float] = []
        self.notes: list[str] = []
        self.num_gradients = self.num_skipped = 0
        self.is_done = False
        self._level = 0  # of the learning rate; 0 is the search
        self._rate = _SEARCH_RATE
        self._skips = self._failures = self._checked = 0
        self._x = self._origin = self._safe_x = self._best_x = leaves.flatten()
        self._best_loss, self._best_spread = math.inf, 0.0
        self._steps, self._window = Steps(self._x), Window(self._x)
        self._units = Units(loss, leaves)
        self._previous: Average | None = None
        self._accuracy: Accuracy | None = None
        if state is not None:
            self._restore(state)

    @property
    def _is_searching(self) -> bool:
        return self._level == 0

    # -- stepping ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Take one step; whether the averages were looked at after it.

        Raises:
            Divergence: If the run cannot go on.
        """
        if self._is_searching and len(self.losses) % _REFRESH == 0:
            self._check_runaway()
            looks = len(self.losses) // _REFRESH
            # Gradients for curvatures are spent at steps 0, 10, 20, 40, 80, ...
            self._measure(num_draws=4, weight=0.5, curvature=looks & (looks - 1) == 0)
        self.num_gradients += 1
        count = len(self.losses)
        estimate = self._loss.gradient(self._leaves, watch=count & (count - 1) == 0)
        if estimate is None:
            self._skips += 1
            self.num_skipped += 1
            if self._skips > _MAX_SKIPS:
                self._go_back(f"the loss was not finite at {self._skips} steps in a row")
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

    def _measure(self, *, num_draws: int, weight: float, curvature: bool) -> None:
        before = self._units.num_gradients
        self._units.measure(self._x, num_draws=num_draws, weight=weight, curvature=curvature)
        self.num_gradients += self._units.num_gradients - before

    def _go_to(self, x: Tensor) -> None:
        self._x = x
        self._leaves.write(x)
        self._window = Window(x)

    def _go_back(self, reason: str) -> None:
        self._failures += 1
        self._skips = 0
        self._level, self._previous, self._accuracy = 0, None, None
        self._rate = _SEARCH_RATE / 2**self._failures
        self._steps = Steps(self._x)
        self._go_to(self._safe_x)
        if self._failures > _MAX_FAILURES:
            raise Divergence(
                f"{reason}, and {_MAX_FAILURES} smaller learning rates did not help. The "
                "parameters are the best seen. Start elsewhere (the guide's init_loc_fn), look "
                "for a log or a division of zero in the model, or use float64."
            )
        self.notes.append(
            f"step {len(self.losses)}: {reason}; went back to the best parameters and halved the "
            f"learning rate"
        )

    # -- looking at the averages -----------------------------------------------------------------

    def _check(self) -> None:
        if not self._check_losses():
            return
        average = stationary_average(self._window.blocks, self._units.values)
        if average is None:
            return
        if self._is_searching:
            self._settle(average)
            return
        self._accuracy = compare(self._previous, average, self._units.values)
        verdict = self._accuracy.verdict(self._tolerance)
        self._best_x = average.mean
        if self._previous is not None:
            self._best_x = extrapolate(self._previous, average)
        self.is_done = verdict == "done"
        if verdict != "longer":
            self._previous = average
            self._next_level()

    def _check_losses(self) -> bool:
        """Remember where the loss was lowest; go back there where it has become much higher."""
        recent = torch.tensor(self.losses[self._checked :], dtype=torch.float64)
        self._checked = len(self.losses)
        low, middle, high = recent.quantile(recent.new_tensor([0.25, 0.5, 0.75])).tolist()
        if middle > self._best_loss + _WORSE * (self._best_spread + 1.0):
            self._go_back(f"the loss rose from {self._best_loss:.6g} to {middle:.6g}")
            return False
        if middle < self._best_loss:
            self._best_loss, self._best_spread = middle, high - low
            if self.losses[-1] < high + _WORSE * self._best_spread:
                self._safe_x = self._x
        return True

    def _check_runaway(self) -> None:
        way = (self._x - self._origin).abs() / self._origin.abs().clamp(min=1.0)
        farthest = int(way.argmax())
        if float(way[farthest]) > _RUNAWAY:
            reached = float(self._x[farthest])
            self._go_to(self._safe_x)
            raise Divergence(
                f"the loss falls without bound: '{self._leaves.describe(farthest)}' has reached "
                f"{reached:.3g} after {len(self.losses)} steps. The posterior is "
                "probably improper: look for a latent on which the density does not depend, and "
                "give it a proper prior."
            )

    def _settle(self, average: Average) -> None:
        """End the search. The first learning rate gives the iterates the spread wanted."""
        noise = (self._units.values * self._steps.gradient_sd).sort().values
        typical = float(noise[int(0.95 * (len(noise) - 1))])
        self._rate = min(self._rate, _LARGEST_RATE, 2.0 * _SPREAD**2 / max(typical, 1e-6))
        self._rate *= 2.0  # halved by the next level
        self._steps.settle()
        self._best_x = average.mean
        self._next_level()

    def _next_level(self) -> None:
        self._level += 1
        self._rate /= 2
        self._go_to(self._best_x)
        self._measure(num_draws=32, weight=1.0, curvature=True)

    # -- what is known -----------------------------------------------------------------------------

    def best(self) -> Tensor:
        """The best parameters, shape ``(P,)``: an average as soon as there is one."""
        if not self._is_searching:
            return self._best_x
        blocks = self._window.blocks
        if len(blocks) < _CHECK_BLOCKS or float(self._steps.boost.max()) > 1.0:
            return self._x
        return blocks[len(blocks) // 2 :].mean(0)

    def progress(self) -> Progress:
        """What a progress bar shows."""
        recent = torch.tensor(self.losses[-_FIRST_CHECK:], dtype=torch.float64)
        phase = "search" if self._is_searching else f"averaging {self._level}"
        elbo_se = float(recent.std()) / math.sqrt(len(recent))
        return Progress(phase, self.num_gradients, -float(recent.mean()), elbo_se)

    def describe(self) -> str:
        """How far the run has come, as the end of a sentence."""
        if self._is_searching:
            return "the parameters were still on their way to the optimum"
        if self._accuracy is None:
            return f"the iterates at learning rate {self._rate:.2g} had not yet stopped drifting"
        error, change = self._accuracy.error, self._accuracy.change
        end = (
            "what halving the learning rate changes is not known yet"
            if math.isnan(change)
            else f"halving the learning rate changed them by {change:.2g} beyond noise"
        )
        return (
            f"the averaged parameters have a Monte Carlo error of at most {error:.2g} sds of the "
            f"guide, and {end}"
        )

    # -- saving ------------------------------------------------------------------------------------

    _NUMBERS = (
        "num_gradients",
        "num_skipped",
        "_level",
        "_rate",
        "_skips",
        "_failures",
        "_checked",
        "_best_loss",
        "_best_spread",
    )
    _VECTORS = ("_x", "_origin", "_safe_x", "_best_x")

    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which another object goes on with the same bits."""
        previous = self._previous
        return {
            "names": list(self._leaves.names),
            "shapes": self._leaves.shapes,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "notes": list(self.notes),
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
            "vectors": {name: getattr(self, name).clone() for name in self._VECTORS},
            "previous": None if previous is None else [previous.mean, previous.error],
            "steps": self._steps.state(),
            "window": self._window.state(),
            "units": self._units.state(),
            "random": random_state.get_state(self._leaves.device),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        names, shapes = list(self._leaves.names), self._leaves.shapes
        theirs, ours = (
            relative_names(n, self._loss.guide) for n in (state.get("names", ()), names)
        )
        if [theirs, state.get("shapes")] != [ours, shapes]:
            raise ValueError(
                f"the state belongs to parameters {state.get('names')} of shapes "
                f"{state.get('shapes')}; here they are {names} of shapes {shapes}. Give the model "
                "and guide that it was saved with."
            )
        self.losses = state["losses"].tolist()
        self.notes = list(state["notes"])
        for name in self._NUMBERS:
            setattr(self, name, state["numbers"][name])
        for name in self._VECTORS:
            setattr(self, name, state["vectors"][name].clone())
        previous = state["previous"]
        self._previous = None if previous is None else Average(*previous)
        self._steps = Steps.from_state(state["steps"])
        self._window = Window.from_state(state["window"])
        self._units.restore(state["units"])
        self._leaves.write(self._x)
        random_state.set_state(state["random"], self._leaves.device)
