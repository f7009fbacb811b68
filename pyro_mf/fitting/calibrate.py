"""``calibrate``: does a fit recover the truths that its data were simulated from?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.data_sets import DataSets
from pyro_mf.diagnostics.calibration import MIN_SIMULATIONS, Calibration
from pyro_mf.diagnostics.joint_draws import Simulations
from pyro_mf.diagnostics.ranks import Approximation, Ranks
from pyro_mf.diagnostics.simulations import Simulate, simulate_all
from pyro_mf.fitting.choice import choose_solver
from pyro_mf.fitting.problem import Limits, at_least, read_problem
from pyro_mf.fitting.progress import ProgressBar
from pyro_mf.fitting.refits import Refit, Refits
from pyro_mf.guides.site_families import FamilySpec
from pyro_mf.objectives import ForwardKL
from pyro_mf.solvers.outcome import Progress
from pyro_mf.solvers.random_state import forked

_FIRST_FIT = 1_000_000  # added to the seed for that of the first fit, so that draws differ


def calibrate(
    model: Callable[..., Any],
    simulate: Simulate = None,
    num_simulations: int = 200,
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    family: FamilySpec | None = None,
    objective: ELBO | None = None,
    solver: str = "auto",
    linear_response: bool = False,
    deterministic: bool = False,
    num_draws: int = 1000,
    tolerance: float = 0.1,
    max_gradients: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Simulate data from the model, fit each, and see where the truths lie in the posteriors.

    Latents are drawn from the prior and data given them; then each data set is fitted as
    :func:`~pyro_mf.fit` would. With the exact posterior every truth lies below a posterior quantile
    p with probability p. What is tested is each parameter by itself, on average over data that the
    prior deems likely: nothing is said of correlations, or of the one data set at hand.

    Fits of Normal factors by the reverse KL are made side by side, through one captured graph; all
    others one after another. Ctrl-C returns what is there by then.

    Args:
        model: A Pyro model with a proper prior.
        simulate: How data are made. ``None``: by the model itself, and its observed sites' data are
            put in the place of theirs in ``model_args``. A mapping from observed sites to names of
            arguments, as in ``{"y": "y"}``: the same, also where those arguments are ``None``. A
            function: it is called with a dict of latent values by site, torch's, NumPy's and
            Python's generators seeded, and returns the arguments to fit to: a dict of those that
            change, as in ``{"y": y}``, or a tuple of all positional ones.
        num_simulations: Number of data sets, at least 20. With 200, in a table of ten parameters,
            an sd off by 25 % or a bias of a third of an sd is found more than 85 % of the time.
        model_args: Positional arguments, as for a fit: covariates, and data as a template.
        model_kwargs: Keyword arguments.
        family: Family of the factors, as for :func:`~pyro_mf.fit`.
        objective: As for :func:`~pyro_mf.fit`.
        solver: As for :func:`~pyro_mf.fit`.
        linear_response: Whether to calibrate the Gaussians of linear response in place of the
            factors.
        deterministic: Whether ``pyro.deterministic`` sites count as parameters, too.
        num_draws: Draws that rank parameters without a closed form, at least 99.
        tolerance: As for :func:`~pyro_mf.fit`.
        max_gradients: As for :func:`~pyro_mf.fit`.
        seed: Seed of everything random; torch's global generator is left as it was.
        progress: As for :func:`~pyro_mf.fit`.

    Returns:
        The calibration; print it, or draw it with ``plot_calibration``.

    Raises:
        TypeError: If an argument is of the wrong kind, or ``simulate`` returns no arguments.
        ValueError: If a number is out of range, or linear response is asked of a forward KL.
        ModelError: If the prior is improper, the model observes nothing, it cannot simulate its
            data by itself, or data are not finite.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> found = calibrate(model, model_args=(torch.zeros(3),))
        >>> found.verdict
        'calibrated'

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference
        Algorithms with Simulation-Based Calibration, https://arxiv.org/abs/1804.06788
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
        Inference, https://arxiv.org/abs/1802.02538
        Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete uniformity and its
        applications, https://arxiv.org/abs/2103.10522
    """
    at_least("num_simulations", num_simulations, MIN_SIMULATIONS)
    at_least("num_draws", num_draws, 99)
    at_least("seed", seed, 0)
    limits = Limits(tolerance, max_gradients)
    if linear_response and isinstance(objective, ForwardKL):
        raise ValueError(
            "linear_response=True widens fits by the reverse KL; the objective is the forward KL. "
            "Leave one of the two out."
        )
    if _pyro.handlers_around():
        raise ValueError(
            "calibrate was called inside Pyro's effect handlers, which it would not honour. Wrap "
            "the model instead, as in calibrate(poutine.condition(model, data), ...)."
        )
    began = time.perf_counter()
    problem = read_problem(model, model_args, model_kwargs, None, family, objective)
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        forked(seed),
        pyro.get_param_store().scope(),  # the guides are nobody's business
        ProgressBar(shown=progress) as bar,
    ):
        bar(Progress("simulating", 0, math.nan, math.nan))
        simulations = simulate_all(
            model, simulate, num_simulations, (problem.model_args, problem.model_kwargs), seed=seed
        )
        refits = _prepare(
            simulations,
            family=family,
            objective=objective,
            solver=solver,
            limits=limits,
            linear_response=linear_response,
            seed=seed + _FIRST_FIT,
        )
        num_done = 0

        def is_done(_: int) -> None:
            nonlocal num_done
            num_done += 1
            bar(Progress(f"{num_done} of {num_simulations} fits", 0, math.nan, math.nan))

        done = refits.run(is_done)
        ranks = Ranks(simulations.log_joint, deterministic=deterministic, num_draws=num_draws)
        return _collect(simulations, refits, done, ranks, seconds=time.perf_counter() - began)


