"""Fits from one or several starts: run them, keep every optimum, and say whether they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.fitting.choice import Choice
from pyro_mf.fitting.problem import Problem
from pyro_mf.fitting.score import score_objective, without_pathwise
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.outcome import Outcome, Report
from pyro_mf.solvers.stochastic import solve_stochastic

# Two optima are different where their ELBOs differ by more than this many standard errors and a
# hundredth of a nat, or a location by more than a standard deviation of its factor.
_Z, _NATS, _SDS = 4.0, 0.01, 1.0
_BOX = 2.0  # half the side of the box from which starts are drawn, as in Stan


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


def solve(
    problem: Problem,
    choice: Choice,
    *,
    seed: int,
    max_gradients: int | None,
    report: Report,
    disperse: bool = False,
    state: Mapping[str, Any] | None = None,
) -> Optimum:
    """Run the chosen solver once; the problem's guide ends at the optimum.

    Args:
        problem: What is to be solved.
        choice: The solver.
        seed: Seed of start and solver.
        max_gradients: Budget; ``None`` for the solver's own.
        report: Where progress goes.
        disperse: Start at a random point.
        state: State of an earlier run of the stochastic solver, to go on from there.
    """
    guide, args, kwargs = problem.guide, problem.model_args, problem.model_kwargs
    if choice.solver == "deterministic":
        budget = {} if max_gradients is None else {"max_gradients": max_gradients}
        outcome = solve_deterministic(
            problem.log_joint, guide, seed=seed, disperse=disperse, report=report, **budget
        )
    else:
        budget = {} if max_gradients is None else {"max_steps": max_gradients}
        if disperse:
            guide.set_flat_params(_random_start(guide, seed))
        outcome = solve_stochastic(
            problem.model,
            without_pathwise(guide) if choice.needs_score else guide,
            args,
            kwargs,
            objective=score_objective() if choice.needs_score else problem.objective,
            seed=seed,
            report=report,
            state=state,
            **budget,
        )
    return Optimum(seed, outcome, current_params(guide))


def solve_from_starts(
    problem: Problem,
    choice: Choice,
    num: int,
    *,
    seed: int,
    max_gradients: int | None,
    report_for: Callable[[str], Report],
) -> tuple[tuple[Optimum, ...], tuple[str, ...]]:
    """Run the solver from the guide's own start and from dispersed ones, until Ctrl-C.

    Args:
        problem: What is to be solved. Its guide ends at the best optimum.
        choice: The solver.
        num: Number of starts; more than one needs a guide of ours.
        seed: Seed of the first start, and of all others through it.
        max_gradients: Budget of each start.
        report_for: Makes a report for a start from its label.

    Returns:
        The optima, in the order of the starts, and a sentence for each start that failed.

    Raises:
        ModelError: If the first start fails because of the model.
        NonFiniteError: If the first start fails because the density is not finite.
    """
    optima: list[Optimum] = []
    failures: list[str] = []
    own_start = current_params(problem.guide)
    for k in range(num):
        label = f"start {k + 1} of {num}"
        report = report_for(label if num > 1 else "fit")
        if k:  # what a start does not say, such as scales, is as in the first
            problem.guide.set_flat_params(own_start)
        try:
            optimum = solve(
                problem,
                choice,
                seed=seed + k,
                max_gradients=max_gradients,
                report=report,
                disperse=k > 0,
            )
        except (ModelError, NonFiniteError) as error:
            if not optima:
                raise
            failures.append(f"{label} failed: {error}")
            continue
        optima.append(optimum)
        if optimum.outcome.stop_reason == "interrupted":
            break
    if num > 1:
        problem.guide.set_flat_params(optima[best_of(optima)].params)
    return tuple(optima), tuple(failures)


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
    elsewhere = sum(s > _SDS for s, _ in apart)
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


def _random_start(guide: FlatGuide, seed: int) -> tuple[Tensor, ...]:
    """The guide's parameters with locations drawn from a box."""
    given = current_params(guide)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(guide.layout.size, generator=generator, dtype=torch.float64)
    loc = _BOX * (2 * uniform - 1)
    names = guide.family.param_names
    return tuple(loc.to(p) if n == "loc" else p for n, p in zip(names, given, strict=True))


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
