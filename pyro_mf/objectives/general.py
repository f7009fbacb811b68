"""The general road: the ELBO of any Pyro model and guide, through Pyro's own handlers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, ModelError, NonFiniteError
from pyro_mf.density.tracing import TracingMode
from pyro_mf.objectives.discrete import Plan
from pyro_mf.objectives.entropy import EntropyEstimator
from pyro_mf.objectives.enumeration import Fn, enumerate_joint
from pyro_mf.objectives.non_finite import LinAlgError


class Draw(NamedTuple):
    """One draw's estimate of the ELBO.

    Args:
        elbo: The estimate, differentiable; by what is drawn without a pathwise gradient it is not.
        log_joint: The part of it that depends on draws.
        log_score: Log probability of what is drawn without a pathwise gradient; zero if nothing is.
    """

    elbo: Tensor
    log_joint: Tensor
    log_score: Tensor


def traced_elbo(
    model: Fn,
    guide: Fn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    entropy: EntropyEstimator,
    max_plate_nesting: float,
) -> Tensor:
    """One draw's estimate of the ELBO, differentiable.

    Discrete latents of the model that the guide leaves out are summed out.

    Raises:
        GuideMismatchError: If a continuous latent of the model has no site in the guide.
        ModelError: If the guide has a site without reparameterised draws.
        NonFiniteError: If some site's log probability is not finite.
        ValueError: What Pyro's own validation finds.
    """
    plan = Plan(nesting=max_plate_nesting)
    return traced_draw(model, guide, args, kwargs, entropy, plan).elbo


def traced_draw(
    model: Fn,
    guide: Fn,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    entropy: EntropyEstimator,
    plan: Plan,
) -> Draw:
    """The same of a guide some of whose discrete sites are known to be independent factors.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        entropy: Estimator of the entropy of continuous sites; of discrete ones it is exact.
        plan: What is done with the guide's discrete sites.

    Raises:
        GuideMismatchError: If a continuous latent of the model has no site in the guide.
        ModelError: If the guide has another site without reparameterised draws.
        NonFiniteError: If some site's log probability is not finite.
        ValueError: What Pyro's own validation finds.
    """

    def estimate() -> Draw:
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        nesting = plan.nesting
        if math.isinf(nesting):
            nesting = _pyro.plate_nesting(model, trace, args, kwargs)
        kept = plan.enumerated
        joint = enumerate_joint(model, trace, args, kwargs, int(nesting), kept=kept)
        factors: Any = {name: trace.nodes[name]["fn"] for name in kept}
        log_joint = joint.expectation(joint.probs(factors))
        drawn: list[Any] = [trace.nodes[name] for name in plan.drawn]
        scores = [node["fn"].log_prob(node["value"]).sum() for node in drawn]
        elbo = log_joint + _entropy(guide, trace, args, kwargs, entropy, plan.sites)
        return Draw(elbo, log_joint, torch.stack(scores).sum() if scores else torch.zeros(()))

    try:
        return estimate()
    except (GuideMismatchError, ModelError):
        raise
    except ValueError:
        # Validation stops at the first NaN it meets, with a distribution's name; the site that made
        # it is found without.
        with pyro.validation_enabled(False), contextlib.suppress(LinAlgError):
            estimate()
        raise


def _entropy(
    guide: Fn,
    trace: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    entropy: EntropyEstimator,
    discrete: frozenset[str],
) -> Tensor:
    nodes = _stochastic(trace)
    exact = [_site_entropy(nodes.pop(name), closed_form=True) for name in sorted(discrete)]
    for name, node in nodes.items():
        if not (node["fn"].has_rsample or is_point(node["fn"])):
            raise ModelError(
                f"guide site '{name}' ({type(node['fn']).__name__}) has no reparameterised draws, "
                "which ReverseKL's gradient needs. Leave a discrete site out of the guide to have "
                "it summed out, give it to an AutoMeanField (family={...: 'categorical'}), or use "
                "pyro.infer.TraceGraph_ELBO."
            )
    if entropy.detaches_params:
        # Log q again at the same draws, the guide's parameters detached: only the draws carry
        # gradient, also through the parameters that depend on earlier draws.
        leaves = {
            name: _pyro.param_leaf(node)
            for name, node in trace.nodes.items()
            if node["type"] == "param"
        }
        values = tuple(leaf.detach() for leaf in leaves.values())
        with TracingMode(leaves, values, ()), poutine.block():
            trace = poutine.trace(poutine.replay(guide, trace=trace)).get_trace(*args, **kwargs)
        nodes = {name: trace.nodes[name] for name in nodes}
    trace.compute_log_prob()
    _check_finite(trace)
    terms = [_site_entropy(node, closed_form=entropy.uses_closed_form) for node in nodes.values()]
    terms += exact
    return torch.stack([torch.as_tensor(t) for t in terms]).sum() if terms else torch.zeros(())


def _site_entropy(node: Any, *, closed_form: bool) -> Tensor:
    exact = _exact_entropy(node["fn"], node["value"]) if closed_form else None
    if exact is None:
        return -node["log_prob_sum"]  # type: ignore[no-any-return]
    return _pyro.scaled_and_masked(exact, node).sum()


def _exact_entropy(fn: Any, value: Tensor) -> Tensor | None:
    """Entropy in closed form, up to the Jacobian of a transform, which is taken at the draw."""
    if isinstance(fn, torch.distributions.TransformedDistribution):
        log_det: Tensor | float = 0.0
        event_dim = len(fn.event_shape)
        for transform in reversed(fn.transforms):
            before = transform.inv(value)
            step = transform.log_abs_det_jacobian(before, value)
            log_det = log_det + sum_rightmost(step, step.dim() - (value.dim() - event_dim))
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
            value = before
        base = _exact_entropy(fn.base_dist, value)
        if base is None:
            return None
        return sum_rightmost(base, base.dim() - len(fn.batch_shape)) + log_det  # type: ignore[no-any-return]
    if is_point(fn):
        return None
    try:
        return fn.entropy()  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


def is_point(fn: Any) -> bool:
    """Whether a distribution is a Delta, or one pushed through transforms."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, pyro.distributions.Delta)


def _stochastic(trace: Any) -> dict[str, Any]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _pyro.is_subsample(node)
    }


def _check_finite(trace: Any) -> None:
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and not bool(torch.isfinite(node["log_prob_sum"]).all()):
            raise NonFiniteError(
                f"the log probability of site '{name}' is {node['log_prob_sum'].sum().item()}. "
                "Parameters keep their last finite values. Try a smaller step or another start."
            )
