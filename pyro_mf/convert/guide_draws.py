"""Draws of any guide on the unconstrained space, with their log density where it can be known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, GuideNotSetUpError
from pyro_mf.convert.vectorise import forked_seed, run_many
from pyro_mf.density.sites import Layout
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.guides.protocol import FactorisedGuide


@dataclass(frozen=True)
class GuideDraws:
    """Draws of a guide.

    Args:
        z: Shape ``(S, D)``, in the layout asked for.
        log_q: Log density on the unconstrained space, nats, shape ``(S,)``, or ``None``.
        why_no_log_q: The reason where ``log_q`` is ``None``, else empty.
        discrete: Draws of the discrete sites that have factors, shapes ``(S, *shape)``; ``log_q``
            is about these, too.
    """

    z: Tensor
    log_q: Tensor | None
    why_no_log_q: str
    discrete: dict[str, Tensor] = field(default_factory=dict)


def check_ready(guide: Any) -> None:
    """Raise an error for what is no guide, or has not been trained.

    Raises:
        TypeError: If ``guide`` cannot be called.
        GuideNotSetUpError: If it has not seen its model run.
    """
    if not callable(guide):
        raise TypeError(
            f"a guide must be callable; got {type(guide).__name__}. Give the guide itself, not its "
            "parameters or the SVI object."
        )
    ready = getattr(guide, "is_set_up", getattr(guide, "prototype_trace", True) is not None)
    if not ready:
        raise GuideNotSetUpError(
            f"the guide ({type(guide).__name__}) has not seen its model run, so it has nothing to "
            "convert. Train it, or load its state and call it once with the model's arguments."
        )


def is_factorised(guide: Any) -> TypeGuard[FactorisedGuide]:
    """Whether a guide has flat parameters, as ours have."""
    # Not isinstance: on Python 3.11 it reads every attribute, and an unpickled guide has no model.
    return hasattr(guide, "sample_unconstrained") and hasattr(guide, "flat_params")


def draw_guide(
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    num: int,
    seed: int,
) -> GuideDraws:
    """Draw from a guide of ours (exactly, from its flat parameters) or any other (by running it).

    Args:
        guide: The guide.
        args: The model's positional arguments.
        kwargs: The model's keyword arguments.
        layout: The latent sites of the model at these arguments.
        num: Number of draws S.
        seed: Seed of the draws.
    """
    if is_factorised(guide):
        return _draw_factorised(guide, layout, num, seed)
    return _draw_by_running(guide, args, kwargs, layout, num, seed)


def _draw_factorised(guide: FactorisedGuide, layout: Layout, num: int, seed: int) -> GuideDraws:
    own = {site.name: site.unconstrained_shape for site in guide.layout.sites}
    expected = {site.name: site.unconstrained_shape for site in layout.sites}
    if own != expected:
        raise GuideMismatchError(
            f"the guide has latent sites {_shapes(own)} and the model, at these arguments, "
            f"{_shapes(expected)} (unconstrained shapes). Give the model and the full data that "
            "the guide was made for."
        )
    with forked_seed(seed), torch.no_grad():
        z = guide.sample_unconstrained(num)
        log_q = guide.log_prob_unconstrained(z)
        discrete = {}
        if isinstance(guide, DiscreteGuide) and guide.discrete_sites:
            discrete = guide.sample_discrete(num)
            log_q = log_q + guide.log_prob_discrete(discrete)
    if layout.sites:
        z = layout.pack(guide.layout.unpack(z))
    return GuideDraws(z, log_q, "", discrete)


def _draw_by_running(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    num: int,
    seed: int,
) -> GuideDraws:
    def trace() -> dict[str, Any]:
        nodes: Mapping[str, Any] = poutine.trace(guide).get_trace(*args, **kwargs).nodes
        return {
            name: node
            for name, node in nodes.items()
            if node["type"] == "sample" and not node["is_observed"] and not _pyro.is_subsample(node)
        }

    with forked_seed(seed), torch.no_grad(), poutine.block():
        nodes = trace()
    _check_sites(nodes, layout)
    why = _why_no_density(guide, nodes, layout)

    def run(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = trace()
        values = {site.name: found[site.name]["value"] for site in layout.sites}
        if not why:
            parts = [node["fn"].log_prob(node["value"]).sum() for node in found.values()]
            values["log_q"] = torch.stack(parts).sum()
        return {f"site {n}" if n != "log_q" else n: v for n, v in values.items()}

    draws = run_many(run, num, {}, seed=seed)
    values = {site.name: draws[f"site {site.name}"] for site in layout.sites}
    z = layout.unconstrain(values)
    if why:
        return GuideDraws(z, None, why)
    log_det = sum(
        site.log_abs_det(u, values[site.name]).reshape(num, -1).sum(1)
        for site, u in ((site, layout.unpack(z)[site.name]) for site in layout.sites)
    )
    return GuideDraws(z, draws["log_q"] + log_det, "")


def _check_sites(nodes: Mapping[str, Any], layout: Layout) -> None:
    missing = [site.name for site in layout.sites if site.name not in nodes]
    if missing:
        raise GuideMismatchError(
            f"the guide does not sample the model's latent sites {missing}; it samples "
            f"{sorted(nodes)}. Give the model that the guide was made for."
        )
    for site in layout.sites:
        shape = nodes[site.name]["value"].shape
        if shape != site.shape:
            raise GuideMismatchError(
                f"the guide's '{site.name}' has shape {tuple(shape)} and the model's "
                f"{tuple(site.shape)}. Give model and guide the same full data; a guide that was "
                "made for a minibatch cannot be converted."
            )


def _why_no_density(guide: Any, nodes: Mapping[str, Any], layout: Layout) -> str:
    """Why the sum of the guide's log probabilities is not the density of the latents, or ``""``.

    It is where the guide scores every latent itself, and where, as in Pyro's autoguides, auxiliary
    draws are mapped one to one to latents that appear as points carrying the Jacobian.
    """
    latents = {site.name: site for site in layout.sites}
    extra = {name: node for name, node in nodes.items() if name not in latents}
    points = [s for s in layout.sites if isinstance(_base(nodes[s.name]["fn"]), Delta)]
    free = sum(node["value"].numel() for node in extra.values())
    fixed = [name for name, node in extra.items() if isinstance(_base(node["fn"]), Delta)]
    if points and (fixed or not extra):
        return f"the guide puts '{(fixed or [points[0].name])[0]}' on a point, without a density"
    if free != sum(site.size for site in points):
        return (
            f"the guide has auxiliary draws {sorted(extra)} that are not mapped one to one to "
            "latents, so the density of the latents alone is unknown"
        )
    if extra and not isinstance(guide, AutoGuide):
        return (
            f"the guide is hand-written with auxiliary draws {sorted(extra)}, whose Jacobian is "
            "nobody's promise"
        )
    if any(nodes[name]["scale"] != 1.0 for name in nodes):
        return "the guide scales its log probabilities, as it does on a subsample"
    return ""


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _shapes(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}
