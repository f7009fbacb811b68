"""Run the chosen solver, from one start or from several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.families import Normal
from pyro_mf.fitting.choice import Choice
from pyro_mf.fitting.problem import Limits, Problem
from pyro_mf.fitting.restarts import Optimum, best_of, current_params, restore_params
from pyro_mf.fitting.score import score_objective, without_pathwise
from pyro_mf.guides import AutoMeanFieldMixture
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.auto_families import solve_auto
from pyro_mf.solvers.coordinate_ascent import solve_coordinates
from pyro_mf.solvers.deterministic import solve_deterministic, solve_from_many
from pyro_mf.solvers.labels import solve_with_labels
from pyro_mf.solvers.mixture import solve_mixture
from pyro_mf.solvers.moment_matching import fit_given, solve_moments
from pyro_mf.solvers.outcome import Report
from pyro_mf.solvers.pathwise import solve_pathwise
from pyro_mf.solvers.stochastic import solve_stochastic

_BOX = 2.0  # half the side of the box from which starts are drawn, as in Stan

# Errors of a start that leave the others standing.
_FAILURES = (ModelError, NonFiniteError)


def solve(
    problem: Problem,
    choice: Choice,
    *,
    seed: int,
    limits: Limits,
    report: Report,
    disperse: bool = False,
    given: Tensor | None = None,
    state: Mapping[str, Any] | None = None,
) -> Optimum:
    """Run the chosen solver from one start; the problem's guide ends at the optimum.

    Args:
        problem: What is to be solved.
        choice: The solver.
        seed: Seed of start and solver.
        limits: When it stops.
        report: Where progress goes.
        disperse: Start the stochastic solver at a random point.
        given: Draws of the posterior for moment matching, shape ``(chains, S, D)``.
        state: State of an earlier run of the stochastic solver, to go on from there.
    """
    guide, args, kwargs = problem.guide, problem.model_args, problem.model_kwargs
    options = limits.options("max_gradients")
    if disperse and isinstance(guide, DiscreteGuide):
        guide.set_discrete_params(_random_logits(guide, seed))
    if choice.solver == "deterministic" and _has_discrete(guide) and not guide.layout.sites:
        options = limits.options("max_sweeps")
        del options["tolerance"]  # which is in sds
        outcome = solve_coordinates(problem.model, guide, args, kwargs, report=report, **options)
    elif (
        choice.solver == "deterministic"
        and isinstance(guide, DiscreteGuide)
        and guide.has_discrete_factors
    ):
        outcome = solve_with_labels(
            problem.log_joint, guide, seed=seed, report=report, disperse=disperse, **options
        )
    elif choice.solver == "deterministic" and guide.is_auto:
        outcome = solve_auto(
            problem.log_joint, guide, seed=seed, report=report, disperse=disperse, **options
        )
    elif choice.solver == "deterministic" and isinstance(guide.family, Normal):
        outcome = solve_deterministic(problem.log_joint, guide, seed=seed, report=report, **options)
    elif choice.solver == "deterministic":
        is_mixture = isinstance(guide, AutoMeanFieldMixture)
        run = solve_mixture if is_mixture else solve_pathwise
        outcome = run(
            problem.log_joint, guide, seed=seed, report=report, disperse=disperse, **options
        )
    elif choice.solver == "moment_matching" and given is not None:
        outcome = fit_given(
            problem.log_joint,
            guide,
            given,
            seed=seed,
            tolerance=limits.tolerance,
            has_gradient=not choice.needs_score,
            report=report,
        )
    elif choice.solver == "moment_matching":
        outcome = solve_moments(
            problem.log_joint, guide, method=choice.source, seed=seed, report=report, **options
        )
    else:
        if disperse and guide.layout.sites:
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
            **limits.options("max_steps"),
        )
    return Optimum(seed, outcome, current_params(guide))


def solve_from_starts(
    problem: Problem,
    choice: Choice,
    num: int,
    *,
    seed: int,
    limits: Limits,
    report_for: Callable[[str], Report],
    given: Tensor | None = None,
) -> tuple[tuple[Optimum, ...], tuple[str, ...]]:
    """Run the solver from the guide's own start and from dispersed ones, until Ctrl-C.

    Args:
        problem: What is to be solved. Its guide ends at the best optimum.
        choice: The solver.
        num: Number of starts; more than one needs a guide of ours.
        seed: Seed of the first start, and of all others through it.
        limits: When each start stops.
        report_for: Makes a report for a start from its label.
        given: As for :func:`solve`.

    Returns:
        The optima, in the order of the starts, and a sentence for each start that failed.

    Raises:
        ModelError: If every start fails because of the model.
        NonFiniteError: If every start fails because the density is not finite.
    """
    if num == 1:
        report = report_for("fit")
        only = solve(problem, choice, seed=seed, limits=limits, report=report, given=given)
        return (only,), ()
    seeds = [seed + k for k in range(num)]
    reports = [report_for(f"start {k + 1} of {num}") for k in range(num)]
    guide = problem.guide
    is_normal = choice.solver == "deterministic" and isinstance(guide.family, Normal)
    together = is_normal and not (guide.is_auto or _has_discrete(guide))
    run = _together if together else _one_by_one
    ends = run(problem, choice, seeds, reports, limits)
    failures = [(k, end) for k, end in enumerate(ends) if isinstance(end, Exception)]
    for _, error in failures:
        if len(failures) == len(ends) or not isinstance(error, _FAILURES):
            raise error
    optima = tuple(end for end in ends if isinstance(end, Optimum))
    restore_params(problem.guide, optima[best_of(optima)].params)
    return optima, tuple(f"start {k + 1} of {num} failed: {error}" for k, error in failures)


def _together(
    problem: Problem,
    choice: Choice,
    seeds: list[int],
    reports: list[Report],
    limits: Limits,
) -> list[Optimum | Exception]:
    """All starts at once, which takes little longer than one."""
    options = limits.options("max_gradients")
    ends = solve_from_many(problem.log_joint, problem.guide, seeds, reports=reports, **options)
    return [
        end if isinstance(end, Exception) else Optimum(seed, *end)
        for seed, end in zip(seeds, ends, strict=True)
    ]


def _one_by_one(
    problem: Problem,
    choice: Choice,
    seeds: list[int],
    reports: list[Report],
    limits: Limits,
) -> list[Optimum | Exception]:
    """One start after another, the first from the guide's own values."""
    ends: list[Optimum | Exception] = []
    own_start = current_params(problem.guide)
    is_auto = problem.guide.is_auto
    for k, (seed, report) in enumerate(zip(seeds, reports, strict=True)):
        if not is_auto:  # whose first fit chose families, with other parameters
            restore_params(problem.guide, own_start)
        try:
            end = solve(
                problem,
                choice,
                seed=seed,
                limits=limits,
                report=report,
                disperse=k > 0,
            )
        except _FAILURES as error:
            ends.append(error)
            continue
        ends.append(end)
        if end.outcome.stop_reason == "interrupted":
            break
    return ends


def _random_start(guide: FlatGuide, seed: int) -> tuple[Tensor, ...]:
    """The guide's parameters with locations drawn from a box, and with the first scales."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(guide.layout.size, generator=generator, dtype=torch.float64)
    loc = _BOX * (2 * uniform - 1)
    like = guide.flat_leaves()[0]
    return guide.family.init(loc.to(like), torch.full_like(loc, guide.init_scale).to(like))


def _has_discrete(guide: Any) -> TypeGuard[DiscreteGuide]:
    return isinstance(guide, DiscreteGuide) and guide.has_discrete_factors


def _random_logits(guide: DiscreteGuide, seed: int) -> tuple[Tensor, ...]:
    """Logits under which some value or other of each discrete site is more probable."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _BOX * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for p in guide.discrete_params()
    )
