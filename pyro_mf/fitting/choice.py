"""Which solver serves a problem, and why, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pyro_mf._errors import ModelError
from pyro_mf.density.prototype import run_prototype
from pyro_mf.families import Normal
from pyro_mf.fitting.differentiable import describe_jump, describe_missing_gradient
from pyro_mf.fitting.problem import Problem
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.objectives import ReverseKL

SolverName: TypeAlias = Literal["deterministic", "stochastic"]
SOLVERS = ("auto", "deterministic", "stochastic")


@dataclass(frozen=True, eq=False)
class Choice:
    """A solver and the reason for it.

    Args:
        solver: Its name.
        reason: Why, for a sentence that begins with the solver's name.
        needs_score: Whether the model has no gradient to follow.
    """

    solver: SolverName
    reason: str
    needs_score: bool = False


def choose_solver(problem: Problem, solver: str = "auto") -> Choice:
    """Choose a solver, or check that the one asked for can serve.

    Args:
        problem: What is to be solved; its guide is set up on the way if it is one of ours.
        solver: ``"auto"``, ``"deterministic"`` or ``"stochastic"``.

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
    obstacle = _outside_model(problem) or _inside_model(problem)
    missing = None
    if obstacle is None:
        log_joint = problem.log_joint
        missing = describe_missing_gradient(log_joint) or describe_jump(log_joint)
    if missing is not None:
        obstacle = f"the log density is not differentiable: {missing}; score gradients, slow"
    _set_up_guide(problem)
    if obstacle is None and solver != "stochastic":
        reason = "reverse KL, Normal factors, full data, differentiable log density"
        return Choice("deterministic", reason)
    if solver == "deterministic":
        raise ValueError(
            f"solver='deterministic' cannot serve: {obstacle}. Leave the choice to "
            "solver='auto', or ask for 'stochastic'."
        )
    return Choice("stochastic", obstacle or "asked for", missing is not None)


def _inside_model(problem: Problem) -> str | None:
    """What about the model keeps the deterministic solver from serving.

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
    if not log_joint.size:
        raise ModelError(
            f"the model has no continuous latent site, only {list(prototype.discrete)}, which are "
            "summed out exactly. There is nothing to fit."
        )
    return None


def _outside_model(problem: Problem) -> str | None:
    """What about objective and guide keeps the deterministic solver from serving."""
    objective: Any = problem.objective
    if objective is not None and not isinstance(objective, ReverseKL):
        return f"the objective is {type(objective).__name__}, not the reverse KL"
    guide = problem.guide
    if not isinstance(guide, FlatGuide):
        name = getattr(guide, "__name__", type(guide).__name__)
        return f"the guide ({name}) is not an AutoMeanField"
    if not isinstance(guide.family, Normal):
        return f"the factors are of family '{guide.family.name}', not 'normal'"
    if guide.create_plates is not None:
        return "the guide subsamples plates of its own (create_plates)"
    return None


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
