"""From what was found to one word.

Green needs proof: draws of the posterior that passed every check, and every marginal within its
limits by two standard errors. Red needs proof of the contrary. All else is amber.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyro_mf.diagnostics.check import Check, Status, worst
from pyro_mf.diagnostics.drift import Drift
from pyro_mf.diagnostics.errors import MAX_MEAN, MAX_SD, MAX_SD_KHAT, MAX_SHAPE, largest
from pyro_mf.diagnostics.reference import Reference

if TYPE_CHECKING:
    import pandas as pd

_WITHIN = f"means within {MAX_MEAN:g} posterior sds and sds within {MAX_SD:.0%}"
DRAW_ANEW = "draw from the posterior instead: fit(..., objective=ForwardKL()) or run_nuts(...)"
OWN_DRAWS = (
    "ask diagnose(draws=True) of the draws that the factors were fitted to, and take sd_draws of "
    "summary() and to_arviz(draws=True) if it is green; else run_nuts(...)"
)
LONG_RUN = "run NUTS for long: run_nuts(...), and look at its R-hat"
_NARROW = (
    "the approximation is too narrow, as mean field by reverse KL is wherever latents depend on "
    "one another: take sd_lr of summary() if diagnose(linear_response=True) is green, or "
)
_SHIFTED = (
    "means are off, which no correction of sds mends: train stock SVI for longer or use fit(...), "
    "and if they stay off "
)
_WIDE = "the approximation is too wide somewhere: look at .parameters; "
_SHAPE = (
    "means and sds are right but the shape is not: try family='auto', or AutoMeanFieldMixture for "
    "several modes"
)


def judge_marginals(
    table: pd.DataFrame | None, reference: Reference | None, notes: tuple[str, ...], better: str
) -> Check:
    """The main check: errors of all marginals, by draws of the posterior.

    Args:
        table: The errors; ``None`` where there are no draws.
        reference: The draws.
        notes: What went wrong with them.
        better: What to do instead of believing the approximation.
    """
    if table is None or reference is None:
        why = "; ".join(notes) or "none were made"
        return Check("marginals", "amber", f"no draws of the posterior to judge by: {why}", better)
    by_mean, mean, by_sd, ratio = largest(table)
    most = (
        f"largest error of a mean {mean:+.2f} sds ('{by_mean}'), of an sd {ratio:.2f} times the "
        f"posterior's ('{by_sd}')"
    )
    values = {"mean_error": mean, "sd_ratio": ratio, "wasserstein": table["wasserstein"].max()}
    count = {s: int((table["status"] == s).sum()) for s in ("green", "amber", "red")}
    how = f"by {len(reference.draws.z)} draws by {reference.source}"
    right = f"{count['green']} of {len(table)} parameters are right"
    if reference.problems:  # which come with an advice of their own
        finding = f"{most}, {how} that fail checks of their own; by them {right}"
        return Check("marginals", "amber", finding, values=values)
    status: Status = worst(table["status"])
    finding, advice = f"{most}, {how}; {right}", _advise(table, status, better)
    return Check("marginals", status, finding, advice, values)


def _advise(table: pd.DataFrame, status: Status, better: str) -> str:
    if status == "green":
        return ""
    wrong = table[table["status"] == "red"]
    if (wrong["mean_error"].abs() - 2 * wrong["mean_error_se"] > MAX_MEAN).any():
        return _SHIFTED + better
    if (wrong["sd_ratio"] < 1.0).any():
        return _NARROW + better
    if (wrong["sd_ratio"] > 1.0).any():
        return _WIDE + better
    if (table["wasserstein"] > MAX_SHAPE).any():
        return _SHAPE
    if not (table["tail_khat"] <= MAX_SD_KHAT).all():
        heavy = table.index[table["tail_khat"] > MAX_SD_KHAT]
        return (
            f"the tails of {', '.join(map(str, heavy[:3]))} are so heavy that no number of draws "
            "tells their sds: compare quantiles, or logarithms as deterministic sites"
        )
    return "errors are near their limits, or not known well enough: " + better


def judge_reference(reference: Reference | None) -> Check:
    """Whether the draws that everything else is judged by are to be believed."""
    if reference is None:
        return Check("reference", "amber", "there are no draws of the posterior")
    draws = reference.draws
    errors = (
        f"standard errors up to {float(draws.mean_error.max()):.3f} sds of a mean and "
        f"{float(draws.sd_error.max()):.1%} of an sd"
    )
    values = dict(draws.diagnostics)
    if not reference.problems:
        finding = (
            f"{reference.source}, {errors}; no check speaks against it. A mode that none of "
            f"{reference.num_scouts} climbs from elsewhere reached would not be seen"
        )
        return Check("reference", "green", finding, values=values)
    why = "; ".join(reference.problems)
    advice = (
        "the posterior itself is hard, and short runs do not settle it: reparametrise the model "
        "(non-centred hierarchies, ordered labels), or run NUTS for long and look at its R-hat"
    )
    return Check("reference", "amber", f"{reference.source}, but {why}", advice, values)


def judge_drift(drift: Drift | None, names: list[str], better: str) -> Check:
    """Whether chains from the approximation's draws run away; it judges where nothing else can."""
    if drift is None:
        return Check(
            "drift",
            "red",
            "most draws of the approximation are where the model has no density",
            "the approximation reaches out of the model's support: use family='auto', or " + better,
        )
    mean, log_sd = drift.mean_bound, drift.log_sd_bound
    by_mean, by_sd = int(mean.argmax()), int(log_sd.argmax())
    memory = float(drift.memory.max())
    values = {
        "mean_bound": float(mean.max()),
        "log_sd_bound": float(log_sd.max()),
        "memory": memory,
    }
    parts = []
    is_far = {"mean": bool(mean[by_mean] > MAX_MEAN), "sd": bool(log_sd[by_sd].expm1() > MAX_SD)}
    if mean[by_mean] > 0 and (is_far["mean"] or not is_far["sd"]):
        parts.append(f"the mean of '{names[by_mean]}' is wrong by {mean[by_mean]:.2f} sds or more")
    if log_sd[by_sd] > 0 and (is_far["sd"] or not is_far["mean"]):
        factor = float(log_sd[by_sd].exp())
        parts.append(f"the sd of '{names[by_sd]}' is wrong by a factor {factor:.2f} or more")
    finding = " and ".join(parts) if parts else "no latent drifts beyond chance"
    finding = f"by short chains from its draws, {finding} (unconstrained axes)"
    if memory > 0.5:
        finding += f"; the chains are slow (correlation {memory:.2f} with their start)"
    is_bad = any(is_far.values())
    status: Status | None = "red" if is_bad else None
    return Check("drift", status, finding, better if is_bad else "", values, is_standby=True)


def headline(
    status: Status, claim: str, table: pd.DataFrame | None, checks: tuple[Check, ...]
) -> str:
    """The verdict in one sentence."""
    if status == "green" and table is not None:
        which = "the only parameter is" if len(table) == 1 else f"all {len(table)} parameters are"
        text = f"{claim}: the marginals of {which} right, {_WITHIN}"
        if any(check.name == "joint" and check.advice for check in checks):
            return f"{text}; only the marginals, for the joint is not the posterior's."
        return f"{text}."
    blamed = [c for c in checks if c.status == status]
    if status == "red":
        if table is not None and any(c.name == "marginals" for c in blamed):
            wrong = table.index[table["status"] == "red"]
            some = ", ".join(map(str, wrong[:3])) + (", ..." if len(wrong) > 3 else "")
            return f"{claim}: wrong for {len(wrong)} of {len(table)} parameters ({some})."
        return f"{claim}: wrong; {blamed[0].finding}."
    return f"{claim}: not shown to be right; {'; '.join(c.finding for c in blamed)}."
