"""The same fit to many data sets: side by side where that can be, else one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.density import LogJoint
from pyro_mf.density.data_sets import DataSets
from pyro_mf.diagnostics.ranks import Approximation
from pyro_mf.families import Normal
from pyro_mf.fitting.choice import Choice
from pyro_mf.fitting.problem import Limits, Problem
from pyro_mf.fitting.response import respond
from pyro_mf.fitting.starts import solve
from pyro_mf.guides import AutoMeanField
from pyro_mf.guides.site_families import FamilySpec
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.many_data import FAILURES, is_costly, solve_many_data
from pyro_mf.solvers.outcome import Outcome, silent

_AT_ONCE = 64  # data sets in a batch
_MAX_GRADIENTS = 5000  # of the deterministic solver, per data set


@dataclass(frozen=True, eq=False)
class Refit:
    """A fit to one of the data sets.

    Args:
        log_joint: The model at its data.
        approximation: What the fit believes, or why there is nothing.
        converged: Whether the solver stopped because it was done.
    """

    log_joint: LogJoint
    approximation: Approximation | str
    converged: bool


@dataclass(frozen=True, eq=False)
class Refits:
    """How to fit many data sets alike.

    Args:
        problem: Model, objective, and a guide that is set up, at the first data set.
        choice: The solver.
        data_sets: All data sets.
        limits: When each fit stops.
        family: The guide's family, as it was asked for.
        linear_response: Whether to widen each fit by its linear response.
        seed: Seed of the first fit; that of the next is one more.
    """

    problem: Problem
    choice: Choice
    data_sets: DataSets
    limits: Limits
    family: FamilySpec
    linear_response: bool
    seed: int

    @property
    def obstacle(self) -> str:
        """Why the fits cannot be made side by side, empty if they can."""
        guide = self.problem.guide
        is_normal = isinstance(guide.family, Normal) if not guide.is_auto else False
        if self.choice.solver != "deterministic":
            return f"the {self.choice.solver} solver fits one data set at a time"
        if not is_normal or getattr(guide, "has_discrete_factors", False):
            return "only Normal factors are fitted side by side"
        if not self.data_sets.obstacle and is_costly(self.data_sets):
            return "the model is so large that a batch would not be faster"
        return self.data_sets.obstacle

    def run(self, is_done: Callable[[int], None]) -> dict[int, Refit]:
        """Fit, until Ctrl-C.

        Args:
            is_done: Called with each data set's number when it has been fitted.

        Returns:
            A refit for each data set that was done.
        """
        refits = self._one_by_one(is_done) if self.obstacle else self._side_by_side(is_done)
        return dict(refits)

    def _side_by_side(self, is_done: Callable[[int], None]) -> Iterator[tuple[int, Refit]]:
        guide, count = self.problem.guide, len(self.data_sets)
        ends = solve_many_data(
            self.data_sets,
            guide.flat_params()[0].detach(),
            seeds=range(self.seed, self.seed + count),
            tolerance=self.limits.tolerance,
            max_gradients=self.limits.max_gradients or _MAX_GRADIENTS,
            num_at_once=_AT_ONCE,
            is_done=is_done,
        )
        for k, end in enumerate(ends):
            if isinstance(end, Exception):
                yield k, Refit(self.data_sets.at(k), str(end), converged=False)
            elif end is not None:
                response, refusal = end.outcome.response, end.outcome.refusal
                plain = _normal(end.loc, end.scale)
                found = self._believed(end.outcome, plain, response, refusal)
                yield k, Refit(self.data_sets.at(k), found, end.outcome.converged)

    def _one_by_one(self, is_done: Callable[[int], None]) -> Iterator[tuple[int, Refit]]:
        for k in range(len(self.data_sets)):
            log_joint = self.data_sets.at(k)
            try:
                refit = self._fit(log_joint, self.seed + k)
            except FAILURES as error:
                refit = Refit(log_joint, str(error), converged=False)
            except KeyboardInterrupt:
                return
            if refit is None:
                return
            yield k, refit
            is_done(k)

    def _fit(self, log_joint: LogJoint, seed: int) -> Refit | None:
        """Fit one data set, through the capture that is there; ``None`` after Ctrl-C."""
        guide = AutoMeanField(self.problem.model, self.family)
        args, kwargs = log_joint.model_args, log_joint.model_kwargs
        problem = replace(self.problem, model_args=args, model_kwargs=kwargs, guide=guide)
        object.__setattr__(problem, "log_joint", log_joint)  # cached, as if computed already
        with forked_seed(seed):
            guide.setup(*args, **kwargs)
            end = solve(problem, self.choice, seed=seed, limits=self.limits, report=silent).outcome
            if end.stop_reason == "interrupted":
                return None
            response, refusal = None, ""
            if self.linear_response:
                known = respond(problem, end, seed=seed)
                response, refusal = known.found, known.refusal
            found = self._believed(end, _of_guide(guide), response, refusal)
        return Refit(log_joint, found, end.converged)

    def _believed(
        self,
        outcome: Outcome,
        plain: Approximation,
        response: LinearResponse | None,
        refusal: str,
    ) -> Approximation | str:
        if outcome.stop_reason == "diverged":
            return f"the fit diverged: {outcome.message}"
        if not self.linear_response:
            return plain
        if response is None:
            return f"no linear response: {refusal or 'the fit ended before an optimum'}"
        draw = partial(_sample_response, response)
        return Approximation(Normal(), (response.loc, response.sd), draw)


def _of_guide(guide: AutoMeanField) -> Approximation:
    params = tuple(p.detach().clone() for p in guide.flat_params())

    def sample(num: int, seed: int) -> Tensor:
        with forked_seed(seed), torch.no_grad():
            return guide.sample_unconstrained(num)

    return Approximation(guide.family, params, sample)


def _normal(loc: Tensor, scale: Tensor) -> Approximation:
    def sample(num: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num, len(loc), generator=generator, dtype=torch.float64)
        return loc + scale * noise.to(loc)

    return Approximation(Normal(), (loc, scale), sample)


def _sample_response(response: LinearResponse, num: int, seed: int) -> Tensor:
    return response.sample(num, seed=seed)
