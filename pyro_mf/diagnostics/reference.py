"""Draws of the posterior to judge by, made anew with their own checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.guides import AutoMeanField
from pyro_mf.solvers.chains import IMPRECISE, MAX_RHAT
from pyro_mf.solvers.fixed_draw_elbo import Estimate
from pyro_mf.solvers.minimise import MAX_DENSE
from pyro_mf.solvers.normal_start import fit_normal
from pyro_mf.solvers.outcome import Report
from pyro_mf.solvers.posterior_draws import Expectations, PosteriorDraws
from pyro_mf.solvers.posterior_sampling import sample_posterior

# Standard error of means and sds that is aimed at. The limits of a verdict could do with less, but
# importance sampling of few draws has been seen to miss the neck of a funnel with a good k-hat.
_MAX_ERROR = 0.025
# Climbs from elsewhere, many where a gradient takes little: what they do not reach is not seen.
_NUM_SCOUTS, _NUM_COSTLY_SCOUTS, _CHEAP_LATENTS = 128, 32, 25
_WITHOUT_DRAWS: dict[str, str] = {
    "budget": "chains were still on their way to it after {} gradients; max_gradients gives more",
    "interrupted": "the sampling was interrupted",
}


@dataclass(frozen=True, eq=False)
class Start:
    """A Gaussian near the posterior.

    Args:
        loc: Its location, shape ``(D,)``, in double precision on the CPU.
        scale: Its sds ``(D,)``, or the Cholesky factor of its covariance ``(D, D)``.
        elbo: ELBO of the best mean field, where that was found on the way.
        num_gradients: What it took.
    """

    loc: Tensor
    scale: Tensor
    elbo: Estimate | None = None
    num_gradients: int = 0


@dataclass(frozen=True, eq=False)
class Reference:
    """Draws of the posterior that an approximation is judged by.

    Args:
        averages: What averages over them and knows the errors.
        draws: The draws.
        problems: Why they are not to be believed; empty where nothing speaks against them.
        num_scouts: Climbs from elsewhere that were to find other modes.
    """

    averages: Expectations
    draws: PosteriorDraws
    problems: tuple[str, ...]
    num_scouts: int

    @property
    def source(self) -> str:
        """How they were made, in words."""
        return self.draws.origin


def find_start(blocks: Blocks, z: Tensor, *, seed: int, report: Report) -> Start:
    """The mean-field optimum of the reverse KL with its linear response, found from nothing.

    Where there is none, mean and covariance of the approximation's draws.

    Args:
        blocks: The log joint.
        z: Draws of the approximation, shape ``(S, D)``.
        seed: Seed of everything random.
        report: Called with the progress.
    """
    log_joint = blocks.log_joint
    try:
        guide = AutoMeanField(log_joint.model)
        guide.setup(*log_joint.model_args, **log_joint.model_kwargs)
        outcome, loc, scale = fit_normal(log_joint, guide, seed=seed, report=report)
    except (ModelError, NonFiniteError):
        outcome = None
    if outcome is None or not outcome.converged:
        spent = 0 if outcome is None else outcome.num_gradients
        return replace(start_of_draws(z), num_gradients=spent)
    if outcome.response is not None:
        scale = outcome.response.scale_tril.double().cpu()
    elbo = Estimate(outcome.elbo, outcome.elbo_se)
    return Start(loc, scale, elbo, outcome.num_gradients)


def start_of_draws(z: Tensor) -> Start:
    """Mean and covariance of draws ``(S, D)``; sds only where there are too few, or D is large."""
    loc, sd = z.mean(0), z.std(0)
    sd = torch.where(torch.isfinite(sd) & (sd > 0), sd, 1.0)
    if z.shape[1] > MAX_DENSE or len(z) < 10 * z.shape[1]:
        return Start(loc, sd)
    centred = (z - loc) / sd
    factor, failed = torch.linalg.cholesky_ex(centred.T @ centred / len(z))
    return Start(loc, sd if int(failed) else sd[:, None] * factor)


def draw_reference(
    blocks: Blocks,
    start: Start,
    starts: Tensor,
    *,
    seed: int,
    max_gradients: int,
    report: Report,
) -> tuple[Reference | None, tuple[str, ...], int]:
    """Draw from the posterior by the methods of the forward KL, chains from the approximation.

    Args:
        blocks: The log joint.
        start: A Gaussian near the posterior.
        starts: Where the approximation's draws are, shape ``(K, D)``.
        seed: Seed of everything random.
        max_gradients: Budget, in gradients at 64 points each.
        report: Called with the progress.

    Returns:
        The draws, ``None`` where there are none of any use; what went wrong on the way; and the
        gradients that it took.
    """
    is_cheap = len(start.loc) <= _CHEAP_LATENTS and not blocks.is_costly
    num_scouts = _NUM_SCOUTS if is_cheap else _NUM_COSTLY_SCOUTS
    try:
        sampling = sample_posterior(
            blocks,
            start.loc,
            start.scale,
            max_error=_MAX_ERROR,
            aim=_MAX_ERROR,
            max_gradients=max(1, max_gradients),
            seed=seed,
            report=report,
            starts=starts,
            num_scouts=num_scouts,
            max_late_rhat=MAX_RHAT,  # slow chains know errors of the size that is asked for
        )
    except NonFiniteError as error:
        return None, (str(error),), 0
    drawn, spent = sampling.drawn, sampling.num_gradients
    if drawn is None:
        why = sampling.notes or (
            _WITHOUT_DRAWS.get(sampling.ending, "none were made").format(spent),
        )
        return None, why, spent
    averages, draws = drawn
    # Errors that are larger than was aimed at are in the standard errors of all that follows.
    problems = tuple(p for p in draws.problems if not p.startswith(IMPRECISE))
    if sampling.ending == "interrupted":
        problems += ("the sampling was interrupted",)
    found = Reference(averages, draws, problems, num_scouts)
    return found, sampling.notes, spent
