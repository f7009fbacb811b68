"""Forward KL through Pyro's own handlers: wake-phase importance sampling for any model and guide.

For what has no density of one flat vector: discrete latents that the guide samples, a model inside
effect handlers, subsampled plates. The guide's draws are weighted against the model's density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, ModelError
from pyro_mf.density.checks import is_discrete
from pyro_mf.objectives.forward_estimators import normalised, seeded
from pyro_mf.objectives.forward_scoring import check_guide_sites, scored_trace

Fn = Callable[..., Any]


class _Scores(NamedTuple):
    """Log densities of one draw, each per element of the subsampled plates."""

    log_p: Tensor
    log_q: Tensor
    log_det: Tensor


class TracedImportance:
    r"""Self-normalised importance sampling of traces, drawn from the guide.

    Where plates are subsampled, and every site is inside them, the posterior is a product over the
    plates' elements. Each element then has weights of its own, and what a minibatch contributes is
    scaled up to the full plate: on average over minibatches that is the loss of the full data.

    Args:
        model: The model.
        guide: The guide.
        num_particles: Draws per step.
        generator: Source of all randomness.

    Attributes:
        log_weights: Log weights of the last step's draws, draws first.
        num_evaluations: Draws at which the model was run.
    """

    def __init__(
        self, model: Fn, guide: Fn, num_particles: int, generator: torch.Generator
    ) -> None:
        self.model = model
        self.guide = guide
        self._num_particles = num_particles
        self._generator = generator
        self.log_weights: Tensor | None = None
        self.num_evaluations = 0

    def loss(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The cross-entropy in nats, differentiable by all parameters.

        Raises:
            ModelError: If the guide cannot score values, or a subsampled plate leaves out a site.
            GuideMismatchError: If the guide's sites are not the model's.
            NonFiniteError: If every weight is zero.
            ValueError: What the model raises, if it does at every draw.
        """
        scale = 1.0
        runs: list[_Scores] = []
        failure: Exception | None = None
        nesting = None
        with seeded(self._generator), _pyro.substitute(_one_minibatch()):
            for _ in range(self._num_particles):
                guide_trace = self._guide_trace(args, kwargs)
                try:
                    if nesting is None:
                        nesting = _pyro.plate_nesting(self.model, guide_trace, args, kwargs)
                    scores, scale = _score(self.model, guide_trace, args, kwargs, nesting)
                except (GuideMismatchError, ModelError):
                    raise
                except (ValueError, RuntimeError) as error:  # no density there
                    failure = error
                    continue
                runs.append(scores)
        self.num_evaluations += self._num_particles
        if failure is not None and not runs:
            raise failure
        log_p, log_q, log_det = (torch.stack(terms) for terms in zip(*runs, strict=True))
        self.log_weights = (log_p - log_q).detach()
        weights = normalised(self.log_weights)
        loss = -_weighted_sum(weights, log_q + log_det)
        evidence = _weighted_sum(weights, log_p)  # its gradient is the wake-theta rule
        return scale * (loss - (evidence - evidence.detach()))

    def _guide_trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A draw without a gradient, scored with one."""
        with torch.no_grad():
            drawn = poutine.trace(self.guide).get_trace(*args, **kwargs)
        values = {name: node["value"] for name, node in latent_nodes(drawn).items()}
        return scored_trace(self.guide, values, args, kwargs)


def latent_nodes(trace: Any) -> dict[str, Any]:
    """The latent sites of a trace."""
    return {name: n for name, n in sample_nodes(trace).items() if not n["is_observed"]}


def sample_nodes(trace: Any) -> dict[str, Any]:
    """The sites of a trace that have a density."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not _pyro.is_subsample(node)
        and not _pyro.is_deterministic(node)
    }


