"""What a contender is asked and answers: plain numbers, since it runs in its own process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

BySite: TypeAlias = dict[str, np.ndarray]
"""Arrays on the unconstrained axis by latent site."""


@dataclass(frozen=True)
class Task:
    """One contender's work on one posterior.

    Args:
        contender: Key of ``worker.CONTENDERS``.
        problem: Name of the posterior.
        seed: Seed of its random numbers.
        steps: Steps to take, where the contender has to be told.
        decays: Whether its step size decays.
        limit: Seconds after which to stop, where it can.
        target: Mean and sd of our fit by site, whose ELBO is to be reached; for those who check.
        points: Unconstrained points by site, rows first, at which to give the log density.
        repeats: Fits in this process: the first is cold.
    """

    contender: str
    problem: str
    seed: int = 0
    steps: int = 0
    decays: bool = False
    limit: float = 120.0
    target: dict[str, dict[str, list]] | None = None
    points: dict[str, list] = field(default_factory=dict)
    repeats: int = 2


@dataclass(frozen=True)
class Fit:
    """A fitted product of Gaussians.

    Args:
        seconds: Wall time of the fit, from the model to the parameters.
        gradients: Gradient evaluations.
        draws: Draws that each of them averages.
        loc: Means on the unconstrained axis.
        sd: Standard deviations on the unconstrained axis.
        stopped: Why it stopped.
        covariance_factor: Where the fit has a linear response: a lower triangular factor of its
            covariance, in the order of our flat vector.
    """

    seconds: float
    gradients: int
    draws: int
    loc: BySite
    sd: BySite
    stopped: str
    covariance_factor: np.ndarray | None = None


class Contender(Protocol):
    """A way to fit one posterior; whatever it imports and loads before :meth:`fit` is not timed."""

    def fit(self) -> Fit:
        """Fit from scratch, and time it."""
        ...

    def log_density(self, points: BySite) -> np.ndarray | None:
        """The model's log density on the unconstrained axis, rows first, up to a constant."""
        ...
