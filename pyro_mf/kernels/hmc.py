"""Many Hamiltonian Monte Carlo chains at once, with the gradients of all in one call.

References:
    Neal (2011), MCMC Using Hamiltonian Dynamics, https://arxiv.org/abs/1206.1901
    Hoffman, Radul and Sountsov (2021), An Adaptive-MCMC Scheme for Setting Trajectory Lengths in
    Hamiltonian Monte Carlo, AISTATS
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels.adaptation import LengthSearch, StepSize, worst_effective_size
from pyro_mf.kernels.metric import Metric

_QUARTER_PERIOD = math.pi / 2  # after which a Gaussian target in the metric's unit is forgotten
_LENGTH_JITTER, _STEP_JITTER = 0.5, 0.1
_MAX_STEPS = 256
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


@dataclass(frozen=True, eq=False)
class HMCDraws:
    """Draws of parallel chains.

    Args:
        z: Shape ``(T, N, D)``.
        log_density: Log densities in nats, shape ``(T, N)``.
    """

    z: Tensor
    log_density: Tensor


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
    momentum = torch.addcmul(metric.momentum(noise), state.gradient, 0.5 * step)
    z, value, gradient = state.z, state.log_density, state.gradient
    alive = torch.ones_like(value, dtype=torch.bool)
    for i in range(num_steps):
        z = torch.addcmul(z, metric.velocity(momentum), step)
        if not bool(alive.all()):  # no use in following them, and far out evaluations can be slow
            z = torch.where(alive[:, None], z, state.z)
        value, gradient = density(z)
        alive &= torch.isfinite(value)
        momentum.addcmul_(gradient, step if i < num_steps - 1 else 0.5 * step)
    before = state.log_density - 0.5 * noise.square().sum(-1)
    after = value - 0.5 * (momentum * metric.velocity(momentum)).sum(-1)
    change = torch.where(alive, after - before, -torch.inf).nan_to_num(nan=-torch.inf)
    acceptance = change.clamp(max=0.0).exp()
    uniform = torch.empty_like(acceptance).uniform_(generator=generator)
    accepted = uniform < acceptance
    return HMCState(z, value, gradient).where(accepted, state), acceptance


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


class ParallelHMC:
    """Hamiltonian chains side by side, with one step size, trajectory length and metric for all.

    ``warm_up`` adapts these three; ``sample`` changes none of them, so that its chains leave the
    target invariant. The length of a trajectory is drawn anew at every iteration, one for all
    chains, and each chain's step size a little around the common one: no direction is always met
    at its own period.

    Args:
        density: Log densities and gradients at rows: ``-inf`` and zero where there is none.
        z: Positions of the chains, shape ``(N, D)``, in double precision.
        metric: Estimate of the target's covariance, as linear response gives it.
        generator: Source of all randomness.
        target_acceptance: Mean acceptance probability that the step size aims at.

    Attributes:
        state: Where the chains are.
        metric: The metric now.
        step_size: Length of a leapfrog step, in the metric's unit.
        length: Mean length of a trajectory, in the metric's unit.
        acceptance: Mean acceptance probability per chain since the last ``warm_up`` or ``sample``
            began, shape ``(N,)``.
        num_gradients: Calls of the density so far, each with N rows.
        num_divergent: Trajectories since the last ``warm_up`` or ``sample`` began that ended where
            no proposal is ever accepted.

    Raises:
        ValueError: If ``z`` is no matrix of at least two chains, or does not fit the metric.
        NonFiniteError: If a chain begins where there is no density.

    Example:
        >>> def density(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> generator = torch.Generator().manual_seed(0)
        >>> chains = ParallelHMC(
        ...     density, torch.zeros(64, 3), Metric(torch.ones(3)), generator=generator
        ... )
        >>> chains.warm_up(100)
        >>> chains.sample(100).z.std()
        tensor(1.0)
    """

    def __init__(
        self,
        density: Evaluate,
        z: Tensor,
        metric: Metric,
        *,
        generator: torch.Generator,
        target_acceptance: float = 0.8,
    ) -> None:
        if z.dim() != 2 or len(z) < 2 or z.shape[1] != len(metric.scale):
            raise ValueError(
                f"expected positions of shape (N, {len(metric.scale)}) of at least 2 chains, as "
                f"the metric has them; got {tuple(z.shape)}."
            )
        self.density, self.metric, self.generator = density, metric, generator
        self.target_acceptance = target_acceptance
        self.state = HMCState.at(density, z)
        bad = int((~torch.isfinite(self.state.log_density)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {len(z)} chains begin where the log density or its gradient is not "
                "finite. Begin elsewhere: `initialise` draws positions that have a density."
            )
        self.step_size = 1.4 * z.shape[1] ** -0.25
        self.length = _QUARTER_PERIOD
        self.num_gradients = 1
        self._start_counting()

    def _start_counting(self) -> None:
        self._acceptance = torch.zeros_like(self.state.log_density)
        self._num_iterations, self.num_divergent = 0, 0

    @property
    def acceptance(self) -> Tensor:
        """Mean acceptance probability per chain, shape ``(N,)``."""
        return self._acceptance / max(self._num_iterations, 1)

    @property
    def num_steps(self) -> float:
        """Leapfrog steps of a trajectory, on average."""
        return max(float(self.length / self.step_size), 1.0)

    def warm_up(self, num_iterations: int) -> None:
        """Adapt step size, metric and trajectory length; the draws are not kept.

        Args:
            num_iterations: How many iterations to spend at most, at least 20.

        Raises:
            ValueError: If these are fewer.
        """
        if num_iterations < 20:
            raise ValueError(f"warm_up needs at least 20 iterations; got {num_iterations}.")
        self._start_counting()
        step = StepSize(self.step_size, self.target_acceptance)
        for fraction in (0.1, 0.15, 0.25):  # the first is the way to where the density is
            z = self._adapt_step(step, int(fraction * num_iterations))
            self._update_metric(z)
        search = LengthSearch(self.length)
        pieces: list[Tensor] = []
        for _ in range(4):
            before = self.num_gradients
            z = self._adapt_step(step, num_iterations // 11)
            if len(z) >= 4:
                search.report(worst_effective_size(z) / (self.num_gradients - before))
            self.length = search.length
            pieces.append(z)
            if search.is_done:
                break
        if not search.is_done:
            self.length = search.best[0]
        self._update_metric(torch.cat(pieces))
        self._adapt_step(step, num_iterations // 10 + 1)

    def sample(self, num_iterations: int) -> HMCDraws:
        """Draw, with everything fixed.

        Args:
            num_iterations: Draws T of every chain.
        """
        self._start_counting()
        n, size = self.state.z.shape
        z = self.state.z.new_empty((num_iterations, n, size))
        log_density = z.new_empty((num_iterations, n))
        for t in range(num_iterations):
            self._iterate()
            z[t], log_density[t] = self.state.z, self.state.log_density
        return HMCDraws(z, log_density)

    def _iterate(self) -> float:
        """One transition; the mean acceptance probability."""
        uniform = torch.empty(len(self.state.z) + 2, dtype=torch.float64)
        uniform.uniform_(generator=self.generator)
        length = self.length * (1.0 + _LENGTH_JITTER * (2.0 * float(uniform[0]) - 1.0))
        # Rounded at random, so that the mean length is right where steps are few.
        num_steps = int(length / self.step_size + float(uniform[1]))
        num_steps = min(max(num_steps, 1), _MAX_STEPS)
        step_size = self.step_size * (1.0 + _STEP_JITTER * (2.0 * uniform[2:] - 1.0))
        self.state, acceptance = hmc_transition(
            self.density, self.state, step_size, num_steps, self.metric, self.generator
        )
        self._acceptance += acceptance
        self._num_iterations += 1
        self.num_divergent += int((acceptance == 0.0).sum())
        self.num_gradients += num_steps
        return float(acceptance.mean())

    def _adapt_step(self, step: StepSize, num_iterations: int) -> Tensor:
        """Iterate and adapt the step size; the draws, shape ``(num_iterations, N, D)``."""
        z = []
        for _ in range(num_iterations):
            step.update(self._iterate())
            self.step_size = step.value
            z.append(self.state.z)
        step.settle()
        self.step_size = step.value
        return torch.stack(z) if z else self.state.z.new_empty((0, *self.state.z.shape))

    def _update_metric(self, z: Tensor) -> None:
        if len(z) >= 4:
            self.metric = self.metric.updated(z.flatten(0, 1), worst_effective_size(z))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which the same chains go on, to the bit."""
        return {
            "z": self.state.z.clone(),
            "log_density": self.state.log_density.clone(),
            "gradient": self.state.gradient.clone(),
            "scale": self.metric.scale.clone(),
            "step_size": self.step_size,
            "length": self.length,
            "acceptance": self._acceptance.clone(),
            "num_iterations": self._num_iterations,
            "num_gradients": self.num_gradients,
            "num_divergent": self.num_divergent,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.state = HMCState(*(state[key].clone() for key in ("z", "log_density", "gradient")))
        self.metric = Metric(state["scale"].clone())
        self.step_size, self.length = state["step_size"], state["length"]
        self._acceptance = state["acceptance"].clone()
        self._num_iterations = state["num_iterations"]
        self.num_gradients, self.num_divergent = state["num_gradients"], state["num_divergent"]
        self.generator.set_state(state["generator"])
