"""What every solver reports: why it stopped, what it reached, and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from pyro_mf.solvers.evidence import EvidenceBounds
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.posterior_draws import PosteriorDraws

StopReason = Literal["converged", "budget", "interrupted", "diverged"]
"""Why a solver stopped. Whatever the reason, the guide holds the best parameters it has seen."""


class Progress(NamedTuple):
    """What a solver is doing, for a progress bar.

    Args:
        phase: A word or two: ``"start"``, ``"32 draws"``, ``"averaging"``.
        gradients: Gradient evaluations so far (one is one gradient of the ELBO's estimate).
        elbo: Latest ELBO in nats, NaN where there is none yet.
        elbo_se: Its standard error in nats, NaN where there is none yet.
    """

    phase: str
    gradients: int
    elbo: float
    elbo_se: float


Report: TypeAlias = Callable[[Progress], None]
"""Called by a solver now and then."""


def silent(progress: Progress) -> None:
    """Report to nobody."""


@dataclass(frozen=True, eq=False)
class Forward:
    """What a fit by forward KL knows beyond its guide.

    Args:
        draws: Draws of the posterior that the factors were fitted to.
        eubo: Evidence upper bound of the guide, in nats: log evidence plus KL(p || q).
        eubo_se: Its standard error.
        bounds: Between which the log evidence lies, by the best approximation known.
    """

    draws: PosteriorDraws
    eubo: float
    eubo_se: float
    bounds: EvidenceBounds


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of a solver's run; the parameters are in the guide.

    Args:
        elbo: ELBO of the guide in nats, at fresh draws; NaN if it has none.
        elbo_se: Its standard error in nats.
        stop_reason: See :data:`StopReason`.
        message: One sentence: why it stopped, with the numbers.
        losses: Negative ELBO in nats after each iteration, as the solver saw it.
        num_gradients: Gradient evaluations of the ELBO's estimate.
        seconds: Wall time by phase.
        notes: Sentences on what went wrong on the way and what was done about it.
        response: Linear response at the optimum, where the solver computed it.
        refusal: Why there is none.
        state: Tensors and numbers from which the solver can go on.
        forward: Draws and bounds of a fit by forward KL.
    """

    elbo: float
    elbo_se: float
    stop_reason: StopReason
    message: str
    losses: tuple[float, ...]
    num_gradients: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    response: LinearResponse | None = None
    refusal: str = ""
    state: dict[str, Any] = field(default_factory=dict, repr=False)
    forward: Forward | None = None

    @property
    def converged(self) -> bool:
        """Whether the solver stopped because it was done."""
        return self.stop_reason == "converged"
