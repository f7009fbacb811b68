"""``solve_stochastic``: any guide, any objective, minibatches and learnable parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from pyro_mf.guides.protocol import is_factorised
from pyro_mf.objectives import ForwardKL, ReverseKL
from pyro_mf.solvers import random_state
from pyro_mf.solvers.descent import Descent, Divergence
from pyro_mf.solvers.noisy_loss import NoisyLoss
from pyro_mf.solvers.outcome import Outcome, Report, StopReason, silent

# Draws per step: a graph computes a few at the price of one, Pyro's handlers do not.
_PARTICLES_CAPTURED, _PARTICLES_TRACED = 8, 1
# Evaluations of the ELBO at the end: so many at a time, until its error in nats is small.
_NUM_EVALUATIONS, _MAX_EVALUATIONS, _SMALL_ERROR = 64, 512, 0.1
# Steps between looks at whether the forward KL's draws are of use, and looks in a row at which they
# are not that end the run: by then any guide has come to where its proposals are best.
_LOOK, _MAX_FAULTS = 200, 10


def solve_stochastic(
    model: Callable[..., Any],
    guide: Any,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    objective: Any = None,
    seed: int = 0,
    max_steps: int = 50_000,
    tolerance: float = 0.1,
    report: Report = silent,
    state: Mapping[str, Any] | None = None,
) -> Outcome:
    r"""Minimise an objective by stochastic gradients until the averaged parameters are known.

    No learning rate is asked for. Steps are measured in the guide's own standard deviations. They
    are long while the optimum is looked for; then the learning rate is fixed, and once the iterates
    have stopped drifting (split R-hat) they are averaged; then the learning rate is halved and they
    are averaged again. The run is done when the two averages agree and their Monte Carlo error is
    small. Their mean is the answer: three standard errors of every parameter, and twice the part of
    the change that is not noise, are then at most ``tolerance`` units.

    The parameters are optimised in place: the guide's and the model's learnable ones, whichever the
    objective touches. After Ctrl-C or divergence they hold the best that was seen. The program's
    random generators are left as they were.

    Args:
        model: A Pyro model; its plates may be subsampled, its parameters learnable.
        guide: Any guide for it.
        model_args: Positional arguments of model and guide.
        model_kwargs: Keyword arguments of model and guide.
        objective: An objective in the manner of :class:`pyro.infer.ELBO`; ``None`` for
            :class:`~pyro_mf.ReverseKL`.
        seed: Seed of all draws; the same seed gives the same bits.
        max_steps: Most steps of this call, each one gradient.
        tolerance: Largest error that is let pass, in units: a location's is the guide's sd, a log
            scale's :math:`1/\sqrt2`, a learnable model parameter's its standard error.
        report: Called now and then with the progress.
        state: ``Outcome.state`` of an earlier call, to go on from there; ``seed`` is not used then.

    Returns:
        Why it stopped and what it reached.

    Raises:
        ValueError: If an argument is out of range, the objective touches no parameters, or
            ``state`` belongs to another problem.
        TypeError: If the objective is no ELBO or does not return one number.
        ModelError: If the model or its data are at fault, or parameters appear during the run.
        NonFiniteError: If the objective is not finite at the start, whatever the draws.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x), subsample_size=2) as index:
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])
        >>> guide = AutoMeanField(model)
        >>> outcome = solve_stochastic(model, guide, (torch.ones(4),), tolerance=0.3)
        >>> outcome.stop_reason, abs(guide.median()["loc"].item() - 0.8) < 0.1
        ('converged', True)

    References:
        Welandawe et al. (2022), Robust, Automated, and Accurate Black-box Variational Inference,
        https://arxiv.org/abs/2203.15945
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be an integer of at least 1; got {max_steps!r}.")
    if not 0.0 < tolerance < math.inf:
        raise ValueError(
            f"tolerance must be positive, in units of the guide's sd; got {tolerance}."
        )
    if objective is not None and not hasattr(objective, "loss_and_grads"):
        raise TypeError(
            "objective must have loss and loss_and_grads, as pyro.infer.ELBO has; got "
            f"{type(objective).__name__}."
        )
    if objective is None:
        is_fast = is_factorised(guide) and getattr(guide, "create_plates", None) is None
        objective = ReverseKL(_PARTICLES_CAPTURED if is_fast else _PARTICLES_TRACED)
    loss = NoisyLoss(objective, model, guide, tuple(model_args), dict(model_kwargs or {}))
    begin = time.perf_counter()
    with random_state.forked(seed):
        leaves = loss.find_leaves()
    captured = time.perf_counter()
    with random_state.forked(seed):
        descent = Descent(loss, leaves, tolerance, state)
        reason, message = _run(descent, max_steps, report, lambda: _fault(objective))
        kept = descent.state()
        leaves.write(descent.best())
        leaves.clear_gradient()
        optimised = time.perf_counter()
        if isinstance(objective, ForwardKL):  # whose loss is no bound on the evidence
            if reason == "converged" and objective.fault is not None:
                reason, message = "budget", f"{message} But {objective.fault}"
            loss = replace(loss, objective=ReverseKL())
        elbo, elbo_se = _evaluate(loss)
    return Outcome(
        elbo=elbo,
        elbo_se=elbo_se,
        stop_reason=reason,
        message=message,
        losses=tuple(descent.losses),
        num_gradients=descent.num_gradients,
        seconds={
            "capture": captured - begin,
            "optimise": optimised - captured,
            "evaluate": time.perf_counter() - optimised,
        },
        notes=tuple(_notes(descent)),
        state=kept,
    )


