"""One model, one guide and one set of data: what forward KL keeps from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.guides.protocol import is_factorised
from pyro_mf.kernels.independence import DefensiveMixture, Proposal
from pyro_mf.objectives.forward_estimators import ESTIMATORS, Estimator, Setting
from pyro_mf.objectives.forward_scoring import FlatScorer, Scorer, TracedScorer
from pyro_mf.objectives.wake_theta import WakeTheta

Fn = Callable[..., Any]


class Pair:
    """An estimator with its chains, for one posterior and one guide.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments.
        log_joint: The model at these arguments.
        name: The estimator's name.
        reason: Why it was chosen.
        num_particles: Draws per step.
        defensive: Share of heavy-tailed proposals.
        generator: Source of all randomness.
    """

    def __init__(
        self,
        model: Fn,
        guide: Fn,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        log_joint: LogJoint,
        *,
        name: str,
        reason: str,
        num_particles: int,
        defensive: float,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.guide = guide
        self.name = name
        self.reason = reason
        self._log_joint = log_joint
        self._data = _copies(args, kwargs)
        self.scorer = make_scorer(guide, log_joint, args, kwargs)
        proposal = make_proposal(self.scorer, defensive)
        setting = Setting(Blocks(log_joint), self.scorer, proposal, num_particles, generator)
        self.estimator: Estimator = ESTIMATORS[name](setting)
        has_params = bool(log_joint.program.prototype.params)
        self._wake_theta = WakeTheta(log_joint) if has_params else None
        self.num_steps = 0

    def matches(
        self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether this is about the same posterior and guide."""
        return (
            self.model is model
            and self.guide is guide
            and self._log_joint.program.matches(args, kwargs)
            and _are_same(self._data, tree_flatten((args, dict(kwargs)))[0])
        )

    def loss(self, *, is_step: bool) -> Tensor:
        """The cross-entropy in nats, differentiable by all parameters.

        Args:
            is_step: Whether to move the chains; else their draws are used as they are.

        Raises:
            NonFiniteError: If log q is not finite at a draw.
        """
        estimator = self.estimator
        draws = estimator.draws
        if is_step or draws is None or not estimator.is_chain:
            draws = estimator.advance(target_changed=self._wake_theta is not None)
            self.num_steps += 1
        z, weights = draws
        loss = cross_entropy(self.scorer, z, weights)
        if self._wake_theta is not None:
            loss = loss + self._wake_theta.term(z, weights).to(loss)
        return loss


def make_scorer(
    guide: Fn, log_joint: LogJoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Scorer:
    """The guide over the model's flat unconstrained vectors."""
    if is_factorised(guide):
        guide.setup(*args, **kwargs)
        return FlatScorer(guide, log_joint.layout)
    like = torch.empty(0, dtype=log_joint.dtype, device=log_joint.device)
    return TracedScorer(guide, log_joint.layout, args, kwargs, like)


def make_proposal(scorer: Scorer, share: float) -> Proposal:
    """The guide, or its mixture with something of heavier tails.

    Raises:
        ModelError: If a mixture is asked for and the guide's width is not known.
    """
    if share == 0.0:
        return scorer
    if not isinstance(scorer, FlatScorer):
        raise ModelError(
            "defensive proposals are three times as wide as the guide, whose width is known for "
            "AutoMeanField only. Leave out defensive=, or use that guide."
        )
    return Defensive(scorer, share)


class Defensive:
    """The guide as it is now, mixed with a share of heavy-tailed proposals three times as wide."""

    def __init__(self, scorer: FlatScorer, share: float) -> None:
        self._scorer = scorer
        self._share = share

    def sample(self, num_draws: int) -> Tensor:
        """See :class:`Proposal`."""
        return self._mixture().sample(num_draws)

    def log_prob(self, z: Tensor) -> Tensor:
        """See :class:`Proposal`."""
        return self._mixture().log_prob(z)

    def _mixture(self) -> DefensiveMixture:
        loc, scale = self._scorer.spread()
        return DefensiveMixture(self._scorer, self._share, loc, 3.0 * scale)


def cross_entropy(scorer: Scorer, z: Tensor, weights: Tensor) -> Tensor:
    """Minus the weighted mean of log q, differentiable.

    Raises:
        NonFiniteError: If log q is not finite where there is weight.
    """
    used = weights > 0
    log_prob = scorer.log_prob(z[used])
    bad = ~torch.isfinite(log_prob)
    if bool(bad.any()):
        raise NonFiniteError(
            f"log q is not finite at {int(bad.sum())} of {len(log_prob)} draws from the posterior, "
            f"first {float(log_prob[bad][0])}. Parameters keep their last finite values. Use a "
            "guide with the posterior's support, or a smaller step."
        )
    return -(weights[used] * log_prob).sum()


def _copies(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    leaves, _ = tree_flatten((args, dict(kwargs)))
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]


def _are_same(mine: list[Any], theirs: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else True
        for a, b in zip(mine, theirs, strict=True)
    )
