"""Where several starts ended, which is the best, and whether they agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.outcome import Outcome

# Two optima are different where their ELBOs differ by more than this many standard errors and a
# hundredth of a nat, or a location by more than a standard deviation of its factor.
_Z, _NATS, _SDS = 4.0, 0.01, 1.0


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where one start ended.

    Args:
        seed: Seed of the start and of the solver.
        outcome: What the solver reported.
        params: The guide's flat parameters there, each ``(D,)``; empty for guides without.
    """

    seed: int
    outcome: Outcome
    params: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def elbo(self) -> float:
        """ELBO in nats, minus infinity where there is none."""
        elbo = self.outcome.elbo
        return elbo if math.isfinite(elbo) else -math.inf


def best_of(optima: list[Optimum] | tuple[Optimum, ...]) -> int:
    """Index of the optimum with the highest ELBO; one that diverged is the last resort."""
    keys = [(o.outcome.stop_reason != "diverged", o.elbo) for o in optima]
    return max(range(len(keys)), key=keys.__getitem__)


def usable(optima: tuple[Optimum, ...]) -> tuple[Optimum, ...]:
    """The optima that have parameters worth drawing from."""
    return tuple(
        o for o in optima if o.params and o.outcome.stop_reason != "diverged" and o.elbo > -math.inf
    )


def describe_modes(optima: tuple[Optimum, ...], guide: Any) -> str | None:
    """Say in a sentence by how much optima differ beyond their errors; ``None`` if they agree."""
    found = usable(optima)
    if len(found) < 2:
        return None
    best = found[best_of(found)]
    worst = min(found, key=lambda o: o.elbo)
    lower = [o for o in found if best.elbo - o.elbo > _allowed(best, o)]
    apart = [_largest_shift(best, o, guide) for o in found if o is not best]
    shift, element = max(apart)
    # Medians of a mixture may lie anywhere between its modes, and be far apart at one optimum.
    is_mixture = isinstance(guide.family, FactorisedMixture)
    elsewhere = 0 if is_mixture else sum(s > _SDS for s, _ in apart)
    if lower:
        return (
            f"{len(lower)} of {len(found)} starts ended at a lower ELBO than the best: "
            f"{worst.elbo:.2f} ± {worst.outcome.elbo_se:.2g} against {best.elbo:.2f} ± "
            f"{best.outcome.elbo_se:.2g} nats, with '{element}' up to {shift:.2g} sds away. The "
            "best is the result; more starts may find a better one"
        )
    if elsewhere:
        return (
            f"{elsewhere} of {len(found)} starts ended elsewhere at the same ELBO, with "
            f"'{element}' up to {shift:.2g} sds away: the posterior has several modes (labels that "
            "can be swapped, signs), and the result describes one of them"
        )
    return None


def current_params(guide: Any) -> tuple[Tensor, ...]:
    """A copy of a guide's flat parameters; empty for guides without."""
    if not isinstance(guide, FlatGuide):
        return ()
    with torch.no_grad():
        return tuple(p.detach().clone() for p in guide.flat_params())


def _allowed(one: Optimum, other: Optimum) -> float:
    return _NATS + _Z * math.hypot(one.outcome.elbo_se, other.outcome.elbo_se)


def _largest_shift(best: Optimum, other: Optimum, guide: FlatGuide) -> tuple[float, str]:
    """Largest distance of two optima's medians, in sds of the better one, and the element."""
    half = torch.tensor([[0.5], [0.8413447]], dtype=best.params[0].dtype)
    low, high = guide.family.quantile(best.params, half.to(best.params[0]))
    there = guide.family.quantile(other.params, half[:1].to(best.params[0]))[0]
    shift = (there - low).abs() / (high - low)
    index = int(shift.argmax())
    return float(shift[index]), guide.layout.element_names()[index]
