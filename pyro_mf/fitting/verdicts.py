"""Verdicts on fits and on guides that something else trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyro_mf._errors import ModelError
from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.density import LogJoint
from pyro_mf.diagnostics.check import Check, Status
from pyro_mf.diagnostics.claim import Claim, claim_of_draws, claim_of_guide, claim_of_response
from pyro_mf.diagnostics.diagnose import DEFAULT_BUDGET, Known, judge
from pyro_mf.diagnostics.diagnosis import Diagnosis
from pyro_mf.diagnostics.errors import MAX_SD
from pyro_mf.diagnostics.full_data import on_full_data
from pyro_mf.diagnostics.importance import ImportanceResample, importance_resample
from pyro_mf.diagnostics.reference import Reference, Start, start_of_draws
from pyro_mf.diagnostics.verdict import DRAW_ANEW, LONG_RUN, OWN_DRAWS
from pyro_mf.fitting.problem import at_least
from pyro_mf.fitting.progress import ProgressBar
from pyro_mf.fitting.restarts import describe_modes

if TYPE_CHECKING:
    from pyro_mf.fitting.result import FitResult

_NUM_DRAWS = 20_000  # of the fit's own, for their covariance
_ENDINGS: dict[str, Status | None] = {
    "converged": None,
    "budget": "amber",
    "interrupted": "amber",
    "diverged": "red",
}


def diagnose(
    guide: Callable[..., Any],
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    max_gradients: int = DEFAULT_BUDGET,
    progress: bool | None = None,
) -> Diagnosis:
    """Judge a trained guide, whatever trained it: stock ``SVI``, or a loop of your own.

    Args:
        guide: The guide: one of ours, one of Pyro's autoguides, or a function.
        model: The model.
        model_args: Its positional arguments, with the full data.
        model_kwargs: Its keyword arguments.
        seed: Seed of everything random.
        max_gradients: Budget, in gradients of the log joint at 64 points each; at least 1.
        progress: As for :func:`~pyro_mf.fit`.

    Returns:
        The verdict; see :meth:`pyro_mf.FitResult.diagnose`.

    Raises:
        TypeError: If the guide cannot be called, or a number is no integer.
        ValueError: If a number is too small.
        GuideNotSetUpError: If the guide has never seen its model run.
        GuideMismatchError: If it is a guide of another model, or of data of another size.
        ModelError: If the model subsamples its data in a way that cannot be undone.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.guides import AutoMeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> guide = AutoMeanField(model)
        >>> _ = guide.setup(x)
        >>> guide.set_flat_params((torch.tensor([1.5]), torch.tensor([0.5])))  # the posterior
        >>> diagnose(guide, model, (x,)).status
        'green'
    """
    at_least("seed", seed, 0)
    at_least("max_gradients", max_gradients, 1)
    if isinstance(guide, type):
        raise TypeError(
            f"a trained guide was expected; got the class {guide.__name__}. Give the guide itself."
        )
    with torch.inference_mode(mode=False), torch.enable_grad(), forked_seed(seed):
        log_joint = full_density(model, model_args, model_kwargs)
        claim = claim_of_guide(guide, log_joint)
        with ProgressBar(shown=progress) as bar:
            return judge(
                log_joint,
                claim,
                Known(checks=_unjudged(guide)),
                seed=seed,
                max_gradients=max_gradients,
                report=bar.labelled("diagnosis"),
            )


def diagnose_result(
    result: FitResult,
    *,
    linear_response: bool = False,
    draws: bool = False,
    seed: int = 0,
    max_gradients: int = DEFAULT_BUDGET,
    progress: bool | None = None,
) -> Diagnosis:
    """See :meth:`pyro_mf.FitResult.diagnose`.

    Raises:
        ValueError: If both are asked for, or a number is too small.
    """
    at_least("seed", seed, 0)
    at_least("max_gradients", max_gradients, 1)
    if linear_response and draws:
        raise ValueError("linear_response and draws exclude each other. Choose one.")
    with torch.inference_mode(mode=False), torch.enable_grad(), forked_seed(seed):
        log_joint = _density(result)
        claim = _claim(result, log_joint, linear_response=linear_response, draws=draws)
        checks = _checks(result, is_mean_field=not linear_response)
        better = DRAW_ANEW
        if result.draws is not None:
            better = LONG_RUN if draws else OWN_DRAWS
        known = Known(_start(result), checks, _reference(result, seed), better)
        with ProgressBar(shown=progress) as bar:
            return judge(
                log_joint,
                claim,
                known,
                seed=seed,
                max_gradients=max_gradients,
                report=bar.labelled("diagnosis"),
            )


def importance_resample_result(
    result: FitResult,
    num_draws: int,
    *,
    linear_response: bool,
    num_proposals: int | None,
    seed: int,
) -> ImportanceResample:
    """See :meth:`pyro_mf.FitResult.importance_resample`.

    Raises:
        ValueError: If the guide has no density.
    """
    log_joint = _density(result)
    claim = _claim(result, log_joint, linear_response=linear_response, draws=False)
    if claim.proposal is None:
        raise ValueError("the guide's density is not known, so its draws have no weights.")
    return importance_resample(
        log_joint, claim.proposal, num_draws=num_draws, num_proposals=num_proposals, seed=seed
    )


def full_density(
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> LogJoint:
    """The density of a model on its full data, also where it subsamples them by a plate's indices.

    Raises:
        ModelError: If it takes its minibatches in any other way.
    """
    return LogJoint(on_full_data(model, model_args, model_kwargs), model_args, model_kwargs)


def _density(result: FitResult) -> LogJoint:
    try:
        return result.log_joint
    except ModelError:
        problem = result.problem
        return full_density(problem.model, problem.model_args, problem.model_kwargs)


def _claim(result: FitResult, log_joint: LogJoint, *, linear_response: bool, draws: bool) -> Claim:
    if linear_response:
        return claim_of_response(result.linear_response())
    if draws:
        return claim_of_draws(result.posterior_draws())
    return claim_of_guide(result.guide, log_joint)


def _unjudged(guide: Any) -> tuple[Check, ...]:
    """What the verdict does not cover: factors of discrete sites, which the density sums out."""
    names = [site.name for site in getattr(guide, "discrete_sites", ())]
    if not names:
        return ()
    text = f"the probabilities of {names} are not judged: the posterior's draws sum them out"
    advice = "hold them to an exact enumeration (pyro.infer.infer_discrete) where they matter"
    return (Check("discrete sites", "amber", text, advice),)


def _start(result: FitResult) -> Start | None:
    """A Gaussian near the posterior, if the fit has left one."""
    if result.draws is not None and not result.draws.problems:
        return start_of_draws(result.draws.sample(_NUM_DRAWS, seed=result.seed))
    if result.response is None or result.response.found is None:
        return None
    found = result.response.found
    return Start(found.loc.double().cpu(), found.scale_tril.double().cpu())


def _reference(result: FitResult, seed: int) -> Reference | None:
    """Draws of the posterior that another claim was judged by with this seed, if they passed."""
    made = [found.reference for found in result.verdicts.values() if found.seed == seed]
    return next((r for r in made if r is not None and not r.problems), None)


def _checks(result: FitResult, *, is_mean_field: bool) -> tuple[Check, ...]:
    """What the fit says of itself; it counts where nothing better is known."""
    checks = [_certificate(result), *_unjudged(result.guide)]
    modes = describe_modes(result.restarts, result.guide) if len(result.restarts) > 1 else None
    if len(result.restarts) > 1:
        text = f"{len(result.restarts)} starts, {modes or 'which agree'}"
        advice = "the result describes one mode: AutoMeanFieldMixture, or run_nuts(...)"
        status: Status | None = "amber" if modes else None
        checks.append(Check("restarts", status, text, advice if modes else "", is_standby=True))
    if is_mean_field and result.response is not None and result.response.found is not None:
        checks.append(_narrowness(result))
    return tuple(checks)


def _certificate(result: FitResult) -> Check:
    status = _ENDINGS[result.stop_reason]
    advice = "a larger max_gradients, or num_restarts=4, may reach the optimum" if status else ""
    text = f"{result.stop_reason}: {result.message}"
    is_standby = result.stop_reason != "diverged"
    return Check("solver", status, text, advice, is_standby=is_standby)


def _narrowness(result: FitResult) -> Check:
    """Linear response against mean field, which knows of dependence between latents."""
    scale = result.restarts[result.best].params[1]
    found = result.linear_response()
    ratio = found.sd / scale.to(found.sd)
    index = int(ratio.argmax())
    largest = float(ratio[index])
    name = result.layout.element_names()[index]
    text = (
        f"sds by linear response are {float(ratio.median()):.2f} times the mean field's (median), "
        f"at most {largest:.2f} times ('{name}')"
    )
    is_bad = largest > 1.0 / (1.0 - MAX_SD)
    advice = (
        "mean-field sds are too small: take sd_lr of summary() if diagnose(linear_response=True) "
        "is green, or fit(..., objective=ForwardKL())"
    )
    return Check(
        "linear response",
        "amber" if is_bad else None,
        text,
        advice if is_bad else "",
        {"largest_ratio": largest},
        is_standby=True,
    )
