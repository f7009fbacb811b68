"""One model and one guide: what forward KL keeps from step to step."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_mf import _pyro
from pyro_mf._errors import EstimatorWarning, ModelError, NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.guides.protocol import is_factorised
from pyro_mf.kernels.independence import DefensiveMixture, Proposal
from pyro_mf.objectives.forward_choice import Choice
from pyro_mf.objectives.forward_estimators import ESTIMATORS, Estimator, Setting
from pyro_mf.objectives.forward_prior import Simulation
from pyro_mf.objectives.forward_report import ForwardDiagnostics, Watch
from pyro_mf.objectives.forward_samplers import HamiltonianChains, TemperedParticles
from pyro_mf.objectives.forward_scoring import FlatScorer, Scorer, TracedScorer
from pyro_mf.objectives.forward_traced import TracedImportance
from pyro_mf.objectives.wake_theta import WakeTheta

Fn = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]

_SAMPLERS: dict[str, Callable[[Setting], Estimator]] = {
    "hmc": HamiltonianChains,
    "smc": TemperedParticles,
    **ESTIMATORS,
}
_ADVICE = {
    "imh": "Use estimator='hmc', whose chains do not depend on the guide, or defensive=0.1.",
    "msc": "Use estimator='hmc', whose chains do not depend on the guide, or defensive=0.1.",
    "snis": "Use estimator='hmc' where the model allows it, or more particles.",
    "hmc": "Look for several modes (estimator='smc') or a funnel (reparameterise the model).",
}


class Pair(Protocol):
    """A model and a guide, with the draws that the one is fitted to the other by."""

    def matches(self, model: Fn, guide: Fn, arguments: Arguments) -> bool:
        """Whether this is about these, so that its draws can be used."""
        ...

    def loss(self, arguments: Arguments, *, is_step: bool) -> Tensor:
        """The cross-entropy in nats, differentiable by all parameters.

        Args:
            arguments: Of model and guide.
            is_step: Whether to move chains; else their draws are used as they are.
        """
        ...

    def diagnostics(self) -> ForwardDiagnostics:
        """How good the last draws are."""
        ...

    def fault(self) -> str | None:
        """What is wrong with the last draws, in words; ``None`` where nothing is known."""
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """What the next steps depend on; ``None`` where they depend on nothing before."""
        ...


class FlatPair:
    """Draws from the density of one flat vector, for one set of data.

    Args:
        model: The model.
        guide: The guide.
        choice: The estimator.
        log_joint: The density, which has the data.
        num_particles: Draws per step.
        defensive: Share of heavy-tailed proposals.
        generator: Source of all randomness.
    """

    def __init__(
        self,
        model: Fn,
        guide: Fn,
        choice: Choice,
        log_joint: LogJoint,
        *,
        num_particles: int,
        defensive: float,
        generator: torch.Generator,
    ) -> None:
        self.model = model
        self.guide = guide
        self._log_joint = log_joint
        arguments = (log_joint.model_args, log_joint.model_kwargs)
        self._data = tree_flatten(arguments)[0]
        self._scorer = make_scorer(guide, log_joint, *arguments)
        proposal = make_proposal(self._scorer, defensive)
        setting = Setting(Blocks(log_joint), self._scorer, proposal, num_particles, generator)
        self._estimator = _SAMPLERS[choice.name](setting)
        has_params = bool(log_joint.program.prototype.params)
        self._wake_theta = WakeTheta(log_joint) if has_params else None
        self._watch = Watch(choice.name, choice.reason)

    def matches(self, model: Fn, guide: Fn, arguments: Arguments) -> bool:
        """See :class:`Pair`."""
        return (
            self.model is model
            and self.guide is guide
            and not _pyro.handlers_around()
            and self._log_joint.program.matches(*arguments)
            and _are_same(self._data, tree_flatten(arguments)[0])
        )

    def loss(self, arguments: Arguments, *, is_step: bool) -> Tensor:
        """See :class:`Pair`.

        Raises:
            NonFiniteError: If log q is not finite at a draw.
        """
        estimator, draws = self._estimator, self._estimator.draws
        if is_step or draws is None or not estimator.is_chain:
            draws = estimator.advance(target_changed=self._wake_theta is not None)
            self._look(draws)
        loss = cross_entropy(self._scorer, *draws)
        if self._wake_theta is not None:
            loss = loss + self._wake_theta.term(*draws).to(loss)
        return loss

    def _look(self, draws: Any) -> None:
        self._watch.see(draws, is_chain=self._watch.name in {"hmc", "imh"})
        if self._watch.is_time_to_look:
            fault = self.fault()
            if fault is not None:
                self._watch.has_warned = True
                warnings.warn(fault, EstimatorWarning, stacklevel=2)

    def fault(self) -> str | None:
        """See :class:`Pair`."""
        found = self._watch.fault(self.diagnostics())
        return None if found is None else f"{found}. {_ADVICE.get(self._watch.name, '')}".strip()

    def diagnostics(self) -> ForwardDiagnostics:
        """See :class:`Pair`."""
        estimator = self._estimator
        return self._watch.report(
            acceptance=estimator.acceptance,
            log_weights=estimator.recent_log_weights(),
            counts=(estimator.num_evaluations, estimator.num_gradients),
        )

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Pair`."""
        return {
            "estimator": self._watch.name,
            "key": self.key,
            "num_steps": self._watch.num_steps,
            "state": self._estimator.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._estimator.load_state_dict(state["state"])
        self._watch.num_steps = int(state["num_steps"])

    def is_same_density(self, state: Mapping[str, Any]) -> bool:
        """Whether saved log densities are those of this model, as far as they were saved."""
        inner = state["state"]
        inner = inner.get("chains", inner)
        if "log_density" not in inner or self._wake_theta is not None:
            return True  # learnable parameters may be loaded later
        z, saved = inner["z"], inner["log_density"]
        z = z.reshape(-1, self._log_joint.size)
        now = Blocks(self._log_joint).values(z)
        tolerance = 1e-8 if self._log_joint.dtype == torch.float64 else 1e-3
        return torch.allclose(now, saved.reshape(-1), rtol=tolerance, atol=tolerance)

    @property
    def key(self) -> str:
        """What identifies the posterior in another process: its latents and its data."""
        digest = hashlib.sha256(str(self._log_joint.layout.element_names()).encode())
        for x in self._data:
            content = x.cpu().contiguous() if isinstance(x, Tensor) else x
            if isinstance(content, Tensor):
                digest.update(f"{content.dtype}{tuple(content.shape)}".encode())
                digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
            elif isinstance(content, str | int | float | bool | type(None)):
                digest.update(repr(content).encode())
            else:
                digest.update(type(content).__name__.encode())
        return digest.hexdigest()


class TracedPair:
    """Model and guide run as they are, at whatever data: nothing is kept but counts."""

    def __init__(self, runs: TracedImportance | Simulation, choice: Choice) -> None:
        self._runs = runs
        self._is_inside_handlers = bool(_pyro.handlers_around())
        self._watch = Watch(choice.name, choice.reason)

    def matches(self, model: Fn, guide: Fn, arguments: Arguments) -> bool:
        """See :class:`Pair`."""
        return (
            self._runs.model is model
            and self._runs.guide is guide
            and self._is_inside_handlers == bool(_pyro.handlers_around())
        )

    def loss(self, arguments: Arguments, *, is_step: bool) -> Tensor:
        """See :class:`Pair`."""
        loss = self._runs.loss(*arguments)
        self._watch.num_steps += 1
        log_weights = getattr(self._runs, "log_weights", None)
        if log_weights is not None:
            self._watch.see_weights(torch.softmax(log_weights, 0))
        return loss

    def diagnostics(self) -> ForwardDiagnostics:
        """See :class:`Pair`."""
        return self._watch.report(
            acceptance=float("nan"),
            log_weights=None,
            counts=(self._runs.num_evaluations, 0),
        )

    def fault(self) -> str | None:
        """See :class:`Pair`."""
        return self._watch.fault(self.diagnostics())

    def state_dict(self) -> None:
        """See :class:`Pair`."""


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
            f"first {log_prob[bad][0].item()}. Parameters keep their last finite values. Use a "
            "guide with the posterior's support, or a smaller step."
        )
    return -(weights[used] * log_prob).sum()


def _are_same(mine: list[Any], theirs: list[Any]) -> bool:
    """Whether tensors among arguments of one structure hold the same numbers, NaN included."""
    return all(
        torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(mine, theirs, strict=True)
        if isinstance(a, Tensor)
    )
