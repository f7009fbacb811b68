"""Draws of a posterior in the coordinates in which they are easiest to make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.noncentred import Noncentred, find_noncentred
from pyro_mf.guides import AutoMeanField
from pyro_mf.kernels.weighted import WeightedDraws
from pyro_mf.solvers.chains import IMPRECISE, ChainDraws
from pyro_mf.solvers.normal_start import fit_normal
from pyro_mf.solvers.outcome import Outcome, Report, StopReason
from pyro_mf.solvers.posterior_draws import PosteriorDraws, Source
from pyro_mf.solvers.posterior_sampler import Drawn, PosteriorSampler
from pyro_mf.solvers.tails import describe_tails

# Share of the error asked for that is asked for in other coordinates, in which it is another.
_STRICTER = 0.8
_MAX_START_SHARE = 0.2  # of the budget, for finding where to start in other coordinates


class Sampling(NamedTuple):
    """What was drawn and what that took.

    Args:
        drawn: The draws with the errors of their averages; ``None`` where there are none of use.
        ending: ``"converged"`` where nothing cut the sampling short.
        notes: What went wrong on the way, in sentences.
        num_gradients: Gradients at 64 points each.
    """

    drawn: Drawn | None
    ending: StopReason
    notes: tuple[str, ...]
    num_gradients: int


def sample_posterior(
    blocks: Blocks,
    loc: Tensor,
    scale: Tensor,
    *,
    method: Source | None = None,
    max_error: float,
    aim: float,
    max_gradients: int,
    seed: int,
    report: Report,
    starts: Tensor | None = None,
    **options: Any,
) -> Sampling:
    """Draw, latents in units of their priors' scales where these are latents and data say little.

    Args:
        blocks: The log joint.
        loc: Location of a Gaussian near the posterior, shape ``(D,)``.
        scale: Its sds, shape ``(D,)``, or the Cholesky factor of its covariance, ``(D, D)``.
        method: The only one to use; ``None`` for several in turn.
        max_error: As in :class:`PosteriorSampler`, as are the next two.
        aim: A smaller error.
        max_gradients: Budget.
        seed: Seed of everything random.
        report: Called with the progress.
        starts: Where chains start, shape ``(K, D)``; by default draws of the Gaussian.
        options: Others of :class:`PosteriorSampler`.
    """
    options |= {"generator": torch.Generator().manual_seed(seed), "report": report}
    hierarchy = find_noncentred(blocks.log_joint, loc, scale)
    start = None
    if hierarchy is not None:
        start = _start_in(hierarchy, seed, int(_MAX_START_SHARE * max_gradients), report)
    if hierarchy is None or start is None:
        sampler = PosteriorSampler(
            blocks,
            loc,
            scale,
            max_error=max_error,
            aim=aim,
            max_gradients=max_gradients,
            starts=starts,
            **options,
        )
        return Sampling(
            sampler.draw(method), sampler.ending, tuple(sampler.notes), sampler.num_gradients
        )
    outcome, loc, scale = start
    if outcome.stop_reason == "interrupted":
        return Sampling(None, "interrupted", (), outcome.num_gradients)
    sampler = PosteriorSampler(
        Blocks(hierarchy.log_joint),
        loc,
        scale,
        max_error=_STRICTER * max_error,
        aim=_STRICTER * aim,
        max_gradients=max(1, max_gradients - outcome.num_gradients),
        starts=None if starts is None else hierarchy.to_noncentred(starts),
        **options,
    )
    drawn, ending = sampler.draw(method), sampler.ending
    if drawn is not None:
        drawn = _back(drawn, hierarchy, blocks, max_error)
        if drawn[1].problems and ending == "converged":
            ending = "budget"
    spent = outcome.num_gradients + sampler.num_gradients
    return Sampling(drawn, ending, tuple(sampler.notes), spent)


def _start_in(
    hierarchy: Noncentred, seed: int, max_gradients: int, report: Report
) -> tuple[Outcome, Tensor, Tensor] | None:
    """The reverse KL's optimum in the new coordinates, with its location and scale, if any."""
    log_joint = hierarchy.log_joint
    try:
        guide = AutoMeanField(log_joint.model)
        guide.setup(*log_joint.model_args, **log_joint.model_kwargs)
        outcome, loc, scale = fit_normal(
            log_joint, guide, seed=seed, max_gradients=max_gradients, report=report
        )
    except (ModelError, NonFiniteError):
        return None
    if outcome is None or outcome.stop_reason == "diverged":
        return None
    if outcome.response is not None:
        scale = outcome.response.scale_tril.double().cpu()
    return outcome, loc, scale


def _back(drawn: Drawn, hierarchy: Noncentred, own: Blocks, max_error: float) -> Drawn:
    """The draws in the model's own coordinates, with their errors and tails there.

    Raises:
        TypeError: If the draws are of an unknown kind.
    """
    averages, draws = drawn
    z, log_det = hierarchy.to_centred(draws.z)
    log_density = draws.log_density - log_det
    mean_error: Tensor
    if isinstance(averages, ChainDraws):
        shape = averages.log_density.shape
        chains = ChainDraws(z.reshape(averages.z.shape), log_density.reshape(shape))
        mean_error, sd_error = chains.mixing.mcse_mean, chains.mixing.mcse_sd
        averages = chains
    elif isinstance(averages, WeightedDraws):
        averages = replace(averages, z=z, log_density=log_density)
        mean_error, sd_error = averages.mean_error, averages.sd_error
    else:
        raise TypeError(f"draws of an unknown kind: {type(averages).__name__}.")
    found: PosteriorDraws = replace(
        draws,
        z=z,
        log_density=log_density,
        mean_error=mean_error,
        sd_error=sd_error,
        noncentred=hierarchy.sites,
    )
    problems = list(draws.problems)
    if found.largest_error > max_error and not any(p.startswith(IMPRECISE) for p in problems):
        problems.append(
            f"{IMPRECISE} of a mean or sd is {found.largest_error:.3f} sds, where {max_error:.3f} "
            "was wanted"
        )
    names = own.log_joint.layout.element_names()
    problems += [p for p in describe_tails(own.values, found, names) if p not in problems]
    return averages, replace(found, problems=tuple(problems))
