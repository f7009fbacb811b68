"""What chains learn while they warm up: step size and trajectory length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A Newton step on the logarithm: near an acceptance of .8 it falls by .4 per unit, in any dimension
# large enough for the acceptance to be that of a Gaussian energy error.
_GAIN = 2.5
_FACTOR = 1.5  # between trajectory lengths that are compared
# Gain in efficiency that a longer, and a shorter, trajectory is to bring. Estimates are noisy, and
# one that is too short by far costs more than one that is too long by a factor.
_LONGER, _SHORTER = 0.9, 1.15


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
        """Take the average of the second half, on the logarithm, and start anew from there."""
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
        ...     search.report(1.0 / abs(search.length - 2.0))
        >>> search.length
        2.25
    """

    length: float
    best: float = math.nan
    is_done: bool = False
    _efficiency: float = -math.inf
    _factor: float = _FACTOR
    _improvements: int = -1  # the first length is none

    def report(self, efficiency: float) -> None:
        """Say how efficient the present length was, and go to the next."""
        needed = _LONGER if self._factor > 1.0 else _SHORTER
        if self._improvements < 0 or efficiency > needed * self._efficiency:
            self.best, self._efficiency = self.length, efficiency
            self._improvements += 1
        elif self._factor > 1.0 and self._improvements == 0:
            self._factor = 1.0 / _FACTOR
        else:
            self.is_done = True
        self.length = self.best if self.is_done else self.best * self._factor


def renewal(z: Tensor, num_directions: int = 4) -> Tensor:
    r"""Effective draws per iteration of means and variances, as few iterations show them.

    Effective sizes of a short run hide what does not change within it. The correlation
    :math:`\rho` from one iteration to the next shows it, as :math:`(1 - \rho) / (1 + \rho)`, for
    the elements, for the directions along which chains stay apart most, and for the sizes of all
    of these, which have the time scale of squares with less noise.

    Args:
        z: Draws, shape ``(T, N, D)``, in units that make elements comparable.
        num_directions: Directions to look at, at most D.

    Returns:
        Shape ``(2 D + 2 num_directions,)``, from 0, where nothing moves, to 1.
    """
    centred = z - z.mean((0, 1))
    directions = torch.linalg.svd(centred.mean(0), full_matrices=False).Vh[:num_directions]
    series = torch.cat([centred, centred @ directions.T], -1)
    correlation = torch.cat([_correlation(series), _correlation(series.abs())])
    return (1.0 - correlation) / (1.0 + correlation)


def _correlation(
    series: Tensor,  # shape: (T, N, P)
) -> Tensor:
    """Correlation between neighbours, at least 0, shape ``(P,)``."""
    jump = (series[1:] - series[:-1]).square().mean((0, 1))
    variance = series.var((0, 1))
    ratio = torch.where(variance > 0, jump / variance, 0.0)
    return (1.0 - 0.5 * ratio).clamp(0.0, 1.0)
