"""The reverse KL with families chosen by the fit itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_mf.density import LogJoint
from pyro_mf.families import Normal, get_family
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.family_choice import choose_by_optimum, describe_choice
from pyro_mf.solvers.normal_start import fit_normal
from pyro_mf.solvers.outcome import Outcome, Report, silent
from pyro_mf.solvers.pathwise import solve_pathwise

_TRIAL = "sinh_arcsinh"


def solve_auto(
    log_joint: LogJoint,
    guide: FlatGuide,
    *,
    seed: int = 0,
    max_gradients: int = 5000,
    disperse: bool = False,
    report: Report = silent,
    **options: Any,
) -> Outcome:
    """Fit factors with skew and tails everywhere, then Normal ones where those are as good.

    Args:
        log_joint: The density, of the full data.
        guide: A guide whose families are left to the fit; it gets them, and the optimum.
        seed: Seed of all draws.
        max_gradients: Gradients of the ELBO after which a run ends.
        disperse: Start at a random point of the seed's.
        report: Called with the progress.
        options: More for :func:`~pyro_mf.solvers.pathwise.solve_pathwise`.

    Returns:
        The outcome, with a note on what was chosen.
    """
    options |= {"seed": seed, "report": report, "max_gradients": max_gradients}
    start = fit_normal(
        log_joint,
        guide,
        seed=seed,
        max_gradients=max_gradients,
        disperse=disperse,
        report=report,
    )
    if start.outcome is not None and not start.outcome.converged:
        return start.outcome
    trial = get_family(_TRIAL)
    guide.adopt({s.name: "auto" if s.is_circular else trial for s in guide.layout.sites})
    first = solve_pathwise(log_joint, guide, start=start, **options)
    if first.stop_reason == "interrupted":
        return first
    params = tuple(p.detach().double().cpu() for p in guide.flat_params())
    families = choose_by_optimum(guide.layout, guide.family, params)
    note = describe_choice(families)
    guide.adopt(families)
    if all(isinstance(family, Normal) for family in families.values()):
        found = solve_deterministic(log_joint, guide, **options)
    elif all(not isinstance(family, Normal) for family in families.values()):
        guide.set_flat_params(tuple(p.to(guide.flat_leaves()[0]) for p in params))
        return replace(first, notes=(*first.notes, note))
    else:
        found = solve_pathwise(log_joint, guide, start=start, **options)
    return replace(
        found,
        num_gradients=first.num_gradients + found.num_gradients,
        notes=(*found.notes, note),
    )
