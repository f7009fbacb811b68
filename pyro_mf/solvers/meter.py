"""Counts what a solver spends, and keeps the best point it has seen."""

from __future__ import annotations

import math

from torch import Tensor

from pyro_mf.density.blocks import Blocks, Evaluate
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.outcome import Progress, Report

ROWS = 64  # points at which a gradient of the log joint counts as one


class BudgetSpentError(Exception):
    """The solver may compute no more gradients."""


class Meter:
    """What one run of the deterministic solver has spent and seen.

    Args:
        max_gradients: Gradients after which the run is to end.
        report: Called at every gradient.

    Attributes:
        num_gradients: Gradients so far.
        losses: Negative ELBO at each of them, where it was finite.
        best: Lowest loss over the present draws, and where.
        elbo_se: Standard error of the ELBO to report with it.
    """

    def __init__(self, max_gradients: int, report: Report) -> None:
        self.num_gradients = 0
        self.losses: list[float] = []
        self.best: tuple[float, Tensor] | None = None
        self.elbo_se = math.nan
        self._max_gradients = max_gradients
        self._report = report

    def count(self, num_draws: int, x: Tensor, loss: float) -> None:
        """Note one gradient.

        Raises:
            BudgetSpentError: If it was the last that may be computed.
        """
        self.num_gradients += 1
        if math.isfinite(loss):
            self.losses.append(loss)
            if self.best is None or loss < self.best[0]:
                self.best = loss, x.clone()
            phase = f"{num_draws} draws"
            self._report(Progress(phase, self.num_gradients, -loss, self.elbo_se))
        if self.num_gradients >= self._max_gradients:
            raise BudgetSpentError


class MeteredELBO(FixedDrawELBO):
    """A fixed-draw ELBO whose gradients are counted.

    Args:
        blocks: The log joint.
        draws: Draws, as for :class:`FixedDrawELBO`.
        meter: Where they are counted; what it holds of other draws is forgotten.
    """

    def __init__(self, blocks: Blocks, draws: Tensor, meter: Meter) -> None:
        super().__init__(blocks, draws)
        self._meter = meter
        meter.best = None  # losses over other draws do not compare

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """As in :class:`FixedDrawELBO`.

        Raises:
            BudgetSpentError: If no more gradients may be computed.
        """
        value, gradient = super().value_and_gradient(x)
        self._meter.count(self.num_draws, x, value)
        return value, gradient


class MeteredDensity:
    """A density that may be asked so often.

    Args:
        density: The density.
        max_gradients: How often, at 64 points each.
    """

    def __init__(self, density: Evaluate, max_gradients: int) -> None:
        self._density, self._most = density, max_gradients
        self._num_rows = 0

    @property
    def num_gradients(self) -> int:
        """Gradients at 64 points each so far."""
        return math.ceil(self._num_rows / ROWS)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradients at the rows of ``z``.

        Raises:
            BudgetSpentError: If it has been asked too often.
        """
        if self.num_gradients >= self._most:
            raise BudgetSpentError
        self._num_rows += len(z)
        return self._density(z)
