"""When iterates may be averaged, and when their average may be believed.

Iterates are looked at in blocks (:class:`~pyro_mf.solvers.window.Window`) and in the parameters'
units. Two questions are answered at every learning rate. Have the iterates stopped drifting? And
does the average move when the learning rate is halved? The bias of an average is proportional to
the learning rate, so what is left of it is about what the last halving changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pyro_mf.solvers.stationarity import (
    effective_sample_size,
    leading_components,
    mc_error,
    rhat_by_chance,
    split_rhat,
)

Verdict: TypeAlias = Literal["longer", "finer", "done"]
"""Go on at this learning rate, go on at half of it, or stop."""

MIN_BLOCKS = 32
_NUM_COMPONENTS = 3
# Fractions of the window that are dropped as the way to the optimum, until the rest is stationary.
_DROPPED = (0.0, 0.25, 0.5)
_MIN_EFFECTIVE = 1 / 8  # blocks that must be as good as independent
_Z = 2.0  # standard errors within which a change may be noise


@dataclass(frozen=True, eq=False)
class Average:
    """Mean of stationary iterates, and its Monte Carlo standard error.

    Args:
        mean: Shape ``(P,)``.
        error: Shape ``(P,)``.
    """

    mean: Tensor
    error: Tensor


def stationary_average(blocks: Tensor, units: Tensor) -> Average | None:
    """Average the longest tail of a window that does not drift.

    Split R-hat is asked of every parameter and of the directions along which they move most; its
    limit is what the largest of so many reaches by chance, so it tightens as the window fills.

    Args:
        blocks: Block means, shape ``(T, P)``.
        units: The parameters' units, shape ``(P,)``.

    Returns:
        The average, or ``None`` where every tail drifts or is too short to tell.
    """
    for dropped in _DROPPED:
        tail = blocks[int(dropped * len(blocks)) :]
        if len(tail) < MIN_BLOCKS:
            break
        scaled = tail / units
        series = torch.cat([scaled, leading_components(scaled, _NUM_COMPONENTS)], 1)
        # Folded, so that a spread that shrinks is seen as well as a mean that moves.
        series = torch.cat([series, (series - series.median(0).values).abs()], 1)
        limit = rhat_by_chance(series.shape[1], len(series))
        if float(split_rhat(series).max()) > limit:
            continue
        if float(effective_sample_size(series).min()) >= _MIN_EFFECTIVE * len(series):
            return Average(tail.mean(0), mc_error(tail))
    return None


@dataclass(frozen=True)
class Accuracy:
    """How well the parameters are known, in their units; largest over parameters.

    Args:
        error: Monte Carlo standard error of the last average.
        change: What halving the learning rate changed beyond noise; NaN where nothing was halved.
    """

    error: float
    change: float

    def verdict(self, tolerance: float) -> Verdict:
        """What to do next.

        Args:
            tolerance: Error of a parameter that is let pass, in its units, taken as three standard
                errors, or twice the change.
        """
        if math.isnan(self.change):
            # To see the bias it does not take the full precision.
            return "finer" if self.error <= tolerance / 2 else "longer"
        if self.change > tolerance / 2:
            return "finer"
        return "done" if self.error <= tolerance / 3 else "longer"


def compare(previous: Average | None, current: Average, units: Tensor) -> Accuracy:
    """Compare the averages of two learning rates.

    Args:
        previous: At twice the learning rate; ``None`` at the first.
        current: At the present learning rate.
        units: The parameters' units, shape ``(P,)``.
    """
    error = float((current.error / units).max())
    if previous is None:
        return Accuracy(error, math.nan)
    change = (current.mean - previous.mean).abs() - _Z * _noise(previous, current)
    return Accuracy(error, max(float((change / units).max()), 0.0))


def extrapolate(previous: Average, current: Average) -> Tensor:
    """The average at a learning rate of zero, as far as its bias can be told from noise.

    The bias is proportional to the learning rate, so halving the rate once more would change the
    average by half as much again, and so on: in sum by what the last halving changed.

    Args:
        previous: At twice the learning rate.
        current: At the present learning rate.

    Returns:
        Shape ``(P,)``.

    References:
        Dieuleveut, Durmus and Bach (2020), Bridging the Gap between Constant Step Size Stochastic
        Gradient Descent and Markov Chains, https://arxiv.org/abs/1707.06386
    """
    change = current.mean - previous.mean
    doubt = _Z * _noise(previous, current) / change
    return torch.where(
        doubt.abs() < 1.0, current.mean + change * (1.0 - doubt.square()), current.mean
    )


def _noise(previous: Average, current: Average) -> Tensor:
    return (previous.error.square() + current.error.square()).sqrt()
