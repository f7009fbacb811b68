"""Draws of a posterior in the coordinates in which they are easiest to make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.noncentred import Noncentred, find_noncentred
from pyro_mf.guides import AutoMeanField
from pyro_mf.kernels import Metric
from pyro_mf.kernels.weighted import WeightedDraws
from pyro_mf.solvers.chains import IMPRECISE, ChainDraws
from pyro_mf.solvers.judgement import least_far
from pyro_mf.solvers.normal_start import fit_normal
from pyro_mf.solvers.outcome import Outcome, Report, StopReason
from pyro_mf.solvers.posterior_draws import Source
from pyro_mf.solvers.posterior_sampler import Drawn, PosteriorSampler
from pyro_mf.solvers.scouts import settle
from pyro_mf.solvers.tails import describe_tails

# Weighted draws whose errors are too large in the model's own coordinates are drawn anew, so many
# times, with a smaller error in the others: this share of what would be enough by proportion.
_MAX_TIMES, _STRICTER = 3, 0.8
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

    @property
    def passed(self) -> bool:
        """Whether there are draws that passed their checks."""
        return self.drawn is not None and not self.drawn[1].problems


def sample_posterior(
    blocks: Blocks,
    loc: Tensor,
    scale: Tensor,
    *,
    method: Source | None = None,
    max_gradients: int,
    **options: Any,
) -> Sampling:
    """Draw, where a hierarchy asks for it with latents in units of their priors' scales.

    Args:
        blocks: The log joint.
        loc: Location of a Gaussian near the posterior, shape ``(D,)``.
        scale: Its sds, shape ``(D,)``, or the Cholesky factor of its covariance, ``(D, D)``.
        method: The only one to use; ``None`` for several in turn.
        max_gradients: Budget.
        options: Of :class:`PosteriorSampler`, but a ``seed`` in place of its generator.
    """
    task = _Task(blocks, loc, scale, method, options)
    choices = find_noncentred(blocks.log_joint, loc, scale)
    tried: list[Sampling] = []
    left = max_gradients
    for k, hierarchy in enumerate(choices):
        sampling = task.run(hierarchy, left, can_temper=k + 1 == len(choices))
        tried.append(sampling)
        left -= sampling.num_gradients
        if sampling.passed or sampling.ending == "interrupted" or left <= 0:
            break
    return _best_of(tried, blocks)


def _best_of(tried: list[Sampling], blocks: Blocks) -> Sampling:
    """The last if it passed its checks, else the one that is least far from doing so."""
    spent = sum(sampling.num_gradients for sampling in tried)
    notes = tuple(note for sampling in tried for note in sampling.notes)
    best = tried[-1]
    if not best.passed:
        drawn = [(sampling, sampling.drawn[1]) for sampling in tried if sampling.drawn is not None]
        chosen = least_far([draws for _, draws in drawn], blocks) if len(drawn) > 1 else None
        if drawn:
            best = drawn[-1 if chosen is None else chosen][0]
    return best._replace(notes=notes, num_gradients=spent, ending=tried[-1].ending)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to be drawn, in the model's own coordinates; see :func:`sample_posterior`."""

    blocks: Blocks
    loc: Tensor
    scale: Tensor
    method: Source | None
    options: dict[str, Any]

    def run(
        self, hierarchy: Noncentred | None, max_gradients: int, *, can_temper: bool
    ) -> Sampling:
        """Draw in some coordinates, ``None`` for the model's own."""
        if hierarchy is None:
            return self._draw(
                self.blocks,
                self.loc,
                self.scale,
                max_gradients=max_gradients,
                can_temper=can_temper,
                **self.options,
            )
        seed, report = self.options["seed"], self.options["report"]
        start = _start_in(hierarchy, seed, int(_MAX_START_SHARE * max_gradients), report)
        if start is None:  # no optimum there, so nothing to draw around
            return self.run(None, max_gradients, can_temper=can_temper)
        outcome, loc, scale = start
        if outcome.stop_reason == "interrupted":
            return Sampling(None, "interrupted", (), outcome.num_gradients)
        starts = self.options.get("starts")
        options = self.options | {
            "starts": None if starts is None else hierarchy.to_noncentred(starts),
            "own": lambda e: hierarchy.to_centred(e)[0],
            "settle": lambda e: self._settle(hierarchy, e),
            "can_temper": can_temper,
        }
        inner = Blocks(hierarchy.log_joint)
        spent, share = outcome.num_gradients, 1.0
        best = Sampling(None, "budget", (), spent)
        for _ in range(_MAX_TIMES):
            asked = {name: share * options[name] for name in ("max_error", "aim")}
            left = max(1, max_gradients - spent)
            found = self._draw(inner, loc, scale, max_gradients=left, **(options | asked))
            spent += found.num_gradients
            notes = (*best.notes, *(_plain(note, hierarchy) for note in found.notes))
            best = best._replace(ending=found.ending, notes=notes, num_gradients=spent)
            if found.drawn is None:
                break
            drawn = _back(found.drawn, hierarchy, self.blocks, self.options["max_error"])
            best = best._replace(drawn=drawn)
            excess = drawn[1].largest_error / self.options["max_error"]
            is_enough = excess <= 1.0 or not isinstance(drawn[0], WeightedDraws)
            if is_enough or found.ending != "converged" or spent >= max_gradients:
                break
            share *= _STRICTER / excess
        if best.ending == "converged" and not best.passed:
            return best._replace(ending="budget")
        return best

    def _settle(self, hierarchy: Noncentred, e: Tensor) -> Tensor:
        """Scouts that go on in the model's own coordinates.

        At the wide end of a hierarchy they are stuck in the others, and not in these.
        """
        z = hierarchy.to_centred(e)[0]
        generator = torch.Generator().manual_seed(self.options["seed"])
        metric = Metric(self.scale)
        settled, _ = settle(self.blocks.value_and_grad, z, metric, generator=generator)
        moved = hierarchy.to_noncentred(settled)
        return moved[torch.isfinite(moved).all(1)]

    def _draw(
        self, blocks: Blocks, loc: Tensor, scale: Tensor, *, seed: int, **options: Any
    ) -> Sampling:
        generator = torch.Generator().manual_seed(seed)
        sampler = PosteriorSampler(blocks, loc, scale, generator=generator, **options)
        drawn = sampler.draw(self.method)
        return Sampling(drawn, sampler.ending, tuple(sampler.notes), sampler.num_gradients)


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
    found = replace(
        draws,
        z=z,
        log_density=log_density,
        mean_error=mean_error,
        sd_error=sd_error,
        noncentred=hierarchy.sites,
    )
    problems = [_plain(problem, hierarchy) for problem in draws.problems]
    if found.largest_error > max_error and not any(p.startswith(IMPRECISE) for p in problems):
        problems.append(
            f"{IMPRECISE} of a mean or sd is {found.largest_error:.3f} sds, where {max_error:.3f} "
            "was wanted"
        )
    names = own.log_joint.layout.element_names()
    problems += [p for p in describe_tails(own.values, found, names) if p not in problems]
    return averages, replace(found, problems=tuple(problems))


def _plain(text: str, hierarchy: Noncentred) -> str:
    """A sentence by the sites' own names."""
    for site in hierarchy.sites:
        text = text.replace(f"'{site}_decentered", f"'{site}")
    return text
