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
    options |= {"seed": seed, "report": report}
    layout, fixed, chosen_here = guide.layout, guide.families, guide.open_sites
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
    before = 0 if start.outcome is None else start.outcome.num_gradients
    trial = {
        site.name: get_family(_TRIAL)
        if site.name in chosen_here and not site.is_circular
        else fixed[site.name]
        for site in layout.sites
    }
    guide.adopt(trial)
    first = solve_pathwise(log_joint, guide, start=start, max_gradients=max_gradients, **options)
    if first.stop_reason == "interrupted":
        return first
    params = tuple(p.detach().double().cpu() for p in guide.flat_params())
    families = trial | choose_by_optimum(layout, guide.family, params, chosen_here)
    note = describe_choice({site: families[site] for site in trial if site in chosen_here})
    left = max(1, max_gradients - first.num_gradients)
    if families == trial:
        return replace(first, notes=(*first.notes, note))
    guide.adopt(families)
    if isinstance(guide.family, Normal):
        found = solve_deterministic(log_joint, guide, max_gradients=left, **options)
        own, losses = found.num_gradients, found.losses
    else:
        found = solve_pathwise(
            log_joint, guide, start=start, max_gradients=before + left, **options
        )
        own = found.num_gradients - before
        losses = found.losses[0 if start.outcome is None else len(start.outcome.losses) :]
    seconds = dict(first.seconds)
    for phase, more in found.seconds.items():
        seconds[phase] = seconds.get(phase, 0.0) + more
    return replace(
        found,
        losses=(*first.losses, *losses),
        num_gradients=first.num_gradients + own,
        seconds=seconds,
        notes=(*found.notes, note),
    )
