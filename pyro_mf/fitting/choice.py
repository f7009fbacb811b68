"""Which solver serves a problem, and why, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeGuard

from pyro_mf._errors import ModelError
from pyro_mf.density.prototype import run_prototype
from pyro_mf.fitting.differentiable import describe_jump, describe_missing_gradient
from pyro_mf.fitting.problem import Problem
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.objectives import ForwardKL, ReverseKL
from pyro_mf.solvers.coordinate_ascent import why_not_summed
from pyro_mf.solvers.posterior_draws import Source

SolverName: TypeAlias = Literal["deterministic", "stochastic", "moment_matching"]
SOLVERS = ("auto", "deterministic", "stochastic", "moment_matching")
# What the solvers other than the stochastic one are for.
_OBJECTIVES = {"deterministic": "ReverseKL", "moment_matching": "ForwardKL"}
# Estimators of ForwardKL for which all draws can be made before the fit, and by what.
_SOURCES: dict[str | None, Source | None] = {None: None, "hmc": "hmc", "smc": "smc"}


@dataclass(frozen=True, eq=False)
class Choice:
    """A solver and the reason for it.

    Args:
        solver: Its name.
        reason: Why, for a sentence that begins with the solver's name.
        needs_score: Whether the model has no gradient to follow.
        source: For moment matching, where draws come from; ``None`` for the solver's choice.
    """

    solver: SolverName
    reason: str
    needs_score: bool = False
    source: Source | None = None


def choose_solver(problem: Problem, solver: str = "auto", *, has_draws: bool = False) -> Choice:
    """Choose a solver, or check that the one asked for can serve.

    Args:
        problem: What is to be solved; its guide is set up on the way if it is one of ours.
        solver: ``"auto"``, ``"deterministic"``, ``"stochastic"`` or ``"moment_matching"``.
        has_draws: Whether draws of the posterior are there already.

    Raises:
        ValueError: If there is no such solver, or it cannot serve.
        ModelError: If the model has nothing to infer, or is no model.
        GuideMismatchError: If the guide belongs to another model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.fitting.problem import read_problem
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> choose_solver(read_problem(model)).solver
        'deterministic'
    """
    if solver not in SOLVERS:
        names = ", ".join(map(repr, SOLVERS))
        raise ValueError(f"solver must be one of {names}; got {solver!r}.")
    fast: SolverName = "moment_matching" if _is_forward(problem) else "deterministic"
    obstacle = _outside_model(problem) or _inside_model(problem)
    missing = None
    if obstacle is None:
        log_joint = problem.log_joint
        if log_joint.size:
            missing = describe_missing_gradient(log_joint) or describe_jump(log_joint)
    if missing is not None and not has_draws:
        obstacle = f"the log density is not differentiable: {missing}"
        obstacle += "" if _is_forward(problem) else "; score gradients, slow"
    _set_up_guide(problem)
    obstacle = obstacle or _among_sites(problem)
    if has_draws and not _is_forward(problem):
        obstacle = "the objective is the reverse KL, which makes no use of them"
    if solver not in ("auto", "stochastic", fast):
        obstacle = f"it is for objective={_OBJECTIVES[solver]}()"
    if obstacle is None and solver != "stochastic":
        choice = _fast(problem, fast, has_draws=has_draws)
        return replace(choice, needs_score=missing is not None)
    if has_draws:
        raise ValueError(
            "draws= is for moment matching (objective=ForwardKL()), which cannot serve: "
            f"{obstacle or 'another solver is asked for'}. Leave draws out."
        )
    if solver not in ("auto", "stochastic"):
        raise ValueError(
            f"solver={solver!r} cannot serve: {obstacle}. Leave the choice to solver='auto', or "
            "ask for 'stochastic'."
        )
    needs_score = missing is not None and not _is_forward(problem)
    return Choice("stochastic", obstacle or "asked for", needs_score)


def _is_forward(problem: Problem) -> bool:
    return isinstance(problem.objective, ForwardKL)


def _fast(problem: Problem, solver: SolverName, *, has_draws: bool) -> Choice:
    if not isinstance(problem.objective, ForwardKL):
        guide = problem.guide
        if not guide.layout.sites:
            reason = "reverse KL, discrete factors, full data, all values can be summed over"
            return Choice(solver, reason)
        factors = "families to choose" if guide.is_auto else f"{guide.family.name} factors"
        if _has_discrete(guide):
            factors += " and discrete ones that are summed over"
        return Choice(solver, f"reverse KL, {factors}, full data, differentiable log density")
    reason = "forward KL, full data, "
    reason += "draws are given" if has_draws else "differentiable log density"
    return Choice(solver, reason, source=_SOURCES[problem.objective.estimator])


def _inside_model(problem: Problem) -> str | None:
    """What about the model keeps a solver of the full data from serving.

    Raises:
        ModelError: If the model has nothing to infer, or is no model.
    """
    try:
        log_joint = problem.log_joint
    except ModelError:
        prototype = run_prototype(problem.model, problem.model_args, problem.model_kwargs)
        if not prototype.subsampled:
            raise
        return f"plate '{prototype.subsampled[0]}' is subsampled"
    prototype = log_joint.program.prototype
    if prototype.params:
        return f"the model has learnable parameters, such as '{next(iter(prototype.params))}'"
    if not (log_joint.size or _has_discrete(problem.guide)):
        raise ModelError(
            f"the model has no continuous latent site, only {list(prototype.discrete)}, which are "
            "summed out exactly. There is nothing to fit. To have factors of discrete sites, ask "
            f"for them by name: family={{'{prototype.discrete[0]}': 'categorical'}}."
        )
    return None


def _outside_model(problem: Problem) -> str | None:
    """What about objective and guide keeps a solver of the full data from serving."""
    objective: Any = problem.objective
    if isinstance(objective, ForwardKL):
        if objective.estimator not in _SOURCES:
            return f"estimator={objective.estimator!r} makes its draws step by step"
    elif objective is not None and not isinstance(objective, ReverseKL):
        return f"the objective is {type(objective).__name__}, not the reverse KL"
    guide = problem.guide
    if not isinstance(guide, FlatGuide):
        name = getattr(guide, "__name__", type(guide).__name__)
        return f"the guide ({name}) is not an AutoMeanField"
    if guide.create_plates is not None:
        return "the guide subsamples plates of its own (create_plates)"
    if isinstance(objective, ForwardKL) and _has_discrete(guide):
        return "discrete sites have factors of their own, which the draws know nothing of"
    return None


def _among_sites(problem: Problem) -> str | None:
    """What about the latents keeps a solver of the full data from serving."""
    guide = problem.guide
    if _has_discrete(guide):
        return why_not_summed(problem.model, guide, problem.model_args, problem.model_kwargs)
    if not isinstance(guide, FlatGuide) or not _is_forward(problem):
        return None
    angles = [site.name for site in guide.layout.sites if site.is_circular]
    return f"site '{angles[0]}' is an angle, without moments on a line" if angles else None


def _has_discrete(guide: Any) -> TypeGuard[DiscreteGuide]:
    return isinstance(guide, DiscreteGuide) and guide.has_discrete_factors


def _set_up_guide(problem: Problem) -> None:
    """Set up a guide of ours, and see that it is about this model's latents."""
    guide, args, kwargs = problem.guide, problem.model_args, problem.model_kwargs
    if not isinstance(guide, FlatGuide):
        return
    if guide.is_set_up or guide.model is not problem.model:
        guide.setup(*args, **kwargs)
        check_same_sites(run_prototype(problem.model, args, kwargs).layout, guide.layout)
    else:
        guide.setup(*args, **kwargs)
