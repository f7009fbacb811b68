"""Where the draws of forward KL come from, on a density over flat unconstrained vectors.

Every estimator offers weighted draws from the posterior that carry no gradient. What differs is
their cost, and what they need of the fitted family: ``snis``, ``imh`` and ``msc`` propose from it,
so they fail where it is far from the posterior, as a mean-field family is in many dimensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.kernels.independence import ConditionalImportance, IndependenceChains, Proposal
from pyro_mf.objectives.forward_scoring import Scorer

# Log weights of so many recent draws are kept for k-hat.
_MAX_WEIGHTS = 2000
_WATCHED = 200  # steps whose acceptance is looked at


class Draws(NamedTuple):
    """Weighted draws from the posterior.

    Args:
        z: Shape ``(S, D)``.
        weights: Shape ``(S,)``, summing to one.
    """

    z: Tensor
    weights: Tensor


class Setting(NamedTuple):
    """What every estimator is made from.

    Args:
        density: The log joint.
        scorer: The guide.
        proposal: What to propose from: the guide, or a mixture with it.
        num_particles: Draws per step.
        generator: Source of all randomness.
    """

    density: Blocks
    scorer: Scorer
    proposal: Proposal
    num_particles: int
    generator: torch.Generator


class Estimator(Protocol):
    """Weighted draws, renewed at each step."""

    @property
    def is_chain(self) -> bool:
        """Whether draws depend on those of the step before."""
        ...

    @property
    def draws(self) -> Draws | None:
        """The last step's draws, ``None`` before the first."""
        ...

    @property
    def acceptance(self) -> float:
        """Share of proposals taken, NaN where there are none."""
        ...

    @property
    def num_evaluations(self) -> int:
        """Rows at which the density was evaluated."""
        ...

    @property
    def num_gradients(self) -> int:
        """Rows at which its gradient was asked for."""
        ...

    def advance(self, *, target_changed: bool) -> Draws:
        """Make new draws.

        Args:
            target_changed: Whether the density is another one than at the last step, as it is
                where the model has learnable parameters.
        """
        ...

    def recent_log_weights(self) -> Tensor | None:
        """Log importance weights of recent draws, ``None`` where there are none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as tensors and numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        ...


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Feed what draws from torch's global generator from ``generator``, and put it back."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class ImportanceSampling:
    """Self-normalised importance sampling from the guide, as the wake phase of wake-sleep has it.

    The weights' normalisation biases the gradient at any finite number of particles: the optimum
    is narrower than that of forward KL.

    References:
        Bornschein and Bengio (2015), Reweighted Wake-Sleep, https://arxiv.org/abs/1406.2751
    """

    is_chain = False
    acceptance = float("nan")

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._recent: deque[Tensor] = deque(maxlen=max(1, _MAX_WEIGHTS // setting.num_particles))
        self.draws: Draws | None = None
        self.num_evaluations = 0
        self.num_gradients = 0

    @torch.no_grad()
    def advance(self, *, target_changed: bool) -> Draws:
        """See :class:`Estimator`."""
        density, _, proposal, count, generator = self._setting
        with seeded(generator):
            z = proposal.sample(count)
        log_weights = density.values(z) - proposal.log_prob(z)
        self.num_evaluations += count
        self.draws = Draws(z, normalised(log_weights))
        self._recent.append(log_weights)
        return self.draws

    def recent_log_weights(self) -> Tensor | None:
        """See :class:`Estimator`."""
        return torch.cat(tuple(self._recent)) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Estimator`."""
        return {"num_evaluations": self.num_evaluations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Estimator`."""
        self.num_evaluations = int(state["num_evaluations"])


class _MarkovChains:
    """What estimators have in common that go on from the states of the step before."""

    is_chain = True
    num_gradients = 0
    chains: IndependenceChains | ConditionalImportance

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.draws: Draws | None = None
        self._accepted = deque([(0, 0.0)], maxlen=_WATCHED + 1)  # steps and sum of their shares
        self._recent: deque[Tensor] = deque(maxlen=max(1, _MAX_WEIGHTS // setting.num_particles))

    def advance(self, *, target_changed: bool) -> Draws:
        """See :class:`Estimator`.

        Raises:
            NonFiniteError: If no chain has found a point with density yet.
        """
        if target_changed:
            self.chains.refresh()
        with seeded(self._setting.generator):
            self.chains.step(self._setting.proposal)
        self._accepted.append(self._count_accepted())
        self._recent.append(self.chains.proposed)
        self.draws = self._read()
        return self.draws

    def _read(self) -> Draws:
        raise NotImplementedError

    @property
    def acceptance(self) -> float:
        """Share of the latest proposals taken, or of steps that ended at a new point."""
        (before, sum_before), (now, sum_now) = self._accepted[0], self._accepted[-1]
        return (sum_now - sum_before) / (now - before) if now > before else self.chains.acceptance

    def _count_accepted(self) -> tuple[int, float]:
        return self.chains.num_steps, self.chains.num_steps * self.chains.acceptance

    @property
    def num_evaluations(self) -> int:
        """Rows at which the density was evaluated."""
        return self.chains.num_evaluations

    def recent_log_weights(self) -> Tensor | None:
        """Of proposals: what they cover too thinly shows there, and in no chain that they feed."""
        return torch.cat(tuple(self._recent)) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`Estimator`."""
        return self.chains.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Estimator`."""
        self.chains.load_state_dict(state)
        self._accepted.clear()
        self._accepted.append(self._count_accepted())
        if self.chains.num_steps:
            self.draws = self._read()


class ParallelChains(_MarkovChains):
    """Independence Metropolis-Hastings: N chains, each one proposal from the guide per step."""

    chains: IndependenceChains

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        density, scorer, _, count, generator = setting
        with seeded(generator):
            start = scorer.sample(count)
        self.chains = IndependenceChains(density.values, start, generator=generator)

    def _read(self) -> Draws:
        # A chain that is still where there is no density is no draw from the posterior.
        alive = (self.chains.log_density > -torch.inf).double()
        if not bool(alive.any()):
            raise NonFiniteError(
                f"the log density is not finite at any of {len(alive)} chains. Start the guide "
                "where the model has density."
            )
        return Draws(self.chains.z, alive / alive.sum())


class ScoreClimbing(_MarkovChains):
    """Markovian score climbing: conditional importance sampling, all candidates in the gradient."""

    chains: ConditionalImportance

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        density, scorer, _, count, generator = setting
        with seeded(generator):
            start = scorer.sample(1)[0]
        self.chains = ConditionalImportance(density.values, start, count, generator=generator)

    def _read(self) -> Draws:
        return Draws(self.chains.candidates, self.chains.log_weights.exp())


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to one over the first dimension; one that is NaN is zero.

    Raises:
        NonFiniteError: If every weight is zero, or one is infinite.
    """
    log_weights = torch.where(torch.isnan(log_weights), -torch.inf, log_weights)
    if bool((log_weights == torch.inf).any()):
        raise NonFiniteError(
            "an importance weight is infinite: the guide gives density zero to its own draw. "
            "Parameters keep their last finite values; widen the guide."
        )
    if not bool((log_weights > -torch.inf).any(0).all()):
        raise NonFiniteError(
            f"all {len(log_weights)} importance weights are zero: the model has no finite density "
            "at any draw of the guide. Parameters keep their last finite values; start the guide "
            "where the model has density, or draw more particles."
        )
    return torch.softmax(log_weights, 0)


ESTIMATORS: dict[str, Callable[[Setting], Estimator]] = {
    "imh": ParallelChains,
    "msc": ScoreClimbing,
    "snis": ImportanceSampling,
}
