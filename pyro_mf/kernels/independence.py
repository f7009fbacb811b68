"""Kernels whose proposals do not depend on where a chain is: independence MH and conditional IS.

The proposal is the fitted family itself, in the objectives that use these. The chain keeps the
target for any proposal, so the family may change between steps; how fast the chain mixes does
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError

Values: TypeAlias = Callable[[Tensor], Tensor]
"""Log densities, shape ``(S,)``, at the rows of ``(S, D)``; ``-inf`` where there is no density."""


class Proposal(Protocol):
    """A distribution over rows that can be drawn from and scored."""

    def sample(self, num_draws: int) -> Tensor:
        """Draws, shape ``(num_draws, D)``."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density in nats at each row of ``(S, D)``, shape ``(S,)``."""
        ...


class IndependenceChains:
    r"""Parallel independence Metropolis-Hastings: N chains, one proposal each per step.

    A proposal :math:`z'` is taken with probability :math:`\min(1, w(z')/w(z))`,
    :math:`w = p / q`. A proposal at which a density is not finite is turned down; a chain at a
    point of density zero takes the first proposal that has any.

    Args:
        log_density: The target, up to a constant.
        z: Where the chains start, shape ``(N, D)``.
        generator: Source of the acceptances.

    Attributes:
        z: States, shape ``(N, D)``.
        log_density: Log density there, shape ``(N,)``.
        num_rejected: How often in a row each chain has stayed, shape ``(N,)``.
        num_steps: Steps so far.
        num_accepted: Proposals taken so far, in all chains.
        num_evaluations: Rows at which the target was evaluated.
        proposed: Log weights of the last proposals, shape ``(N,)``; empty before the first step.

    Example:
        >>> class Wide:
        ...     def sample(self, num_draws):
        ...         return 2.0 * torch.randn(num_draws, 1)
        ...     def log_prob(self, z):
        ...         return torch.distributions.Normal(0.0, 2.0).log_prob(z).sum(-1)
        >>> chains = IndependenceChains(
        ...     lambda z: -0.5 * z.square().sum(-1), torch.zeros(4, 1), generator=torch.Generator()
        ... )
        >>> chains.step(Wide())
        >>> chains.z.shape
        torch.Size([4, 1])

    References:
        Kim, Oh, Gardner, Dieng and Kim (2022), Markov Chain Score Ascent,
        https://arxiv.org/abs/2206.06295
    """

    def __init__(self, log_density: Values, z: Tensor, *, generator: torch.Generator) -> None:
        self._target = log_density
        self._generator = generator
        self.z = z.clone()
        self.log_density = log_density(z)
        self.num_rejected = torch.zeros(len(z), dtype=torch.long)
        self.num_steps = 0
        self.num_accepted = 0
        self.num_evaluations = len(z)
        self.proposed = torch.empty(0, dtype=torch.float64)

    @torch.no_grad()
    def step(self, proposal: Proposal) -> None:
        """Propose once per chain, and accept or not.

        Args:
            proposal: Any distribution with the target's support.
        """
        count = len(self.z)
        proposed = proposal.sample(count)
        new_density = self._target(proposed)
        self.num_evaluations += count
        self.proposed = new = new_density - proposal.log_prob(proposed)
        old = self.log_density - proposal.log_prob(self.z)
        uniform = torch.rand(count, generator=self._generator, dtype=torch.float64)
        # A difference of two infinite terms is NaN, which no number is below: turned down.
        accepted = torch.isfinite(new) & (uniform.log() < new - old)
        self.z = torch.where(accepted[:, None], proposed, self.z)
        self.log_density = torch.where(accepted, new_density, self.log_density)
        self.num_rejected = torch.where(accepted, 0, self.num_rejected + 1)
        self.num_steps += 1
        self.num_accepted += int(accepted.sum())

    @property
    def acceptance(self) -> float:
        """Share of proposals taken so far."""
        return self.num_accepted / max(1, self.num_steps * len(self.z))

    def refresh(self) -> None:
        """Evaluate the target at the states again, because it has changed."""
        self.log_density = self._target(self.z)
        self.num_evaluations += len(self.z)

    def state_dict(self) -> dict[str, Any]:
        """States and counts, as tensors and numbers; the generator is the caller's."""
        return {name: _copied(getattr(self, name)) for name in _CHAIN_STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for name in _CHAIN_STATE:
            setattr(self, name, _copied(state[name]))


class ConditionalImportance:
    r"""Conditional importance sampling: one chain, which picks among N weighted candidates.

    The candidates are the chain's state and N - 1 proposals, with self-normalised weights
    :math:`w = p / q`. The next state is one of them, by weight. The chain keeps the target, and so
    averages under the weights have no bias once it has forgotten its start, unlike those of plain
    importance sampling.

    Args:
        log_density: The target, up to a constant.
        z: Where the chain starts, shape ``(D,)``.
        num_candidates: N, at least 2.
        generator: Source of the choices.

    Attributes:
        z: The state, shape ``(D,)``.
        candidates: The last step's candidates, the state before it first, shape ``(N, D)``.
        log_weights: Their normalised log weights, shape ``(N,)``.
        num_steps: Steps so far.
        num_accepted: Steps that ended at a proposal.
        num_evaluations: Rows at which the target was evaluated.
        proposed: Log weights of the last proposals, not normalised, shape ``(N - 1,)``; empty
            before the first step.

    References:
        Naesseth, Lindsten and Blei (2020), Markovian Score Climbing,
        https://arxiv.org/abs/2003.10374
    """

    def __init__(
        self,
        log_density: Values,
        z: Tensor,
        num_candidates: int,
        *,
        generator: torch.Generator,
    ) -> None:
        self._target = log_density
        self._generator = generator
        self._num_candidates = num_candidates
        self.z = z.clone()
        self.log_density = log_density(z[None])
        self.candidates = z[None].expand(num_candidates, -1).clone()
        self.log_weights = torch.full((num_candidates,), -torch.inf, dtype=torch.float64)
        self.num_steps = 0
        self.num_accepted = 0
        self.num_evaluations = 1
        self.proposed = torch.empty(0, dtype=torch.float64)

    @torch.no_grad()
    def step(self, proposal: Proposal) -> None:
        """Draw candidates and move to one of them.

        Args:
            proposal: Any distribution with the target's support.

        Raises:
            NonFiniteError: If every candidate has density zero.
        """
        proposed = proposal.sample(self._num_candidates - 1)
        candidates = torch.cat([self.z[None], proposed])
        density = torch.cat([self.log_density, self._target(proposed)])
        self.num_evaluations += len(proposed)
        weights = density - proposal.log_prob(candidates)
        weights = torch.where(torch.isnan(weights), -torch.inf, weights)
        if not bool((weights > -torch.inf).any()):
            raise NonFiniteError(
                f"the log density is not finite at any of {len(weights)} candidates. "
                "Start the guide where the model has density, or draw more particles."
            )
        weights = weights.clamp(max=torch.finfo(weights.dtype).max)  # a state that q cannot reach
        self.candidates, self.log_weights = candidates, torch.log_softmax(weights, 0)
        self.proposed = weights[1:]
        pick = torch.multinomial(self.log_weights.exp(), 1, generator=self._generator)
        self.z, self.log_density = candidates[pick[0]], density[pick]
        self.num_steps += 1
        self.num_accepted += int(pick[0] > 0)

    @property
    def acceptance(self) -> float:
        """Share of steps that ended at a proposal."""
        return self.num_accepted / max(1, self.num_steps)

    def refresh(self) -> None:
        """Evaluate the target at the state again, because it has changed."""
        self.log_density = self._target(self.z[None])
        self.num_evaluations += 1

    def state_dict(self) -> dict[str, Any]:
        """State and counts, as tensors and numbers; the generator is the caller's."""
        return {name: _copied(getattr(self, name)) for name in _IMPORTANCE_STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        for name in _IMPORTANCE_STATE:
            setattr(self, name, _copied(state[name]))


class DefensiveMixture:
    r"""A proposal with a share of heavy-tailed draws, so that importance weights are bounded.

    The heavy-tailed part is a product of Student-t factors with 3 degrees of freedom.

    Args:
        proposal: A distribution over rows.
        share: Share of draws from the heavy-tailed part, above 0 and below 1.
        loc: Centre of the heavy-tailed part, shape ``(D,)``.
        scale: Its scale, shape ``(D,)``.
    """

    def __init__(self, proposal: Proposal, share: float, loc: Tensor, scale: Tensor) -> None:
        self._proposal = proposal
        self._share = share
        self._wide = torch.distributions.StudentT(3.0, loc, scale)

    def sample(self, num_draws: int) -> Tensor:
        """See :class:`Proposal`."""
        narrow = self._proposal.sample(num_draws)
        wide = self._wide.sample((num_draws,)).to(narrow)
        return torch.where((torch.rand(num_draws) < self._share)[:, None], wide, narrow)

    def log_prob(self, z: Tensor) -> Tensor:
        """See :class:`Proposal`."""
        narrow = math.log1p(-self._share) + self._proposal.log_prob(z)
        return torch.logaddexp(narrow, math.log(self._share) + self._wide.log_prob(z).sum(-1))


_CHAIN_STATE = ("z", "log_density", "num_rejected", "num_steps", "num_accepted", "num_evaluations")
_IMPORTANCE_STATE = (
    "z",
    "log_density",
    "candidates",
    "log_weights",
    "num_steps",
    "num_accepted",
    "num_evaluations",
)


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