def subsampled_plates(trace: Any) -> dict[str, Any]:
    """Plates of a model of which it visits only a part.

    Raises:
        ModelError: If some site is not inside all of them.
    """
    nodes = sample_nodes(trace)
    plates = {
        frame.name: frame
        for node in nodes.values()
        for frame in node["cond_indep_stack"]
        if frame.full_size not in {None, frame.size}
    }
    for plate in plates.values():
        outside = [
            name
            for name, node in nodes.items()
            if plate.name not in {f.name for f in node["cond_indep_stack"]}
        ]
        if outside or not plate.vectorized:
            raise ModelError(
                f"the model subsamples plate '{plate.name}', and forward KL needs draws from the "
                "posterior given all data. A minibatch gives those of latents inside the plate "
                "only, with every site of the model inside it (and the plate vectorised); "
                f"{outside or 'this one'} is not. Use the full data, or ReverseKL, which is "
                "unbiased on minibatches."
            )
    return plates


def minibatch_scale(plates: Mapping[str, Any]) -> float:
    """How many elements of the full plates an element of a minibatch stands for."""
    return float(math.prod(plate.full_size / plate.size for plate in plates.values()))


def log_det_jacobian(node: Any) -> Tensor:
    """Log Jacobian of a site's value by its unconstrained one, over its batch shape."""
    value = node["value"].detach()
    if is_discrete(node["fn"]):
        return torch.zeros(node["fn"].batch_shape)
    transform = biject_to(node["fn"].support)
    unconstrained = transform.inv(value)
    log_det = transform.log_abs_det_jacobian(unconstrained, value)
    batch_dim = value.dim() - node["fn"].event_dim
    return sum_rightmost(log_det, log_det.dim() - batch_dim)  # type: ignore[no-any-return]


def _score(
    model: Fn, guide_trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: int
) -> tuple[_Scores, float]:
    """Run the model at the guide's draw; the scores, and what an element stands for.

    Raises:
        ModelError: If there are discrete latents to sum out in a minibatch.
    """
    runnable = _pyro.enumerated(model, nesting)
    trace = poutine.trace(poutine.replay(runnable, trace=guide_trace)).get_trace(*args, **kwargs)
    latents = latent_nodes(trace)
    summed_out = [n for n in latents if n not in guide_trace and _pyro.is_enumerable(latents[n])]
    kept = {n: node for n, node in latents.items() if n not in summed_out}
    check_guide_sites(guide_trace, {n: node["value"].shape for n, node in kept.items()})
    plates = subsampled_plates(trace)
    scale = minibatch_scale(plates)
    dims = frozenset(plate.dim for plate in plates.values())
    trace.compute_log_prob()
    log_q = _per_element((n["log_prob"] for n in latent_nodes(guide_trace).values()), dims)
    log_det = _per_element((log_det_jacobian(n) for n in kept.values()), dims)
    if not summed_out:
        log_p = _per_element((n["log_prob"] for n in sample_nodes(trace).values()), dims)
    elif plates:
        raise ModelError(
            f"the model subsamples {list(plates)} and has discrete latents {summed_out} that the "
            "guide leaves out. Sample them in the guide, or use the full data."
        )
    else:
        log_p = _pyro.enumerated_log_prob(trace, nesting)
    return _Scores(log_p / scale, log_q / scale, log_det), scale


def _per_element(terms: Iterable[Tensor], dims: frozenset[int]) -> Tensor:
    """Sum each term over all dimensions but those of the subsampled plates, and then all terms."""
    total = torch.zeros(())
    for term in terms:
        over = tuple(d for d in range(-term.dim(), 0) if d not in dims)
        kept = term.sum(over) if over else term
        total = total + kept
    return total


def _weighted_sum(weights: Tensor, terms: Tensor) -> Tensor:
    # A term without weight may be infinite.
    return (weights * torch.where(weights > 0, terms, 0.0)).sum()


def _one_minibatch() -> Callable[[Any], None]:
    """A hook that gives all runs of guide and model the indices that the first one drew."""
    found: dict[str, Any] = {}

    def share(msg: Any) -> None:
        if not _pyro.is_subsample(msg):
            return
        if msg["value"] is None and msg["name"] not in found:
            msg["value"] = msg["fn"]()
        found.setdefault(msg["name"], msg["value"])
        msg["value"], msg["done"] = found[msg["name"]], True

    return share
