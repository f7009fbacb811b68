"""Approximations as what the checks ask of them: draws, and log densities of these and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_mf.convert.guide_draws import check_ready, draw_guide, is_factorised
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.solvers.evidence import gaussian_log_prob
from pyro_mf.solvers.linear_response import LinearResponse

_MAX_BYTES = 2**28  # of intermediate values at once


class Draw(Protocol):
    """Independent draws of an approximation."""

    def __call__(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draws ``(num, D)`` on the unconstrained space, and their log density ``(num,)``."""
        ...


@dataclass(frozen=True, eq=False)
class Proposal:
    """An approximation on the unconstrained space.

    Args:
        name: What it is, in words.
        draw: Makes independent draws with their log densities.
        log_prob: Log density at any points, ``(S, D)`` to ``(S,)``; ``None`` where it is unknown.
    """

    name: str
    draw: Draw
    log_prob: Callable[[Tensor], Tensor] | None = None

    def __call__(self, num: int, seed: int) -> tuple[Tensor, Tensor]:
        """The same as ``draw``."""
        return self.draw(num, seed)


def guide_proposal(guide: Any, log_joint: LogJoint) -> Proposal:
    """A guide as a proposal.

    Args:
        guide: A trained guide of ours, or any Pyro guide whose density is known.
        log_joint: The model that it is for, on its full data.

    Raises:
        GuideMismatchError: If the guide has other latent sites than the model.
        GuideNotSetUpError: If it has not seen its model run.
        TypeError: If it is no guide.
        ValueError: On drawing, if the density of the guide's draws is unknown.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model():
        ...     pyro.sample("a", dist.Normal(0.0, 1.0))
        >>> proposal = guide_proposal(AutoMeanField(model).setup(), LogJoint(model))
        >>> [x.shape for x in proposal(5, seed=0)]
        [torch.Size([5, 1]), torch.Size([5])]
    """
    check_ready(guide)

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        args, kwargs = log_joint.model_args, log_joint.model_kwargs
        drawn = draw_guide(guide, args, kwargs, log_joint.layout, num, seed)
        if drawn.log_q is None:
            raise ValueError(f"there are no importance weights: {drawn.why_no_log_q}.")
        if not drawn.discrete:
            return drawn.z, drawn.log_q
        with torch.no_grad():  # the log joint sums discrete sites out
            return drawn.z, drawn.log_q - guide.log_prob_discrete(drawn.discrete)

    def log_prob(z: Tensor) -> Tensor:
        with torch.no_grad():
            own = guide.layout.pack(log_joint.layout.unpack(z))
            return guide.log_prob_unconstrained(own)  # type: ignore[no-any-return]

    if not is_factorised(guide):
        return Proposal(type(guide).__name__, draw)
    check_same_sites(log_joint.layout, guide.layout)
    return Proposal("the guide", draw, log_prob)


def response_proposal(response: LinearResponse) -> Proposal:
    """The Gaussian of linear response as a proposal.

    Args:
        response: What :meth:`pyro_mf.FitResult.linear_response` returns, of all sites.

    Example:
        >>> proposal = response_proposal(LinearResponse(torch.zeros(2), torch.eye(2)))
        >>> z, log_q = proposal(3, seed=0)
        >>> bool(torch.equal(proposal.log_prob(z), log_q))
        True
    """

    def log_prob(z: Tensor) -> Tensor:
        return gaussian_log_prob(z.to(response.loc), response.loc, response.scale_tril)

    def draw(num: int, seed: int) -> tuple[Tensor, Tensor]:
        z = response.sample(num, seed=seed)
        return z, log_prob(z)

    return Proposal("the Gaussian of linear response", draw, log_prob)


@torch.no_grad()
def weigh(log_joint: LogJoint, draw: Draw, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw, and weigh the draws against the model.

    Args:
        log_joint: The model.
        draw: Makes the draws.
        num: Number of draws.
        seed: Their seed.

    Returns:
        Draws, shape ``(num, D)``, and log weights in nats, ``(num,)``, in double precision;
        ``-inf`` where the model's density is zero or raises an error.

    Raises:
        ValueError: If a log weight is NaN or ``+inf``, or the shapes are not as promised.
    """
    z, log_q = draw(num, seed)
    if z.shape != (num, log_joint.size) or log_q.shape != (num,):
        raise ValueError(
            f"draw({num}, seed) must return draws of shape ({num}, {log_joint.size}) and log "
            f"densities of shape ({num},); got {tuple(z.shape)} and {tuple(log_q.shape)}."
        )
    z = z.to(dtype=log_joint.dtype, device=log_joint.device)
    log_weights = values_at(log_joint, z).double() - log_q.to(log_joint.device).double()
    bad = int((log_weights.isnan() | (log_weights == torch.inf)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {num} log weights are NaN or +inf: the model's density or that of the draws "
            "is not finite there. result.log_joint.evaluate(z) shows which site is to blame."
        )
    return z, log_weights


def values_at(log_joint: LogJoint, z: Tensor) -> Tensor:
    """Log joint at any number of rows in bounded memory, shape ``(S,)``.

    Args:
        log_joint: The model.
        z: Unconstrained vectors, shape ``(S, D)``; ``-inf`` at those where the model raises.
    """
    try:
        return torch.cat([log_joint(rows) for rows in z.split(_rows_at_once(log_joint))])
    except (RuntimeError, ValueError):  # a Cholesky that fails at some row
        return Blocks(log_joint).values(z)


def gradients_at(log_joint: LogJoint, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same with gradients, shape ``(S, D)``; zero where the model raises.

    Args:
        log_joint: The model.
        z: Unconstrained vectors, shape ``(S, D)``.
    """
    try:
        parts = [log_joint.value_and_grad(rows) for rows in z.split(_rows_at_once(log_joint))]
    except (RuntimeError, ValueError):
        return Blocks(log_joint).value_and_grad(z)
    values, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, gradients


def _rows_at_once(log_joint: LogJoint) -> int:
    return max(1, _MAX_BYTES // max(1, log_joint.footprint.num_bytes))
