"""The sleep phase: forward KL on data that the model itself makes, for amortised guides.

Pairs of latents and data from the model's joint distribution are exact draws from the posterior of
that data, so there is no Markov chain and no weight. What is fitted is the guide's map from data to
posterior, on average over data that the model expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.checks import headline, is_data
from pyro_mf.guides.protocol import is_factorised
from pyro_mf.objectives.forward_estimators import seeded
from pyro_mf.objectives.forward_scoring import check_guide_sites, scored_trace
from pyro_mf.objectives.forward_traced import (
    latent_nodes,
    log_det_jacobian,
    minibatch_scale,
    sample_nodes,
    subsampled_plates,
)

Fn = Callable[..., Any]

_KEYWORD = "observations"


class Simulation:
    """Latents and data from the model, and the guide's log density of the one given the other.

    The guide gets the simulated data in one of two ways. If it has a parameter ``observations``,
    a dictionary from the observed sites' names to their values is passed there, as Pyro's
    ``CSIS`` and ``ReweightedWakeSleep`` do. Else each observed site's data must be one of the
    arguments as it is (``obs=x``), and the guide is called with the simulated value in its place.

    Args:
        model: The model.
        guide: The guide.
        num_particles: Simulated data sets per step.
        generator: Source of all randomness.

    Attributes:
        num_evaluations: Data sets simulated so far.
    """

    def __init__(
        self, model: Fn, guide: Fn, num_particles: int, generator: torch.Generator
    ) -> None:
        self.model = model
        self.guide = guide
        self._num_particles = num_particles
        self._generator = generator
        self._checked: list[Any] = []
        self.num_evaluations = 0
        if is_factorised(guide):
            raise ModelError(
                "estimator='prior' is for guides that compute their parameters from the data; "
                f"those of {type(guide).__name__} do not depend on it, so it would be fitted to "
                "the prior. Use another estimator, such as 'hmc'."
            )

    def loss(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The cross-entropy in nats, averaged over simulated data, differentiable.

        Raises:
            ModelError: If the model cannot make data, or the guide cannot be given them.
            GuideMismatchError: If the guide's sites are not the model's.
        """
        terms = []
        with seeded(self._generator):
            routes = self._routes(args, kwargs)
            for _ in range(self._num_particles):
                trace = simulate(self.model, args, kwargs)
                terms.append(self._log_prob(trace, routes, args, kwargs))
        self.num_evaluations += self._num_particles
        return -torch.stack(terms).mean()

    def _log_prob(
        self, trace: Any, routes: dict[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        latents = latents_of(trace)
        values = {name: node["value"] for name, node in latents.items()}
        # The guide visits the elements of subsampled plates that the model did.
        values |= {n: x["value"] for n, x in trace.nodes.items() if _pyro.is_subsample(x)}
        data = {name: node["value"] for name, node in simulated(trace).items()}
        args, kwargs = self._with_data(data, routes, args, kwargs)
        scored = scored_trace(self.guide, values, args, kwargs)
        # A discrete latent that the guide leaves out is integrated out by simulating it.
        kept = {n: x for n, x in latents.items() if n in scored or not _pyro.is_enumerable(x)}
        check_guide_sites(scored, {n: node["value"].shape for n, node in kept.items()})
        log_q = sum(node["log_prob_sum"] for node in latent_nodes(scored).values())
        scale = minibatch_scale(subsampled_plates(trace))
        log_det = sum(log_det_jacobian(node).sum() for node in kept.values())
        return torch.as_tensor(log_q + scale * log_det)

    def _with_data(
        self,
        data: Mapping[str, Tensor],
        routes: dict[str, int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with simulated data in place of the observed."""
        if not routes:
            return args, {**kwargs, _KEYWORD: dict(data)}
        leaves, tree = tree_flatten((args, dict(kwargs)))
        for name, position in routes.items():
            leaves[position] = data[name].to(leaves[position].dtype)
        return tree_unflatten(leaves, tree)  # type: ignore[no-any-return]

    def _routes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
        """Which argument holds each observed site's data; empty if ``observations`` does.

        Raises:
            ModelError: If neither way is open, or the model uses the data besides observing them.
        """
        takes_keyword = _KEYWORD in kwargs or _takes(self.guide, _KEYWORD)
        trace = _run(self.model, args, kwargs)
        observed = {n: node for n, node in trace.nodes.items() if is_data(node)}
        leaves = tree_flatten((args, dict(kwargs)))[0]
        routes: dict[str, int] = {}
        for name, node in observed.items():
            held = [i for i, leaf in enumerate(leaves) if leaf is node["value"]]
            if len(held) == 1 and held[0] not in routes.values():
                routes[name] = held[0]
            elif not takes_keyword:
                raise ModelError(
                    f"the data of observed site '{name}' are not one of the arguments as it is "
                    "(obs=x for an argument x of its own), so the guide cannot be called with "
                    "simulated data in their place. Pass them so, or give the guide a parameter "
                    "'observations': it is called with a dictionary of simulated data by site."
                )
        self._check_generative(routes, args, kwargs)
        return {} if takes_keyword else routes

    def _check_generative(
        self, routes: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Check, once, that the model makes its data, and reads them nowhere else.

        Raises:
            ModelError: If it does not.
        """
        if self._checked == [routes]:
            return
        trace = simulate(self.model, args, kwargs)
        _check_simulation(trace)
        leaves, tree = tree_flatten((args, dict(kwargs)))
        for name, position in routes.items():
            leaves[position] = trace.nodes[name]["value"].to(leaves[position].dtype)
        other_args, other_kwargs = tree_unflatten(leaves, tree)
        with torch.no_grad(), poutine.block():
            again = poutine.replay(poutine.uncondition(self.model), trace=trace)
            other = poutine.trace(again).get_trace(*other_args, **other_kwargs)
        trace.compute_log_prob()
        other.compute_log_prob()
        for name, node in sample_nodes(trace).items():
            same = name in other.nodes and torch.allclose(
                node["log_prob"], other.nodes[name]["log_prob"], equal_nan=True
            )
            if not same:
                raise ModelError(
                    f"the distribution of site '{name}' depends on the data that are given, so "
                    "data simulated from the model are not draws from its joint distribution. Let "
                    "the model read its data in obs= alone; what comes later in a sequence can use "
                    "the value that pyro.sample returned."
                )
        self._checked = [dict(routes)]


def simulate(model: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A trace of the model with its observed sites sampled.

    Raises:
        ModelError: If a site cannot be sampled, or the model fails at a draw from its prior.
    """
    return _run(poutine.uncondition(model), args, kwargs)


def simulated(trace: Any) -> dict[str, Any]:
    """The sites of a simulation that are observed in the model."""
    return {n: x for n, x in sample_nodes(trace).items() if "was_observed" in x["infer"]}


def latents_of(trace: Any) -> dict[str, Any]:
    """The sites of a simulation that are latent in the model."""
    return {n: x for n, x in sample_nodes(trace).items() if "was_observed" not in x["infer"]}


def _run(model: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad(), poutine.block():
            return poutine.trace(model).get_trace(*args, **kwargs)
    except NotImplementedError as error:
        raise ModelError(
            f"estimator='prior' draws latents and data from the model, which has a site that "
            f"cannot be sampled: {headline(error)}. Give every latent a proper prior."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"the model fails at latents and data drawn from it: {headline(error)}."
        ) from error


def _check_simulation(trace: Any) -> None:
    params = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "param" and _pyro.param_leaf(node).requires_grad
    ]
    if params:
        raise ModelError(
            f"estimator='prior' learns nothing about the model's parameters {params}: its data "
            "are the model's own. Train them with another objective, and give this one the model "
            'without them: poutine.block(model, hide_types=["param"]).'
        )
    scale = minibatch_scale(subsampled_plates(trace))
    for name, node in sample_nodes(trace).items():
        reason = None
        if _pyro.is_factor(node):
            reason = "is a pyro.factor, which makes no data"
        elif node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all()):
            reason = "is masked, so the guide would see data that are missing"
        elif not bool((torch.as_tensor(node["scale"]) == scale).all()):
            reason = "is under poutine.scale, so its density is not the one that it is drawn from"
        if reason is not None:
            raise ModelError(
                f"estimator='prior' needs a model that makes its data: site '{name}' {reason}."
            )


def _takes(guide: Fn, name: str) -> bool:
    target = guide.forward if isinstance(guide, torch.nn.Module) else guide
    return name in inspect.signature(target).parameters