def _fault(objective: Any) -> str | None:
    return objective.fault if isinstance(objective, ForwardKL) else None


def _run(
    descent: Descent, max_steps: int, report: Report, fault: Callable[[], str | None]
) -> tuple[StopReason, str]:
    """Step until there is a reason to stop; Ctrl-C is one, wherever it comes."""
    num_faults = 0
    try:
        for step in range(1, max_steps + 1):
            if descent.step():
                report(descent.progress())
                if descent.is_done:
                    return "converged", f"{descent.describe()}."
            if step % _LOOK == 0:
                found = fault()
                num_faults = 0 if found is None else num_faults + 1
                if num_faults == _MAX_FAULTS:
                    return "budget", (
                        f"stopped after {step} of at most {max_steps} steps, as the draws have "
                        f"been of no use for {(_MAX_FAULTS - 1) * _LOOK}: {found}"
                    )
        return "budget", (
            f"max_steps={max_steps} steps are used up; {descent.describe()}. Go on with state=, "
            "raise max_steps, or ask for less with a larger tolerance."
        )
    except Divergence as error:
        return "diverged", str(error)
    except KeyboardInterrupt:
        return (
            "interrupted",
            f"interrupted after {len(descent.losses)} steps; {descent.describe()}.",
        )


def _notes(descent: Descent) -> list[str]:
    if not descent.num_skipped:
        return descent.notes
    total = len(descent.losses) + descent.num_skipped
    return [
        *descent.notes,
        f"{descent.num_skipped} of {total} steps were skipped because the loss was not finite at "
        "their draws; the optimum is that of the others",
    ]


def _evaluate(loss: NoisyLoss) -> tuple[float, float]:
    """ELBO and its standard error at fresh draws; NaN where it has none.

    Minibatches are noisy, so there are more evaluations where the error is not small after a few.
    """
    values: list[float] = []
    elbo, elbo_se = math.nan, math.nan
    try:
        for tried in range(1, _MAX_EVALUATIONS + 1):
            value = loss.value()
            if value is not None:
                values.append(-value)
            if tried % _NUM_EVALUATIONS == 0 and len(values) >= tried / 2:
                estimates = torch.tensor(values, dtype=torch.float64)
                elbo, elbo_se = float(estimates.mean()), float(estimates.std()) / len(values) ** 0.5
                if elbo_se <= _SMALL_ERROR:
                    break
    except KeyboardInterrupt:  # with what there is
        pass
    return elbo, elbo_se
