"""``solve_coordinates``: guides of discrete factors only, one exact update after another."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import (
    GuideMismatchError,
    ModelError,
    NonFiniteError,
    ScoreGradientWarning,
)
from pyro_mf._pyro import Packed
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.objectives.discrete import make_plan
from pyro_mf.objectives.enumeration import EnumeratedJoint, enumerate_joint
from pyro_mf.solvers.outcome import Outcome, Progress, Report, StopReason, silent

LEAST_LOG_PROB = -1e4  # of values that are impossible; their probability is zero in any precision


@torch.no_grad()
def solve_coordinates(
    model: Callable[..., Any],
    guide: DiscreteGuide,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    max_sweeps: int = 10_000,
    tolerance: float = 1e-9,
    report: Report = silent,
) -> Outcome:
    r"""Maximise the ELBO over discrete factors by coordinate ascent, exactly and without steps.

    Each factor in turn is set to its optimum given the others,
    :math:`q(k) \propto \exp \mathbb{E}_{q(-k)} \log p(x, k, \cdot)`, all elements of a plate at
    once. The ELBO never falls. Like every mean-field optimum the end is a local one: it depends on
    the guide's own start, and a start that is symmetric in labels that can be swapped stays so.

    Args:
        model: A Pyro model whose latents are all discrete, on its full data.
        guide: A guide with a factor for some or all of them; the others are summed out.
        model_args: Positional arguments of model and guide.
        model_kwargs: Keyword arguments of model and guide.
        max_sweeps: Most updates of every factor.
        tolerance: Largest change of a probability in the last sweep.
        report: Called after every sweep with the progress.

    Returns:
        Why it stopped and what it reached. The ELBO is exact.

    Raises:
        GuideMismatchError: If the guide has continuous sites, or no discrete factors.
        ModelError: If the values cannot be summed over.
        NonFiniteError: If every value of a site is impossible at those that the others may take.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model(x):
        ...     is_cat = pyro.sample("is_cat", dist.Bernoulli(1 / 3))
        ...     pyro.sample("x", dist.Normal(is_cat, 1.0), obs=x)
        >>> guide = AutoMeanField(model, "bernoulli")
        >>> outcome = solve_coordinates(model, guide, (torch.tensor(0.5),))
        >>> guide.probs("is_cat").detach()  # x speaks for neither
        tensor([0.6667, 0.3333])
    """
    begin = time.perf_counter()
    joint, probs = _enumerate(model, guide, model_args, dict(model_kwargs or {}))
    losses: list[float] = []
    reason: StopReason = "budget"
    message = f"max_sweeps={max_sweeps} sweeps are used up; raise max_sweeps."
    log_probs: dict[str, Packed] = {}
    try:
        for sweep in range(1, max_sweeps + 1):
            change = update_all(joint, probs, log_probs)
            losses.append(-_elbo(joint, probs, log_probs))
            report(Progress("coordinate ascent", sweep, -losses[-1], 0.0))
            if change <= tolerance:
                reason = "converged"
                message = f"after {sweep} sweeps no probability changed by more than {change:.1g}."
                break
    except KeyboardInterrupt:
        reason, message = "interrupted", f"interrupted after {len(losses)} sweeps."
    write_factors(guide, joint.nodes, log_probs)
    return Outcome(
        elbo=-losses[-1] if losses else math.nan,
        elbo_se=0.0,
        stop_reason=reason,
        message=message,
        losses=tuple(losses),
        num_gradients=len(losses),
        seconds={"optimise": time.perf_counter() - begin},
        refusal="there are no continuous latents",
    )


def _enumerate(
    model: Callable[..., Any], guide: DiscreteGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[EnumeratedJoint, dict[str, Packed]]:
    """The model's log joint by the values of all factors, and the factors' probabilities.

    Raises:
        GuideMismatchError: If the guide has continuous sites, or no discrete factors.
        ModelError: If the values cannot be summed over.
    """
    guide.setup(*args, **kwargs)
    if guide.layout.sites or not guide.discrete_sites:
        raise GuideMismatchError(
            "coordinate ascent is for guides that have factors of discrete sites only; this one "
            f"has continuous sites {[s.name for s in guide.layout.sites]} and discrete ones "
            f"{[s.name for s in guide.discrete_sites]}. Use ReverseKL with SVI or fit."
        )
    plan = make_plan(model, guide, args, kwargs, math.inf)
    if plan.drawn:
        name, why = next(iter(plan.drawn.items()))
        raise ModelError(
            f"coordinate ascent sums over the values of every site, and '{name}' cannot be summed "
            f"over: {why}. Use ReverseKL with SVI or fit, which draw it."
        )
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nesting = int(plan.nesting)
    joint = enumerate_joint(model, trace, args, kwargs, nesting, kept=plan.enumerated)
    if any(node["scale"] != 1.0 for node in joint.nodes.values()):
        raise ModelError(
            "coordinate ascent needs the full data, and the model subsamples or scales the plate "
            f"around '{next(iter(joint.nodes.values()))['name']}'. Use ReverseKL with SVI or fit."
        )
    return joint, joint.probs({name: trace.nodes[name]["fn"] for name in plan.enumerated})


def why_not_summed(
    model: Callable[..., Any], guide: DiscreteGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why the values of a guide's discrete sites cannot be summed over; ``None`` if they can.

    Args:
        model: The model, with its full data.
        guide: A guide with discrete factors, set up.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreGradientWarning)  # that is for who draws them
        plan = make_plan(model, guide, args, kwargs, math.inf)
    if plan.drawn:
        name, why = next(iter(plan.drawn.items()))
        return f"discrete site '{name}' cannot be summed over: {why}"
    with torch.no_grad(), poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        nodes = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs).nodes
    scaled = [name for name in plan.enumerated if nodes[name]["scale"] != 1.0]
    if scaled:
        return f"the model subsamples or scales the plate around '{scaled[0]}'"
    return None


def update_all(
    joint: EnumeratedJoint, probs: dict[str, Packed], log_probs: dict[str, Packed]
) -> float:
    """Set every factor in turn to its optimum given the others.

    Args:
        joint: The log joint by the values of all factors.
        probs: The factors' probabilities, changed in place.
        log_probs: Where their logarithms are put.

    Returns:
        The largest change of a probability.

    Raises:
        NonFiniteError: If all of a site's values are impossible.
    """
    change = 0.0
    for symbol in joint.nodes:
        log_probs[symbol] = _update(joint, symbol, probs)
        updated = Packed(log_probs[symbol].value.exp(), log_probs[symbol].dims)
        change = max(change, float((updated.value - probs[symbol].value).abs().max()))
        probs[symbol] = updated
    return change


def entropy_of(probs: Mapping[str, Packed], log_probs: Mapping[str, Packed]) -> Tensor:
    """Entropy of all factors, in nats."""
    return torch.stack([-(probs[s].value * log_probs[s].value).sum() for s in log_probs]).sum()


def write_factors(
    guide: DiscreteGuide, nodes: Mapping[str, Any], log_probs: Mapping[str, Packed]
) -> None:
    """Write factors into a guide.

    Args:
        guide: The guide, set up.
        nodes: The enumerated sites of the model's trace, by symbol.
        log_probs: Log probabilities of their values, by symbol.
    """
    batch_dims = {site.name: len(site.shape) for site in guide.discrete_sites}
    for symbol, new in log_probs.items():
        node = nodes[symbol]
        name = node["name"]
        guide.set_log_probs(name, _values_last(new, node, batch_dims[name]))


def _update(joint: EnumeratedJoint, symbol: str, probs: Mapping[str, Packed]) -> Packed:
    """Log probabilities of one site at its optimum given the others.

    Raises:
        NonFiniteError: If all of its values are impossible.
    """
    expected = joint.conditional(symbol, probs)
    if symbol not in expected.dims:  # a site of one value
        return Packed(torch.zeros_like(expected.value), expected.dims)
    log_probs = expected.value.log_softmax(expected.dims.index(symbol))
    if bool(torch.isnan(log_probs).any()):
        name = joint.nodes[symbol]["name"]
        raise NonFiniteError(
            f"every value of '{name}' is impossible at some of those that the other sites may "
            "take: independent factors cannot keep to a rule that ties sites together. Leave "
            f"'{name}' out of family to have it summed out, or give impossible values a small "
            "probability."
        )
    return Packed(log_probs.clamp_min(LEAST_LOG_PROB), expected.dims)


def _elbo(
    joint: EnumeratedJoint, probs: Mapping[str, Packed], log_probs: Mapping[str, Packed]
) -> float:
    return float(joint.expectation(probs) + entropy_of(probs, log_probs))


def _values_last(log_probs: Packed, node: Any, batch_dim: int) -> Tensor:
    """A packed tensor in the plates of its site, then the site's values."""
    value, dim = _pyro.unpack_like(log_probs, node), _pyro.enumerated_dim(node) or -1
    value = value.reshape((1,) * max(0, -dim - value.dim()) + value.shape).movedim(dim, -1)
    return value.reshape(value.shape[value.dim() - 1 - batch_dim :])