def _prepare(
    simulations: Simulations,
    *,
    family: FamilySpec | None,
    objective: ELBO | None,
    solver: str,
    limits: Limits,
    linear_response: bool,
    seed: int,
) -> Refits:
    """Choose solver and order of the fits.

    Raises:
        ModelError: If the model has learnable parameters.
    """
    first = simulations.log_joint
    params = first.program.prototype.params
    if params:
        raise ModelError(
            f"the model has learnable parameters, such as '{next(iter(params))}', which every fit "
            "would change: there is no one model to calibrate. Give them priors, or fix them."
        )
    problem = read_problem(
        first.model, first.model_args, first.model_kwargs, None, family, objective
    )
    object.__setattr__(problem, "log_joint", first)  # cached, as if computed already
    return Refits(
        problem=problem,
        choice=choose_solver(problem, solver),
        data_sets=DataSets(first, simulations.arguments),
        limits=limits,
        family="normal" if family is None else family,
        linear_response=linear_response,
        seed=seed,
    )


def _collect(
    simulations: Simulations,
    refits: Refits,
    done: dict[int, Refit],
    ranks: Ranks,
    *,
    seconds: float,
) -> Calibration:
    """Rank the truths, and count what went wrong.

    Raises:
        ModelError: If every fit failed.
        KeyboardInterrupt: If none was done by then.
    """
    rows, kept, failures, has_draws = [], [], {}, False
    for k, refit in sorted(done.items()):
        if not isinstance(refit.approximation, Approximation):
            failures[k] = refit.approximation
            continue
        truth = simulations.truths[k]
        row, by_draws = ranks(refit.log_joint, refit.approximation, truth, refits.seed + k)
        rows.append(row)
        kept.append(k)
        has_draws = has_draws or by_draws
    if len(rows) < 2:
        if not failures:
            raise KeyboardInterrupt
        raise ModelError(
            f"{len(failures)} of {len(done)} fits failed, so there is nothing to calibrate. The "
            f"first: {next(iter(failures.values()))}"
        )
    problem = refits.problem
    approximation = "linear response" if refits.linear_response else "mean field"
    kind = "forward" if isinstance(problem.objective, ForwardKL) else "reverse"
    obstacle = refits.obstacle
    return Calibration(
        parameters=ranks.names,
        probabilities=np.stack(rows),
        truths=simulations.truths[kept].numpy(),
        num_asked=len(simulations.arguments),
        failures=failures,
        unconverged=tuple(k for k in kept if not done[k].converged),
        approximation=f"{approximation} ({kind} KL) of '{problem.name}'",
        method=f"fits one by one, since {obstacle}" if obstacle else "fits side by side",
        seconds=seconds,
        is_interrupted=len(done) < len(simulations.arguments),
        num_draws=ranks.num_draws if has_draws else None,
    )
