"""Where several starts ended, which is the best, and whether they agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.outcome import Outcome

# Two optima are different where their ELBOs differ by more than this many standard errors and a
# hundredth of a nat, a location by more than a standard deviation of its factor, or a probability
# by more than a half.
_Z, _NATS, _SDS, _PROBABILITY = 4.0, 0.01, 1.0, 0.5


@dataclass(frozen=True, eq=False)
class Optimum:
    """Where one start ended.

    Args:
        seed: Seed of the start and of the solver.
        outcome: What the solver reported.
        params: The guide's parameters there, as :func:`current_params` gives them; empty for guides
            of other kinds.
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
    where = max(apart)[1]
    # Medians of a mixture may lie anywhere between its modes, and be far apart at one optimum.
    is_mixture = isinstance(guide.family, FactorisedMixture)
    elsewhere = 0 if is_mixture else sum(shift > 1.0 for shift, _ in apart)
    if lower:
        return (
            f"{len(lower)} of {len(found)} starts ended at a lower ELBO than the best: "
            f"{worst.elbo:.2f} ± {worst.outcome.elbo_se:.2g} against {best.elbo:.2f} ± "
            f"{best.outcome.elbo_se:.2g} nats, with {where}. The best is the result; more starts "
            "may find a better one"
        )
    if elsewhere:
        return (
            f"{elsewhere} of {len(found)} starts ended elsewhere at the same ELBO, with {where}: "
            "the posterior has several modes (labels that can be swapped, signs), and the result "
            "describes one of them"
        )
    return None


def current_params(guide: Any) -> tuple[Tensor, ...]:
    """A copy of a guide's flat parameters, then of its discrete factors' logits; else empty."""
    if not isinstance(guide, FlatGuide):
        return ()
    with torch.no_grad():
        params = guide.flat_params()
        if isinstance(guide, DiscreteGuide):
            params += guide.discrete_params()
        return tuple(p.detach().clone() for p in params)


def restore_params(guide: FlatGuide, params: tuple[Tensor, ...]) -> None:
    """Give a guide the parameters that :func:`current_params` copied.

    Raises:
        ValueError: If they do not fit it.
    """
    flat, logits = split_params(guide, params)
    guide.set_flat_params(flat)
    if isinstance(guide, DiscreteGuide):
        guide.set_discrete_params(logits)


def split_params(
    guide: FlatGuide, params: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Flat parameters, and logits of discrete factors."""
    count = len(guide.family.param_names)
    return params[:count], params[count:]


def _allowed(one: Optimum, other: Optimum) -> float:
    return _NATS + _Z * math.hypot(one.outcome.elbo_se, other.outcome.elbo_se)


def _largest_shift(best: Optimum, other: Optimum, guide: FlatGuide) -> tuple[float, str]:
    """How far two optima are apart, one and more being elsewhere, and where most, in words."""
    found = [(0.0, "no latent elsewhere")]
    (own, logits), (theirs, others) = (split_params(guide, o.params) for o in (best, other))
    if guide.layout.sites:
        half = torch.tensor([[0.5], [0.8413447]], dtype=own[0].dtype).to(own[0])
        low, high = guide.family.quantile(own, half)
        shift = (guide.family.quantile(theirs, half[:1])[0] - low).abs() / (high - low)
        index = int(shift.argmax())
        farthest = float(shift[index])
        element = guide.layout.element_names()[index]
        found.append((farthest / _SDS, f"'{element}' up to {farthest:.2g} sds away"))
    for site, one, two in zip(getattr(guide, "discrete_sites", ()), logits, others, strict=True):
        change = site.family.log_probs((one,)).exp() - site.family.log_probs((two,)).exp()
        farthest = float(change.abs().max())
        text = f"probabilities of '{site.name}' up to {farthest:.2g} apart"
        found.append((farthest / _PROBABILITY, text))
    return max(found)
