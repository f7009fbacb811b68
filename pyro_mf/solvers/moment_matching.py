r"""Forward KL: draws of the posterior first, then every factor fitted to them by itself.

:math:`KL(p \,\|\, \prod_i q_i)` is the sum of the factors' own divergences from the marginals and a
constant, so its optimum needs no optimiser, only draws of the posterior. They must not come from
the mean-field approximation itself: in more than a few correlated dimensions its importance weights
have no finite variance. The reverse KL's optimum with its linear response is where they start.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.families import Family
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.kernels.student_t import NET_SIZE
from pyro_mf.solvers import random_state
from pyro_mf.solvers.chains import ChainDraws
from pyro_mf.solvers.evidence import bounds_from, gaussian_log_prob
from pyro_mf.solvers.family_choice import choose_by_draws, describe_choice
from pyro_mf.solvers.fixed_draw_elbo import Estimate
from pyro_mf.solvers.minimise import MAX_DENSE
from pyro_mf.solvers.normal_start import fit_normal
from pyro_mf.solvers.outcome import Forward, Outcome, Progress, Report, silent
from pyro_mf.solvers.posterior_draws import Expectations, PosteriorDraws, Source
from pyro_mf.solvers.posterior_sampling import sample_posterior

# Standard errors that fit into the tolerance: so large is the largest of thousands of errors. Where
# draws are cheap, twice as many: at the default every mean is then within .05 sds by four of them.
_Z, _Z_AIM = 4.0, 8.0
# Of a log density from which on draws are not cheap whatever their number, as with loops over time.
_MANY_OPERATIONS = 1000
_NUM_FRESH = 2048
_NO_ELBO = (
    "the factors reach to where the model has no density, so that the ELBO of their product is not "
    "finite; the draws stay where it has"
)
_ROUNDING = 1e-3  # of the log evidence, in nats and relative
# Given draws at which the gradient is computed, and chance that good ones are taken for foreign.
_NUM_GRADIENTS, _FALSE_ALARM = 4000, 1e-4


def solve_moments(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    *,
    method: Source | None = None,
    seed: int = 0,
    tolerance: float = 0.1,
    max_gradients: int = 30_000,
    report: Report = silent,
) -> Outcome:
    """Fit each factor to the posterior's marginal, from draws made here.

    Ctrl-C ends the run; the guide is then fitted to the draws so far, or holds the optimum of the
    reverse KL where there are none.

    Args:
        log_joint: The density, of the full data.
        guide: A guide for the same latents, set up; it gets the optimum.
        method: Where the draws come from; by default chosen by the number of latents, and changed
            where a check fails.
        seed: Seed of everything random.
        tolerance: Error of means, in posterior sds, and of sds, relative; four standard errors of
            the draws are at most that, and eight where a fifth of the budget is enough for them and
            the density is no long program.
        max_gradients: Budget, in gradients of the log joint at 64 points each; tempering, which
            comes last, finishes its runs and may take more.
        report: Called with the progress.

    Returns:
        The outcome with the draws, the EUBO and bounds on the log evidence. It has converged only
        if no check of the draws failed.

    Raises:
        ModelError: If the reverse fit found no start.
    """
    start, loc, scale, seconds = _start(log_joint, guide, seed, max_gradients, report)
    if start.stop_reason in ("diverged", "interrupted"):
        message = f"the reverse KL's fit, where draws would start, ended: {start.message}"
        return replace(start, message=message, response=None)
    began = time.perf_counter()
    sampling = sample_posterior(
        Blocks(log_joint),
        loc,
        scale,
        method=method,
        max_error=tolerance / _Z,
        aim=tolerance / (_Z_AIM if log_joint.footprint.num_operations < _MANY_OPERATIONS else _Z),
        max_gradients=max(1, max_gradients - start.num_gradients),
        seed=seed,
        report=report,
    )
    seconds["draw"] = time.perf_counter() - began
    num_gradients = start.num_gradients + sampling.num_gradients
    drawn = sampling.drawn
    if drawn is None:
        return replace(
            start,
            stop_reason="budget" if sampling.ending == "converged" else sampling.ending,
            message="no draws of the posterior that are of use were made; the guide holds the "
            "reverse KL's optimum",
            num_gradients=num_gradients,
            seconds=seconds,
            notes=(*start.notes, *sampling.notes),
            response=None,
        )
    found = _fit(
        log_joint,
        guide,
        *drawn,
        seed=seed,
        start_elbo=Estimate(start.elbo, start.elbo_se),
        gaussian=(loc, torch.diag(scale) if scale.dim() == 1 else scale),
    )
    draws, disorder = drawn[1], _describe_disorder(found)
    ending = "budget" if disorder and sampling.ending == "converged" else sampling.ending
    if ending == "converged":
        message = _describe(draws)
    elif sampling.ending == "interrupted":
        message = f"interrupted by the user; fitted to {draws.origin} so far"
    else:
        problems = (*draws.problems, *disorder)
        message = f"fitted to {draws.origin}, but {'; and '.join(problems)}"
    return replace(
        found,
        stop_reason=ending,
        message=message,
        num_gradients=num_gradients,
        seconds=seconds | found.seconds,
        notes=(*_start_notes(start), *sampling.notes, *found.notes),
    )


def fit_given(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    z: Tensor,
    *,
    seed: int = 0,
    tolerance: float = 0.1,
    has_gradient: bool = True,
    report: Report = silent,
) -> Outcome:
    """Fit each factor to draws of the posterior that are there already.

    Args:
        log_joint: The density, of the full data.
        guide: A guide for the same latents, set up; it gets the optimum.
        z: Draws on the unconstrained space, shape ``(chains, S, D)``.
        seed: Seed of the draws for the ELBO.
        tolerance: Standard error of means, in posterior sds, and of sds, relative, from which on
            the draws are too few.
        has_gradient: Whether the log density has a gradient, by which draws of another posterior
            are told.
        report: Called with the progress.
    """
    began = time.perf_counter()
    report(Progress("draws given", 0, math.nan, math.nan))
    by_iteration = z.transpose(0, 1)
    values = Blocks(log_joint).values(by_iteration.flatten(0, 1))
    chains = ChainDraws(by_iteration, values.reshape(by_iteration.shape[:2]))
    problems = chains.problems(log_joint.layout.element_names())
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        problems += (f"the model has no finite density at {bad} of {len(values)} draws",)
    if has_gradient and not bad:
        problems += _describe_foreign(log_joint, chains)
    if chains.largest_error > tolerance:  # there are no more of them, so no less is asked
        problems += (
            f"the largest standard error of a mean or sd is {chains.largest_error:.3f} sds, above "
            f"the tolerance of {tolerance:g}",
        )
    draws = chains.freeze("given", problems, {"num_chains": float(len(z))})
    seconds = {"draw": time.perf_counter() - began}
    found = _fit(log_joint, guide, chains, draws, seed=seed)
    problems += _describe_disorder(found)
    return replace(
        found,
        stop_reason="budget" if problems else "converged",
        message=f"fitted to the draws given, but {'; and '.join(problems)}"
        if problems
        else _describe(draws),
        seconds=seconds | found.seconds,
    )


def _describe_foreign(log_joint: LogJoint, chains: ChainDraws) -> tuple[str, ...]:
    r"""Whether draws are those of another density, by Stein's identities.

    Over draws of the posterior the gradient g of its log density averages to zero, and
    :math:`(z_i - m_i) g_i` to -1 whatever m is.
    """
    stride = math.ceil(chains.log_density.numel() / _NUM_GRADIENTS)
    z = chains.z[::stride] if len(chains.z) // stride >= 4 else chains.z
    rows = z.flatten(0, 1)
    gradients = Blocks(log_joint).value_and_grad(rows)[1]
    terms = torch.cat([gradients, (rows - rows.mean(0)) * gradients + 1.0], 1)
    means, errors = ChainDraws(z, z[..., 0]).expectation(terms)
    scores = (means / errors.clamp_min(torch.finfo(z.dtype).tiny)).abs()
    allowed = -NormalDist().inv_cdf(_FALSE_ALARM / (2 * len(scores)))
    if float(scores.max()) <= allowed:
        return ()
    name = log_joint.layout.element_names()[int(scores.argmax()) % rows.shape[1]]
    return (
        f"they are not draws of this posterior: along '{name}' an average that is zero over its "
        f"draws is {float(scores.max()):.1f} standard errors off (by chance up to {allowed:.1f}). "
        "Were they drawn from this model with these data?",
    )


def _start(
    log_joint: LogJoint, guide: FactorisedGuide, seed: int, max_gradients: int, report: Report
) -> tuple[Outcome, Tensor, Tensor, dict[str, float]]:
    """The reverse KL's optimum, with the Gaussian's location and sds or Cholesky factor.

    Raises:
        ModelError: If a latent is an angle.
    """
    outcome, loc, scale = fit_normal(
        log_joint, guide, seed=seed, max_gradients=max_gradients, report=report
    )
    if outcome is None:
        raise ModelError("angles have no moments on a line for their factors to match.")
    like = guide.flat_leaves()[0]
    guide.set_flat_params(tuple(p.to(like) for p in guide.family.init(loc, scale)))
    seconds = {"reverse KL": sum(outcome.seconds.values())}
    if outcome.response is not None:
        return outcome, loc, outcome.response.scale_tril.double().cpu(), seconds
    return outcome, loc, torch.diag(scale) if len(loc) <= MAX_DENSE else scale, seconds


def _start_notes(start: Outcome) -> tuple[str, ...]:
    if start.converged:
        return ()
    return (f"the reverse KL's fit, where draws start, did not converge: {start.message}",)


def _fit(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    averages: Expectations,
    draws: PosteriorDraws,
    *,
    seed: int,
    start_elbo: Estimate | None = None,
    gaussian: tuple[Tensor, Tensor] | None = None,
) -> Outcome:
    """Fit the factors, and bound the evidence by them and by a Gaussian that is nearer."""
    began = time.perf_counter()
    chosen: tuple[str, ...] = ()
    if isinstance(guide, FlatGuide) and guide.is_auto:
        families = choose_by_draws(guide.layout, draws, _first_half(draws), guide.open_sites)
        guide.adopt(guide.families | families)
        chosen = (describe_choice(families),)
    fitted = guide.family.fit_weighted(draws.z, draws.log_weights)
    guide.set_flat_params(tuple(p.to(guide.flat_leaves()[0]) for p in fitted))
    seconds = {"fit": time.perf_counter() - began}
    began = time.perf_counter()
    blocks = Blocks(log_joint)

    def eubo(log_prob: Tensor) -> Estimate:
        used = draws.log_weights > -math.inf
        ratio = torch.where(used, draws.log_density - log_prob, 0.0)
        value, error = averages.expectation(ratio[:, None])
        return Estimate(float(value), float(error))

    def elbo(z: Tensor, log_prob: Tensor) -> Estimate:
        ratio = blocks.values(z.double().cpu()) - log_prob
        return Estimate(float(ratio.mean()), float(ratio.std()) / len(z) ** 0.5)

    with torch.no_grad(), random_state.forked(seed + 1_000_003):
        z = guide.sample_unconstrained(_NUM_FRESH)
        own_elbo = elbo(z, _log_prob(guide, z))
        own_eubo = eubo(_log_prob_by_halves(guide.family, draws))
        elbos, eubos = [own_elbo], [own_eubo]
        if gaussian is not None:
            loc, tril = gaussian
            z = loc + torch.randn(_NUM_FRESH, len(loc), dtype=loc.dtype) @ tril.T
            elbos.append(elbo(z, gaussian_log_prob(z, loc, tril)))
            eubos.append(eubo(gaussian_log_prob(draws.z, loc, tril)))
    if start_elbo is not None:
        elbos.append(start_elbo)
    seconds["evidence"] = time.perf_counter() - began
    return Outcome(
        elbo=own_elbo.elbo,
        elbo_se=own_elbo.se,
        stop_reason="converged",
        message="",
        losses=(),
        num_gradients=0,
        seconds=seconds,
        notes=chosen if math.isfinite(own_elbo.elbo) else (*chosen, _NO_ELBO),
        forward=Forward(draws, *own_eubo, bounds_from(elbos, eubos)),
    )


def _describe_disorder(outcome: Outcome) -> tuple[str, ...]:
    """Whether a lower bound on the evidence is above an upper one by more than their errors."""
    if outcome.forward is None:
        return ()
    lower, lower_se, upper, upper_se = outcome.forward.bounds
    if not lower - upper > _Z * math.hypot(lower_se, upper_se) + _ROUNDING * (1.0 + abs(upper)):
        return ()
    return (
        f"the lower bound on the log evidence ({lower:.3f}) is above the upper one ({upper:.3f}): "
        "the draws miss a part of the posterior, or are of another",
    )


def _log_prob_by_halves(family: Family, draws: PosteriorDraws) -> Tensor:
    """Log density of each half of the draws under factors fitted to the other half.

    Under factors fitted to the same draws the EUBO would be too low, by as many nats as half the
    factors' parameters over the effective draws.
    """
    first = _first_half(draws)
    log_prob = torch.empty_like(draws.log_density)
    for half in (first, ~first):
        params = family.fit_weighted(draws.z[~half], draws.log_weights[~half])
        log_prob[half] = family.log_prob(params, draws.z[half]).sum(-1)
    return log_prob


def _first_half(draws: PosteriorDraws) -> Tensor:
    """Which draws make up a half that has the posterior's weights, as the rest has, ``(S,)``."""
    order = torch.arange(len(draws.z))
    # Weighted draws net by net: within a net they make up for each other, and only all rounds of
    # nets together have their weights. Chains by time and tempered draws by run.
    is_net = draws.source in ("importance", "mixture")
    return order // NET_SIZE % 2 == 0 if is_net else order < len(order) // 2


def _log_prob(guide: FactorisedGuide, z: Tensor) -> Tensor:
    like = guide.flat_leaves()[0]
    return guide.log_prob_unconstrained(z.to(like)).double().cpu()


def _describe(draws: PosteriorDraws) -> str:
    numbers = ", ".join(
        f"{label} {draws.diagnostics[key]:{spec}}"
        for key, label, spec in (
            ("khat", "k-hat", ".2f"),
            ("rhat", "R-hat", ".3f"),
            ("ess", "effective draws", ".0f"),
        )
        if key in draws.diagnostics
    )
    return (
        f"the Monte Carlo errors of {draws.origin} are at most "
        f"{float(draws.mean_error.max()):.3f} sds for a mean and {float(draws.sd_error.max()):.1%} "
        f"for an sd ({numbers})"
    )
