"""What chains learn while they warm up: step size and trajectory length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mf.kernels.mixing import effective_sample_size

# A Newton step on the logarithm: near an acceptance of .8 it falls by .4 per unit, in any dimension
# large enough for the acceptance to be that of a Gaussian energy error.
_GAIN = 2.5
_FACTOR = 1.5  # between trajectory lengths that are compared
_BETTER = 1.05  # what counts as an improvement, beyond noise


@dataclass
class StepSize:
    """Robbins-Monro iterations for the step size that gives a mean acceptance.

    The mean over many chains has little noise, so that steps can be long; where they end is the
    mean of the second half of them.

    Args:
        value: Step size to begin with, in the metric's unit.
        target: Mean acceptance probability wanted, between 0 and 1.

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler, https://arxiv.org/abs/1111.4246
    """

    value: float
    target: float
    logs: list[float] = field(default_factory=list)

    def update(self, acceptance: float) -> None:
        """Move by what one iteration of all chains accepted on average."""
        gain = _GAIN / math.sqrt(len(self.logs) + 1.0)
        self.value *= math.exp(gain * (acceptance - self.target))
        self.logs.append(math.log(self.value))

    def settle(self) -> None:
        """Take the average, and be ready for new circumstances."""
        if self.logs:
            half = self.logs[len(self.logs) // 2 :]
            self.value = math.exp(sum(half) / len(half))
        self.logs = []


@dataclass
class LengthSearch:
    """The trajectory length that gives most effective draws per gradient: longer, else shorter.

    Args:
        length: Length to begin with, in the metric's unit of time.

    Example:
        >>> search = LengthSearch(1.0)
        >>> while not search.is_done:
        ...     search.report(-abs(search.length - 2.0))
        >>> search.length
        2.25
    """

    length: float
    best: tuple[float, float] = (math.nan, -math.inf)
    factor: float = _FACTOR
    is_done: bool = False

    def report(self, efficiency: float) -> None:
        """Say how efficient the present length was, and go to the next."""
        length, reached = self.best
        if efficiency > reached * (_BETTER if reached > 0 else 1.0):
            self.best = (self.length, efficiency)
            self.length *= self.factor
        elif self.factor > 1.0 and math.isclose(self.length, length * _FACTOR):
            self.factor = 1.0 / _FACTOR
            self.length = length * self.factor
        else:
            self.is_done = True
            self.length = length


def worst_effective_size(chains: Tensor) -> float:
    """Effective draws of the worst mean or variance of chains ``(T, N, D)``."""
    squares = (chains - chains.mean((0, 1))).square()
    both = torch.cat([effective_sample_size(chains), effective_sample_size(squares)])
    return float(both.min())
