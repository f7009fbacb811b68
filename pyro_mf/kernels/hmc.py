"""Many Hamiltonian Monte Carlo chains at once, with the gradients of all in one call.

References:
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
from pyro_mf.kernels.adaptation import LengthSearch, StepSize, renewal
from pyro_mf.kernels.metric import Metric
from pyro_mf.kernels.transition import HMCState, hmc_transition

_QUARTER_PERIOD = math.pi / 2  # after which a Gaussian target in the metric's unit is forgotten
_LENGTH_JITTER, _STEP_JITTER = 0.5, 0.1
_MAX_STEPS = 256
_NUM_LENGTHS = 4
# Share of divergent trajectories from which steps have to be smaller, and how careful they get.
_MAX_DIVERGENT, _MAX_TARGET = 0.001, 0.98


@dataclass(frozen=True, eq=False)
class HMCDraws:
    """Draws of parallel chains.

    Args:
        z: Shape ``(T, N, D)``.
        log_density: Log densities in nats, shape ``(T, N)``.
    """

    z: Tensor
    log_density: Tensor


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
        target_acceptance: Mean acceptance probability that the step size aims at. Where
            trajectories diverge, ``warm_up`` raises it.

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
        self._caution = torch.ones(len(z)).to(z)
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
            num_iterations: How many iterations to spend at most, at least 40.

        Raises:
            ValueError: If these are fewer.
        """
        if num_iterations < 40:
            raise ValueError(f"warm_up needs at least 40 iterations; got {num_iterations}.")
        self._start_counting()
        for fraction in (0.1, 0.15, 0.25):  # the first is the way to where the density is
            z = self._adapt_step(int(fraction * num_iterations), is_early=True)
            self._update_metric(z)
        search = LengthSearch(self.length)
        pieces: list[Tensor] = []
        while len(pieces) < _NUM_LENGTHS and not search.is_done:
            before = self.num_gradients
            pieces.append(self._adapt_step(num_iterations // 11))
            rate = float(renewal(self.metric.whiten(pieces[-1])).min())
            search.report(rate * len(pieces[-1]) / (self.num_gradients - before))
            self.length = search.length
        self.length = search.best
        self._update_metric(torch.cat(pieces))
        self._adapt_step(num_iterations // 10 + 1)

    def sample(self, num_iterations: int) -> HMCDraws:
        """Draw, with everything fixed.

        Args:
            num_iterations: Draws T of every chain.
        """
        self._start_counting()
        self._caution.fill_(1.0)
        n, size = self.state.z.shape
        z = self.state.z.new_empty((num_iterations, n, size))
        log_density = z.new_empty((num_iterations, n))
        for t in range(num_iterations):
            self._iterate()
            z[t], log_density[t] = self.state.z, self.state.log_density
        return HMCDraws(z, log_density)

    def _iterate(self) -> Tensor:
        """One transition of all chains; their acceptance probabilities, shape ``(N,)``."""
        uniform = torch.empty(2, dtype=torch.float64).uniform_(generator=self.generator)
        length = self.length * (1.0 + _LENGTH_JITTER * (2.0 * float(uniform[0]) - 1.0))
        # Rounded at random, so that the mean length is right where steps are few.
        num_steps = int(length / self.step_size + float(uniform[1]))
        num_steps = min(max(num_steps, 1), _MAX_STEPS)
        jitter = torch.empty_like(self.state.log_density).uniform_(generator=self.generator)
        step_size = self.step_size * self._caution * (1.0 + _STEP_JITTER * (2.0 * jitter - 1.0))
        self.state, acceptance = hmc_transition(
            self.density, self.state, step_size, num_steps, self.metric, self.generator
        )
        self._acceptance += acceptance
        self._num_iterations += 1
        self.num_divergent += int((acceptance == 0.0).sum())
        self.num_gradients += num_steps
        return acceptance

    def _adapt_step(self, num_iterations: int, *, is_early: bool = False) -> Tensor:
        """Iterate and adapt the step size; the draws, shape ``(num_iterations, N, D)``."""
        step = StepSize(self.step_size, self.target_acceptance)
        num_divergent = self.num_divergent
        z = []
        for _ in range(num_iterations):
            acceptance = self._iterate()
            step.update(float(acceptance.mean()))
            self.step_size = step.value
            z.append(self.state.z)
            if is_early:  # chains that began in a narrow place go on by smaller steps
                smaller, larger = 0.5 * self._caution, (1.2 * self._caution).clamp(max=1.0)
                self._caution = torch.where(acceptance < 0.1, smaller, larger)
        self._caution.fill_(1.0)
        step.settle()
        self.step_size = step.value
        share = (self.num_divergent - num_divergent) / (num_iterations * len(self.state.z))
        if not is_early and share > _MAX_DIVERGENT:
            self.target_acceptance += 0.5 * (_MAX_TARGET - self.target_acceptance)
        return torch.stack(z)

    def _update_metric(self, z: Tensor) -> None:
        rate = float(renewal(self.metric.whiten(z)).median())
        num_effective = max(rate * len(z), 1.0) * z.shape[1]
        self.metric = self.metric.updated(z.flatten(0, 1), num_effective)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which the same chains go on, to the bit."""
        return {
            "z": self.state.z.clone(),
            "log_density": self.state.log_density.clone(),
            "gradient": self.state.gradient.clone(),
            "scale": self.metric.scale.clone(),
            "step_size": self.step_size,
            "length": self.length,
            "target_acceptance": self.target_acceptance,
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
        self.target_acceptance = state["target_acceptance"]
        self._acceptance = state["acceptance"].clone()
        self._num_iterations = state["num_iterations"]
        self.num_gradients, self.num_divergent = state["num_gradients"], state["num_divergent"]
        self._caution.fill_(1.0)
        self.generator.set_state(state["generator"])
