"""The deterministic solver at many data sets side by side.

Several data sets are solved at a time, each in a thread of its own with its own draws, descents and
certificate; all ask for the density together, and one call of the graph over pairs of a draw and a
data set answers. A thread that is done takes the next data set, so that the batch stays full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks, Evaluate
from pyro_mf.density.data_sets import DataSets
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.lockstep import run_in_lockstep
from pyro_mf.solvers.outcome import Outcome, silent

FAILURES = (ModelError, NonFiniteError)
"""What ends the fit of one data set and leaves the others standing."""


@dataclass(frozen=True, eq=False)
class Solved:
    """Normal factors fitted to one data set.

    Args:
        outcome: What the solver reported.
        loc: Their locations, shape ``(D,)``.
        scale: Their scales, shape ``(D,)``.
    """

    outcome: Outcome
    loc: Tensor
    scale: Tensor


class _Factors:
    """As much of a guide as the solver needs; a real one would share Pyro's store among threads."""

    def __init__(self, loc: Tensor) -> None:
        self._params: tuple[Tensor, ...] = (loc, torch.ones_like(loc))

    def flat_params(self) -> tuple[Tensor, ...]:
        return self._params

    def flat_leaves(self) -> tuple[Tensor, ...]:
        return self._params

    def set_flat_params(self, params: tuple[Tensor, ...]) -> None:
        self._params = params


def solve_many_data(
    data_sets: DataSets,
    start: Tensor,
    *,
    seeds: Sequence[int],
    tolerance: float,
    max_gradients: int,
    num_at_once: int,
    is_done: Callable[[int], None],
) -> list[Solved | Exception | None]:
    """Fit Normal factors by the reverse KL to every data set.

    Args:
        data_sets: The log joints, without an obstacle.
        start: Locations where the way to each optimum starts, shape ``(D,)``.
        seeds: A seed per data set.
        tolerance: As for :func:`solve_deterministic`.
        max_gradients: Budget per data set.
        num_at_once: Data sets in a batch.
        is_done: Called with a data set's index when it is solved or has failed.

    Returns:
        Per data set its factors, the exception that ended it, or ``None`` where Ctrl-C came first.
    """
    count = len(data_sets)
    slots = min(num_at_once, count)
    found: list[Solved | Exception | None] = [None] * count
    _ = data_sets.log_joint.footprint, data_sets.at(0)  # what runs the model, in this thread

    def job(slot: int) -> Callable[[Evaluate], None]:
        def solve(evaluate: Evaluate) -> None:
            # Fixed in advance, so that what is computed together does not hang on the clock.
            for k in range(slot, count, slots):
                found[k] = _solve_one(data_sets, k, start, evaluate, seeds[k], limits)
                if found[k] is None:
                    return
                is_done(k)

        return solve

    limits = (tolerance, max_gradients)
    ends = run_in_lockstep(_with_index(data_sets), [job(slot) for slot in range(slots)])
    for end in ends:
        if isinstance(end, BaseException) and not isinstance(end, KeyboardInterrupt):
            raise end
    return found


def is_costly(data_sets: DataSets) -> bool:
    """Whether a draw takes so much arithmetic that batches of data sets save nothing."""
    return Blocks(data_sets.log_joint).is_costly


def _with_index(data_sets: DataSets) -> Evaluate:
    """The density of rows whose last column says which data set they belong to."""

    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        return data_sets.value_and_grad(rows[:, :-1].contiguous(), rows[:, -1].long())

    return evaluate


def _solve_one(
    data_sets: DataSets,
    index: int,
    start: Tensor,
    evaluate: Evaluate,
    seed: int,
    limits: tuple[float, int],
) -> Solved | Exception | None:
    def own(z: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(torch.cat([z, z.new_full((len(z), 1), index)], 1))

    factors = _Factors(start)
    try:
        outcome = solve_deterministic(
            data_sets.at(index, own),
            factors,  # type: ignore[arg-type]
            seed=seed,
            tolerance=limits[0],
            max_gradients=limits[1],
            report=silent,
        )
    except FAILURES as error:
        return error
    except KeyboardInterrupt:
        return None
    if outcome.stop_reason == "interrupted":
        return None
    loc, scale = factors.flat_params()
    return Solved(outcome, loc, scale)
