"""``fit``: the mean-field posterior of a model in one call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_mf import _pyro
from pyro_mf._errors import ConvergenceWarning, ModesWarning
from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.fitting.choice import choose_solver
from pyro_mf.fitting.given_draws import read_draws
from pyro_mf.fitting.problem import Limits, at_least, read_problem
from pyro_mf.fitting.progress import ProgressBar
from pyro_mf.fitting.response import respond
from pyro_mf.fitting.restarts import Optimum, best_of, describe_modes
from pyro_mf.fitting.result import FitResult
from pyro_mf.fitting.starts import solve, solve_from_starts
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.site_families import FamilySpec
from pyro_mf.solvers.outcome import Progress


def fit(
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    guide: Any | None = None,
    family: FamilySpec | None = None,
    objective: ELBO | None = None,
    solver: str = "auto",
    draws: Any | None = None,
    num_restarts: int = 1,
    tolerance: float = 0.1,
    max_gradients: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> FitResult:
    """Fit a mean-field guide to a model's posterior, without a learning rate or a step count.

    The solver is chosen by what the problem allows, and the result says which and why. It stops
    when it has converged; a fit that has not comes with a :class:`~pyro_mf.ConvergenceWarning` and
    says so when printed. Ctrl-C ends the fit and returns the best so far. Precision and device are
    those of the model's data; nothing is moved.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments (data).
        model_kwargs: Its keyword arguments.
        guide: A guide for the model, trained in place; by default a new
            :class:`~pyro_mf.AutoMeanField`.
        family: Family of the factors of the guide that is made, as for
            :class:`~pyro_mf.AutoMeanField`; ``"normal"`` by default. With ``"auto"`` the fit finds
            out where Normal factors do not suffice, and says what it chose.
        objective: An objective in the manner of :class:`pyro.infer.ELBO`; by default
            :class:`~pyro_mf.ReverseKL`.
        solver: ``"deterministic"`` (fixed draws: reverse KL, full data), ``"moment_matching"``
            (forward KL, full data: draws of the posterior first, then each factor by itself),
            ``"stochastic"`` (everything else), or ``"auto"``.
        draws: Draws of the posterior for the forward KL, instead of those that it would make: a
            result of :func:`~pyro_mf.run_nuts`, a Pyro ``MCMC`` after its run, an ``InferenceData``
            or ``DataTree``, or a mapping from latent sites to tensors ``(S, *shape)`` or
            ``(chains, S, *shape)`` in the model's own space.
        num_restarts: Number of starts, the first from the guide's own values and others dispersed.
            Every optimum is kept; the one with the highest ELBO is the result.
        tolerance: Error that the solver may leave in the result, in sds. With minibatches 0.2 takes
            about a quarter of the steps of 0.1; so it does with the forward KL.
        max_gradients: Budget in gradient evaluations per start; by default the solver's own. For
            moment matching one is a gradient at 64 points.
        seed: Seed of everything random: the same seed gives the same bits. Torch's global generator
            is left as it was.
        progress: Whether to show a progress bar; ``None`` shows one in a terminal or notebook.

    Returns:
        The result; print it.

    Raises:
        TypeError: If model or guide cannot be called, ``model_args`` is no tuple, the objective is
            no ELBO, a number is no integer, or ``draws`` are no draws.
        ValueError: If a number is out of range, the solver is unknown or cannot serve, restarts are
            asked of a guide that they cannot start anew, ``draws`` do not fit the model or are not
            finite, or Pyro's effect handlers are around.
        ModelError: If the model or its data are at fault.
        GuideMismatchError: If the guide belongs to another model.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def schools(sigma, y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("school", len(sigma)):
        ...         eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)
        >>> sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
        >>> y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        >>> result = fit(schools, (sigma, y))
        >>> result.solver, result.stop_reason
        ('deterministic', 'converged')

    References:
        Giordano, Ingram and Broderick (2024), Black Box Variational Inference with a Deterministic
        Objective, https://arxiv.org/abs/2304.05527
        Naesseth, Lindsten and Blei (2020), Markovian Score Climbing: Variational Inference with
        KL(p||q), https://arxiv.org/abs/2003.10374
    """
    at_least("num_restarts", num_restarts, 1)
    at_least("seed", seed, 0)
    limits = Limits(tolerance, max_gradients)
    problem = read_problem(model, model_args, model_kwargs, guide, family, objective)
    if num_restarts > 1 and not isinstance(problem.guide, FlatGuide):
        raise ValueError(
            f"num_restarts={num_restarts} needs an AutoMeanField, which fit can start anew; the "
            f"guide is {type(problem.guide).__name__}. Call fit once per guide and seed instead."
        )
    if _pyro.handlers_around():
        raise ValueError(
            "fit was called inside Pyro's effect handlers, which it would not honour. Wrap the "
            "model instead, as in fit(poutine.condition(model, data), ...)."
        )
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        forked_seed(seed),
        ProgressBar(shown=progress) as bar,
    ):
        begin = time.perf_counter()
        bar(Progress("reading the model", 0, math.nan, math.nan))
        choice = choose_solver(problem, solver, has_draws=draws is not None)
        if num_restarts > 1 and choice.solver == "moment_matching":
            raise ValueError(
                "num_restarts is for the reverse KL, whose optima depend on the start; the forward "
                "KL has one, and its chains start in many places. Leave num_restarts out."
            )
        given = None if draws is None else read_draws(draws, problem.log_joint)
        prepared = time.perf_counter() - begin
        optima, failures = solve_from_starts(
            problem,
            choice,
            num_restarts,
            seed=seed,
            limits=limits,
            report_for=bar.labelled,
            given=given,
        )
        best = best_of(optima)
        seconds = _add_seconds({"prepare": prepared}, optima)
        response = None
        if choice.solver == "deterministic":
            begin = time.perf_counter()
            bar(Progress("linear response", 0, math.nan, math.nan))
            with suppress(KeyboardInterrupt):  # the fit is there, and this can be had later
                response = respond(problem, optima[best].outcome, seed=seed)
            seconds["linear response"] = time.perf_counter() - begin
    modes = describe_modes(optima, problem.guide)
    _warn(optima[best], modes)
    return FitResult(
        problem=problem,
        solver=choice.solver,
        reason=choice.reason,
        seed=seed,
        restarts=optima,
        best=best,
        seconds=seconds,
        notes=(*optima[best].outcome.notes, *failures, *([f"{modes}."] if modes else [])),
        response=response,
    )


def resume(
    result: FitResult,
    *,
    tolerance: float = 0.1,
    max_gradients: int | None = None,
    progress: bool | None = None,
) -> FitResult:
    """See :meth:`pyro_mf.FitResult.resume`.

    Raises:
        TypeError: If a number is of the wrong kind.
        ValueError: If the solver was the deterministic one, or a number is not positive.
    """
    limits = Limits(tolerance, max_gradients)
    if result.solver != "stochastic":
        raise ValueError(
            "only the stochastic solver goes on from where it stopped; this fit is by the "
            f"{result.solver} one. Call fit again with a larger max_gradients."
        )
    old, problem = result.restarts[result.best], result.problem
    choice = choose_solver(problem, "stochastic")
    with forked_seed(old.seed), ProgressBar(shown=progress) as bar:
        optimum = solve(
            problem,
            choice,
            seed=old.seed,
            limits=limits,
            report=bar.labelled("fit"),
            state=old.outcome.state,
        )
    _warn(optimum, None)
    restarts = list(result.restarts)
    restarts[result.best] = optimum
    return replace(
        result,
        restarts=tuple(restarts),
        seconds=_add_seconds(result.seconds, (optimum,)),
        notes=optimum.outcome.notes,
        response=None,
        verdicts={},
    )


def _add_seconds(spent: dict[str, float], optima: tuple[Optimum, ...]) -> dict[str, float]:
    """Wall time by phase, with that of more runs."""
    seconds = dict(spent)
    for optimum in optima:
        for phase, more in optimum.outcome.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + more
    return seconds


def _warn(best: Optimum, modes: str | None) -> None:
    """Warn of what a result that nobody prints would hide."""
    outcome = best.outcome
    if outcome.stop_reason in ("budget", "diverged"):
        verdict = "did not converge" if outcome.stop_reason == "budget" else "diverged"
        warnings.warn(f"the fit {verdict}: {outcome.message}", ConvergenceWarning, stacklevel=3)
    if modes is not None:
        warnings.warn(f"{modes}.", ModesWarning, stacklevel=3)
