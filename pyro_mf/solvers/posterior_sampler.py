"""Where draws of the posterior come from: one method after another until the checks are passed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.prior import Prior
from pyro_mf.kernels import Metric
from pyro_mf.kernels.annealing import Base
from pyro_mf.kernels.importance import adaptive_importance, importance_from
from pyro_mf.kernels.mixture import fit_mixture
from pyro_mf.kernels.student_t import StudentT
from pyro_mf.kernels.tempering import tempered_smc
from pyro_mf.kernels.weighted import WeightedDraws
from pyro_mf.solvers.chains import MAX_LATE_RHAT, ChainRun
from pyro_mf.solvers.judgement import least_far, with_checks
from pyro_mf.solvers.meter import ROWS, BudgetSpentError
from pyro_mf.solvers.outcome import Progress, Report, StopReason
from pyro_mf.solvers.posterior_draws import NAMES, Expectations, PosteriorDraws, Source
from pyro_mf.solvers.scouts import send_scouts

# Latents up to which importance sampling is tried first.
_MAX_IMPORTANCE = 25
_MAX_TEMPERED = 300  # beyond, the temperatures take more than the budget
_NUM_CHAINS, _NUM_COSTLY_CHAINS = 64, 32
_NUM_SCOUTS = 32
# Density values for importance sampling, and share of the rest of the budget for chains: what they
# do not manage with that is for the next.
_MAX_VALUES, _CHAINS_SHARE = 65_536, 0.7
_FIRST_SHARE = 0.4  # for chains after which the same is tried in other coordinates
# Draws per latent by importance sampling at least, which are cheap, and share of the budget that
# chains may take to become more precise than is needed.
_DRAWS_PER_LATENT, _SPARE = 650, 0.2
_WIDE = 2.0  # sds of the reverse fit and the scouts together
_NUM_WEIGHTY = 8  # draws of failed importance sampling that become scouts
# Standard error of means and sds at which tempered draws are good enough to start a mixture from.
_ROUGH_ERROR = 0.1


Drawn: TypeAlias = tuple[Expectations, PosteriorDraws]
"""Draws as what averages over them, and as what is reported."""


class PosteriorSampler:
    """Draws of a posterior from a Gaussian that is near it.

    Args:
        blocks: The log joint.
        loc: Location of the Gaussian, shape ``(D,)``.
        scale: Its sds, shape ``(D,)``, or the Cholesky factor of its covariance, ``(D, D)``.
        max_error: Standard error of means, in sds, and of sds, relative, that is small enough.
        aim: A smaller one, at which chains stop while a fifth of the budget is not yet spent.
        max_gradients: Budget, in gradients at 64 points each.
        generator: Source of randomness.
        report: Called with the progress.
        starts: Where chains start, shape ``(K, D)``; by default draws of the Gaussian.
        max_late_rhat: R-hat up to which chains agree that have run for long.
        num_scouts: Number of climbs from elsewhere.
        own: From these coordinates, rows ``(S, D)``, to those in which scouts must find draws near
            them; by default the same.
        settle: Where scouts go on to from rows ``(K, D)``, as by chains in other coordinates.
        can_temper: Whether to go on by tempering; if not, chains that do not agree stop earlier.

    Attributes:
        notes: What went wrong on the way, in sentences.
        ending: ``"converged"`` where nothing cut the sampling short.
    """

    def __init__(
        self,
        blocks: Blocks,
        loc: Tensor,
        scale: Tensor,
        *,
        max_error: float,
        aim: float,
        max_gradients: int,
        generator: torch.Generator,
        report: Report,
        starts: Tensor | None = None,
        max_late_rhat: float = MAX_LATE_RHAT,
        num_scouts: int = _NUM_SCOUTS,
        own: Callable[[Tensor], Tensor] | None = None,
        settle: Callable[[Tensor], Tensor] | None = None,
        can_temper: bool = True,
    ) -> None:
        self.blocks, self.loc, self.metric = blocks, loc, Metric(scale)
        self._starts, self._max_late_rhat = starts, max_late_rhat
        self._num_scouts = num_scouts
        self._own, self._settle, self._can_temper = own, settle, can_temper
        self.max_error, self.aim, self.max_gradients = max_error, aim, max_gradients
        self.generator, self.report = generator, report
        self.notes: list[str] = []
        self.ending: StopReason = "converged"
        self._num_rows = 0
        self._limit = max_gradients
        self._phase = "scouts"
        self._scouts = loc.new_zeros(0, len(loc))
        self._found: list[Drawn] = []
        self._rough: WeightedDraws | None = None

    @property
    def num_gradients(self) -> int:
        """Gradients at 64 points each so far."""
        return math.ceil(self._num_rows / ROWS)

    def draw(self, method: Source | None) -> Drawn | None:
        """Draw by the methods that suit the number of latents, until one passes its checks.

        Args:
            method: The only one to use; ``None`` for several in turn.

        Returns:
            The draws with the errors of their averages, the best where all failed some check;
            ``None`` where there are none.
        """
        try:
            self._scouts = self._send_scouts()
            if self._settle is not None and len(self._scouts):
                self._scouts = self._settle(self._scouts)
            methods = self._methods(method)
            may_be_last = self._can_temper or method is not None
            while methods:
                self._phase = name = methods.pop(0)
                found = self._by(name, is_last=not methods and may_be_last)
                self._keep(found)
                if found is not None and not self._found[-1][1].problems:
                    break
                if name == "smc" and self._rough is None:
                    break
        except BudgetSpentError:
            self.ending = "budget"
        except KeyboardInterrupt:
            self.ending = "interrupted"
        if not self._found:
            return None
        self._say_what_failed()
        best: Drawn | None = self._found[-1]  # what passed its checks comes last
        if self._found[-1][1].problems:
            chosen = least_far([draws for _, draws in self._found], self.blocks)
            best = None if chosen is None else self._found[chosen]
        if self.ending == "converged" and (best is None or best[1].problems):
            self.ending = "budget"
        return best

    def _send_scouts(self) -> Tensor:
        for prior in (self._prior, None):
            try:
                return send_scouts(
                    self._density,
                    self.loc,
                    self.metric,
                    num=self._num_scouts,
                    generator=self.generator,
                    prior=prior,
                )
            except ModelError as error:
                self._lose_prior(error)
        return self._scouts

    def _methods(self, method: Source | None) -> list[Source]:
        if method is not None:
            return [method]
        size = len(self.loc)
        if size > _MAX_TEMPERED or (size > _MAX_IMPORTANCE and not self._can_temper):
            return ["hmc"]
        if size > _MAX_IMPORTANCE:
            return ["hmc", "smc"]
        if not self._can_temper:
            return ["importance", "hmc"]
        # Tempered draws that are good enough to start a mixture; else as many as there can be.
        return ["importance", "hmc", "smc", "mixture", "smc"]

    def _by(self, name: Source, *, is_last: bool) -> Drawn | None:
        if name == "importance":
            return self._by_importance()
        if name == "hmc":
            return self._by_chains(is_last=is_last)
        if name == "mixture":
            return self._by_mixture()
        return self._by_tempering(is_rough=not is_last)

    def _by_importance(self) -> Drawn | None:
        budget = ROWS * (self.max_gradients - self.num_gradients)
        covariance = self.metric.covariance
        try:
            drawn = adaptive_importance(
                self._values,
                self.loc,
                covariance if self.metric.is_dense else torch.diag(covariance),
                generator=self.generator,
                tolerance=self.max_error,
                max_evaluations=min(budget, _MAX_VALUES),
                min_draws=_DRAWS_PER_LATENT * len(self.loc),
            )
        except NonFiniteError as error:
            self.notes.append(f"{NAMES['importance']} failed: {error}")
            return None
        found = drawn, _freeze("importance", drawn, drawn.problems, _numbers(drawn))
        if drawn.problems:  # weights that only a few draws have may know of something, too
            self._scouts = torch.cat([self._scouts, found[1].sample(_NUM_WEIGHTY, seed=0)])
        return found

    def _by_chains(self, *, is_last: bool) -> Drawn | None:
        try:
            run = ChainRun(
                self._density,
                self.loc,
                self.metric,
                layout=self.blocks.log_joint.layout,
                scouts=self._scouts,
                num_chains=_NUM_COSTLY_CHAINS if self.blocks.is_costly else _NUM_CHAINS,
                max_error=self.max_error,
                wanted_error=self._wanted_error,
                generator=self.generator,
                report=self._note_error,
                starts=self._starts,
                max_late_rhat=self._max_late_rhat,
            )
        except NonFiniteError as error:
            self.notes.append(f"{NAMES['hmc']} failed: {error}")
            return None
        left = self.max_gradients - self.num_gradients
        share = _CHAINS_SHARE if self._can_temper else _FIRST_SHARE
        self._limit = self.num_gradients + (left if is_last else int(share * left))
        try:
            try:
                run.run()
            except BudgetSpentError:
                self._limit = self.max_gradients
                is_hopeful = run.is_healthy or (self._can_temper and run.found() is None)
                if is_last or is_hopeful:  # the next would do no better
                    run.run()
        except (BudgetSpentError, KeyboardInterrupt):
            self._keep(run.found())
            raise
        finally:
            self._limit = self.max_gradients
        return run.found()

    def _wanted_error(self) -> float:
        """The error at which chains stop, by what is spent of the budget."""
        is_cheap = self.num_gradients <= _SPARE * self.max_gradients
        return self.aim if is_cheap else self.max_error

    def _keep(self, found: Drawn | None) -> None:
        if found is not None:
            averages, draws = found
            self._found.append((averages, with_checks(draws, self.blocks, self._scouts, self._own)))

    def _by_tempering(self, *, is_rough: bool) -> Drawn | None:
        left = self.max_gradients - self.num_gradients
        self._limit = 2 * self.max_gradients  # it keeps to a budget of its own, about
        try:
            drawn = tempered_smc(
                self._density,
                self._base(),
                generator=self.generator,
                tolerance=max(_ROUGH_ERROR, self.max_error) if is_rough else self.max_error,
                max_evaluations=max(ROWS, ROWS * left),
            )
        except (ModelError, NonFiniteError) as error:
            self.notes.append(f"{NAMES['smc']} failed: {error}")
            return None
        numbers = {
            "num_runs": float(len(drawn.run_log_evidence)),
            "num_temperatures": float(max(map(len, drawn.temperatures))),
            "acceptance": min(min(run) for run in drawn.acceptance),
        }
        problems = drawn.problems
        self._rough = drawn if is_rough and not problems else None
        largest = float(torch.maximum(drawn.mean_error, drawn.sd_error).max())
        if not problems and largest > self.max_error:
            problems = (f"the largest standard error of a mean or sd is {largest:.3f}",)
        return drawn, _freeze("smc", drawn, problems, numbers)

    def _by_mixture(self) -> Drawn | None:
        """Importance sampling from a mixture fitted to the tempered draws."""
        rough = self._rough
        if rough is None:
            return None
        try:
            drawn = importance_from(
                self._values,
                fit_mixture(rough.z, rough.log_weights, generator=self.generator),
                generator=self.generator,
                tolerance=self.max_error,
                max_evaluations=_MAX_VALUES,
                reference=rough,
            )
        except (NonFiniteError, ValueError) as error:
            self.notes.append(f"{NAMES['mixture']} failed: {error}")
            return None
        return drawn, _freeze("mixture", drawn, drawn.problems, _numbers(drawn))

    @cached_property
    def _prior(self) -> Prior | None:
        """The prior, if it can be drawn from."""
        try:
            prior = Prior(self.blocks.log_joint)
            prior.sample(1, self.generator)
        except ModelError as error:
            self._lose_prior(error)
            return None
        return prior

    def _lose_prior(self, error: ModelError) -> None:
        self._prior, self._no_prior = None, str(error)

    def _base(self) -> Base:
        """Where tempering starts: the prior, which reaches all modes, if it can be drawn from."""
        if self._prior is not None:
            return self._prior
        self.notes.append(
            f"{NAMES['smc']} started {_WIDE:.0f} times as wide as the reverse KL's fit and the "
            f"scouts, not from the prior ({self._no_prior}), and finds no mode further away"
        )
        away = self._scouts - self.loc
        spread = away.T @ away / max(len(away), 1)
        covariance = self.metric.covariance
        covariance = covariance if self.metric.is_dense else torch.diag(covariance)
        tril = _WIDE * torch.linalg.cholesky(covariance + spread)
        return StudentT(self.loc, tril, 7.0)

    def _say_what_failed(self) -> None:
        for k, (_, draws) in enumerate(self._found):
            if draws.problems:
                went_on = k + 1 < len(self._found)
                then = f", so {NAMES[self._found[k + 1][1].source]} came next" if went_on else ""
                self.notes.append(f"{NAMES[draws.source]}: {'; '.join(draws.problems)}{then}")

    def _note_error(self, error: float) -> None:
        self._phase = f"hmc, error {error:.3f}"

    def _density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self._count(z)
        return self.blocks.value_and_grad(z)

    def _values(self, z: Tensor) -> Tensor:
        self._count(z)
        return self.blocks.values(z)

    def _count(self, z: Tensor) -> None:
        """Note so many points.

        Raises:
            BudgetSpentError: If no more may be evaluated.
        """
        if self.num_gradients >= self._limit:
            raise BudgetSpentError
        self._num_rows += len(z)
        self.report(Progress(self._phase, self.num_gradients, math.nan, math.nan))


def _numbers(drawn: WeightedDraws) -> dict[str, float]:
    return {
        "khat": drawn.khat,
        "log_evidence": drawn.log_evidence,
        "log_evidence_se": drawn.log_evidence_se,
    }


def _freeze(
    source: Source, drawn: WeightedDraws, problems: tuple[str, ...], numbers: dict[str, float]
) -> PosteriorDraws:
    return PosteriorDraws(
        source=source,
        z=drawn.z,
        log_weights=drawn.log_weights,
        log_density=drawn.log_density,
        mean_error=drawn.mean_error,
        sd_error=drawn.sd_error,
        problems=problems,
        diagnostics={
            "ess": drawn.ess,
            **numbers,
        },
    )
