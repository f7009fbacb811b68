"""One Hamiltonian trajectory of many chains, and where chains begin.

References:
    Neal (2011), MCMC Using Hamiltonian Dynamics, https://arxiv.org/abs/1206.1901
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels.metric import Metric

_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class HMCState:
    """Where chains are.

    Args:
        z: Positions, shape ``(N, D)``.
        log_density: Log densities there, shape ``(N,)``.
        gradient: Their gradients, shape ``(N, D)``.
    """

    z: Tensor
    log_density: Tensor
    gradient: Tensor

    @classmethod
    def at(cls, density: Evaluate, z: Tensor) -> HMCState:
        """The state at positions ``(N, D)``."""
        return cls(z, *density(z))

    def where(self, chosen: Tensor, other: HMCState) -> HMCState:
        """This state for chosen chains, shape ``(N,)``, and another for the rest."""
        rows = chosen[:, None]
        return HMCState(
            torch.where(rows, self.z, other.z),
            torch.where(chosen, self.log_density, other.log_density),
            torch.where(rows, self.gradient, other.gradient),
        )


def leapfrog(
    density: Evaluate,
    state: HMCState,
    momentum: Tensor,
    step_size: Tensor,
    num_steps: int,
    metric: Metric,
) -> tuple[HMCState, Tensor]:
    """Follow Hamilton's equations: reversible, and volumes stay as they are.

    Args:
        density: Log densities and gradients at rows.
        state: Where the chains are.
        momentum: Their momenta, shape ``(N, D)``.
        step_size: In the metric's unit, shape ``(N, 1)`` or ``(1, 1)``.
        num_steps: Steps, at least 1; each takes one gradient per chain.
        metric: Estimate of the target's covariance.

    Returns:
        Where they get to, with log density ``-inf`` where they passed a point without density, and
        the momenta there.
    """
    momentum = torch.addcmul(momentum, state.gradient, 0.5 * step_size)
    z, value, gradient = state.z, state.log_density, state.gradient
    alive = torch.ones_like(value, dtype=torch.bool)
    for i in range(num_steps):
        z = torch.addcmul(z, metric.velocity(momentum), step_size)
        if not bool(alive.all()):  # no use in following them, and far out evaluations can be slow
            z = torch.where(alive[:, None], z, state.z)
        value, gradient = density(z)
        alive &= torch.isfinite(value)
        momentum.addcmul_(gradient, step_size if i < num_steps - 1 else 0.5 * step_size)
    return HMCState(z, torch.where(alive, value, -torch.inf), gradient), momentum


def hmc_transition(
    density: Evaluate,
    state: HMCState,
    step_size: float | Tensor,
    num_steps: int,
    metric: Metric,
    generator: torch.Generator,
) -> tuple[HMCState, Tensor]:
    """One Hamiltonian trajectory per chain, accepted or not.

    A trajectory that passes a point without density is rejected; it would be from its other end
    too, so the target stays invariant. Step size and number of steps must not depend on the state.

    Args:
        density: Log densities and gradients at rows.
        state: Where the chains are.
        step_size: In the metric's unit; one, or one per chain, shape ``(N,)``.
        num_steps: Leapfrog steps, at least 1; each takes one gradient per chain.
        metric: Estimate of the target's covariance.
        generator: Source of momenta and of decisions.

    Returns:
        The new state, and the probability with which each proposal was accepted, shape ``(N,)``:
        exactly zero for a divergent trajectory.

    Example:
        >>> def density(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> state = HMCState.at(density, torch.zeros(3, 2))
        >>> metric, generator = Metric(torch.ones(2)), torch.Generator().manual_seed(0)
        >>> state, acceptance = hmc_transition(density, state, 0.1, 5, metric, generator)
        >>> acceptance > 0.99
        tensor([True, True, True])
    """
    step = torch.as_tensor(step_size).to(state.z).reshape(-1, 1)
    noise = torch.empty_like(state.z).normal_(generator=generator)
    proposal, momentum = leapfrog(density, state, metric.momentum(noise), step, num_steps, metric)
    before = state.log_density - 0.5 * noise.square().sum(-1)
    after = proposal.log_density - 0.5 * (momentum * metric.velocity(momentum)).sum(-1)
    change = (after - before).nan_to_num(nan=-torch.inf)
    acceptance = change.clamp(max=0.0).exp()
    uniform = torch.empty_like(acceptance).uniform_(generator=generator)
    accepted = uniform < acceptance
    return proposal.where(accepted, state), acceptance


def initialise(
    density: Evaluate,
    loc: Tensor,
    metric: Metric,
    num_chains: int,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Draw where chains begin: from a Gaussian, nearer to its mean where there is no density.

    Args:
        density: Log densities and gradients at rows.
        loc: Mean, shape ``(D,)``.
        metric: Its covariance.
        num_chains: Number of chains N.
        generator: Source of the draws.

    Returns:
        Positions with a finite log density, shape ``(N, D)``.

    Raises:
        NonFiniteError: If some chain finds no such position.

    Example:
        >>> def density(z):
        ...     return torch.where(z[:, 0] > 0, -z[:, 0], -torch.inf), -torch.ones_like(z)
        >>> metric, generator = Metric(torch.ones(1)), torch.Generator().manual_seed(0)
        >>> z = initialise(density, torch.ones(1), metric, 100, generator=generator)
        >>> bool((z > 0).all())
        True
    """
    scale = torch.ones(num_chains, 1).to(loc)
    z = loc.expand(num_chains, -1)
    bad = torch.ones(num_chains, dtype=torch.bool, device=loc.device)
    for _ in range(_HALVINGS):
        noise = torch.empty_like(z).normal_(generator=generator)
        z = torch.where(bad[:, None], loc + scale * metric.unwhiten(noise), z)
        bad = ~torch.isfinite(density(z)[0])
        if not bool(bad.any()):
            return z
        scale = torch.where(bad[:, None], scale / 2, scale)
    raise NonFiniteError(
        f"{int(bad.sum())} of {num_chains} chains found no starting point with a finite log "
        f"density and gradient, down to 2^-{_HALVINGS} of the given scale around the given "
        "location. Start from a location where the model has a density."
    )
