"""Log q of a guide at values that it did not draw, on the unconstrained space.

Forward KL needs nothing else of a guide: to be drawn from, and to score any value. Both scorers
here mean the same; the flat one asks a factorised guide for its density as a pure function, the
traced one runs any guide under Pyro's handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, ModelError
from pyro_mf.density.sites import Layout
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.objectives.general import is_point

Fn = Callable[..., Any]


class Scorer(Protocol):
    """A guide at one set of arguments, over flat unconstrained vectors."""

    def sample(self, num_draws: int) -> Tensor:
        """Draws, shape ``(num_draws, D)``, float64 on the CPU, without a gradient."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at each row of ``(S, D)``, shape ``(S,)``, differentiable by parameters."""
        ...


class FlatScorer:
    """A factorised guide.

    Args:
        guide: The guide, set up for these arguments.
        layout: The model's latent sites.

    Raises:
        GuideMismatchError: If the guide was built for another model.
    """

    def __init__(self, guide: FactorisedGuide, layout: Layout) -> None:
        check_same_sites(layout, guide.layout)
        self._guide = guide

    @torch.no_grad()
    def sample(self, num_draws: int) -> Tensor:
        """See :class:`Scorer`."""
        return self._guide.sample_unconstrained(num_draws).to("cpu", torch.float64)

    def log_prob(self, z: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        like = self._guide.flat_leaves()[0]
        return self._guide.log_prob_unconstrained(z.to(like)).to("cpu", torch.float64)

    @torch.no_grad()
    def spread(self) -> tuple[Tensor, Tensor]:
        """Median and scale of each factor, shape ``(D,)``."""
        params = self._guide.flat_params()
        p = torch.tensor([[0.1587], [0.5], [0.8413]], device=params[0].device)
        low, middle, high = self._guide.family.quantile(params, p).to("cpu", torch.float64)
        return middle, 0.5 * (high - low)


class TracedScorer:
    """Any guide that samples each latent of the model, under its own name.

    Args:
        guide: The guide.
        layout: The model's latent sites.
        args: Positional arguments of model and guide.
        kwargs: Keyword arguments.
        like: A tensor with the dtype and device of the model's latents.

    Raises:
        GuideMismatchError: If the guide's sites are not the model's.
        ModelError: If the guide cannot score given values.
    """

    def __init__(
        self,
        guide: Fn,
        layout: Layout,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        self._guide = guide
        self._layout = layout
        self._args = args
        self._kwargs = dict(kwargs)
        self._like = like
        with torch.no_grad():
            trace = poutine.trace(guide).get_trace(*args, **self._kwargs)
        check_guide_sites(trace, {site.name: site.shape for site in layout.sites})

    @torch.no_grad()
    def sample(self, num_draws: int) -> Tensor:
        """See :class:`Scorer`."""
        rows = []
        for _ in range(num_draws):
            trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
            values: Any = {
                site.name: trace.nodes[site.name]["value"] for site in self._layout.sites
            }
            rows.append(self._layout.unconstrain(values))
        return torch.stack(rows).to("cpu", torch.float64)

    def log_prob(self, z: Tensor) -> Tensor:
        """See :class:`Scorer`."""
        return torch.stack([self._log_prob(row) for row in z]).to("cpu", torch.float64)

    def _log_prob(self, row: Tensor) -> Tensor:
        row = row.to(self._like)
        values = self._layout.constrain(row)
        trace = scored_trace(self._guide, values, self._args, self._kwargs)
        unconstrained = self._layout.unpack(row)
        total = row.new_zeros(())
        for site in self._layout.sites:
            log_det = site.log_abs_det(unconstrained[site.name], values[site.name])
            total = total + trace.nodes[site.name]["log_prob_sum"] + log_det.sum()
        return total


def scored_trace(
    guide: Fn,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """A trace of the guide at given values, every ``log_prob`` computed.

    Args:
        guide: The guide.
        values: By site, in the model's space.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def put(msg: Any) -> None:
        if msg["name"] in values and not msg["is_observed"]:
            msg["value"], msg["done"] = values[msg["name"]], True

    with _pyro.substitute(put):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def check_guide_sites(trace: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Raise unless a guide's trace shows one site, that can be scored, per latent of the model.

    Args:
        trace: A trace of the guide.
        shapes: Shape of each latent of the model.

    Raises:
        GuideMismatchError: If a site is missing, surplus or of another shape.
        ModelError: If a site has no density: a Delta, or a value made from an auxiliary site.
    """
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not _pyro.is_subsample(node)
    }
    for name, node in nodes.items():
        if name in shapes and is_point(node["fn"]):
            raise ModelError(
                f"guide site '{name}' is a point (Delta), which has no density at values that the "
                "guide did not draw, so forward KL cannot score it. Pyro's own autoguides are made "
                "that way; use pyro_mf.AutoMeanField, or sample the site from a distribution."
            )
    surplus = [name for name in nodes if name not in shapes]
    missing = [name for name in shapes if name not in nodes]
    if missing or surplus:
        raise GuideMismatchError(
            f"forward KL needs a guide that samples each latent site of the model under its own "
            f"name, {list(shapes)}; the guide samples {list(nodes)}. An auxiliary site would have "
            "to be integrated out, which is not done: remove it."
        )
    for name, shape in shapes.items():
        got = nodes[name]["fn"].shape()
        if tuple(got) != tuple(shape):
            raise GuideMismatchError(
                f"latent site '{name}' has shape {tuple(shape)} in the model and {tuple(got)} in "
                "the guide. Give the guide's distribution the model's shape, in the same plates."
            )
