"""One population of particles on its way from a base density to the target."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels.adaptation import StepSize
from pyro_mf.kernels.metric import Metric
from pyro_mf.kernels.transition import HMCState, hmc_transition
from pyro_mf.kernels.weighted import temper, weighted_moments
from pyro_mf.weights import effective_sample_size

KEPT_ESS = 0.5  # share of the particles that a change of temperature leaves effective
_MAX_TEMPERATURES = 200
# Particles move at most so often at a temperature, until the mean squared jump of each coordinate,
# and of the log density, is this share of that between independent draws.
_MAX_MOVES, _ENOUGH_JUMP = 12, 0.8
_LENGTH, _MAX_STEPS = math.pi / 2, 16  # of a trajectory, in the metric's unit and in steps
_TARGET_ACCEPTANCE = 0.8
_MAX_DENSE = 300  # dimension up to which the metric knows correlations


class Base(Protocol):
    """A normalised density that can be drawn from."""

    def sample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Draws, shape ``(num_draws, D)``."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities, shape ``(S,)``, and gradients, ``(S, D)``, at rows ``(S, D)``."""
        ...


class AnnealedRun:
    """Particles that follow the path of tempered densities once.

    Args:
        density: The target: log densities and gradients at rows.
        base: Where the path starts.
        num_particles: Particles N.
        budget: Evaluations after which the rest of the path is taken in one step.
        generator: Source of all randomness.

    Attributes:
        temperatures: From the first above 0 to 1.
        acceptance: Mean acceptance probability at each of them.
        log_evidence: Log of the target's integral over the base's, an estimate.
        num_evaluations: Rows at which the target was evaluated.
        cut_to: Share of the particles that a forced last step left effective, 1 without one.
        draws: Draws of the target, once collected, shape ``(num_sweeps * N, D)``.
        log_density: Log densities there.
        stein: Per particle and coordinate, what averages to zero over draws of the target: the
            gradient, and one plus position times gradient, shape ``(N, 2, D)``.

    Example:
        >>> from pyro_mf.kernels.student_t import StudentT
        >>> run = AnnealedRun(
        ...     lambda z: (-0.5 * z.square().sum(-1), -z),
        ...     StudentT(torch.zeros(2).double(), 2.0 * torch.eye(2).double(), 7.0),
        ...     num_particles=128,
        ...     budget=10**6,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> run.anneal()
        >>> run.collect(2)
        >>> run.draws.shape
        torch.Size([256, 2])
    """

    def __init__(
        self,
        density: Evaluate,
        base: Base,
        num_particles: int,
        budget: int,
        generator: torch.Generator,
    ) -> None:
        self.density, self.base, self.budget, self.generator = density, base, budget, generator
        self.z = base.sample(num_particles, generator)
        self.step = StepSize(1.4 * self.z.shape[1] ** -0.25, _TARGET_ACCEPTANCE)
        self.temperatures: list[float] = []
        self.acceptance: list[float] = []
        self.log_evidence = 0.0
        self.num_evaluations = 0
        self.cut_to = 1.0
        self.draws = self.log_density = self.stein = torch.empty(0)

    def anneal(self) -> None:
        """Follow the path to temperature 1."""
        size, temperature = len(self.z), 0.0
        while temperature < 1.0:
            log_ratio = self._log_ratio()
            rest = 1.0 - temperature
            step = temper(log_ratio, KEPT_ESS * size, rest)
            if self.num_evaluations > self.budget or len(self.temperatures) == _MAX_TEMPERATURES:
                step = rest
                self.cut_to = float(effective_sample_size(rest * log_ratio)) / size
            temperature = 1.0 if step == rest else temperature + step
            log_weights = step * log_ratio
            self.log_evidence += float(torch.logsumexp(log_weights, 0)) - math.log(size)
            self.temperatures.append(temperature)
            self._resample(torch.softmax(log_weights, 0))
            self._move(temperature)

    def collect(self, num_sweeps: int) -> None:
        """Keep the states that moves at the target pass through."""
        target = self._tempered(1.0)
        state = HMCState.at(target, self.z)
        states = []
        for _ in range(num_sweeps):
            state, _ = self._transition(target, state)
            states.append(state)
        self.draws = torch.cat([s.z for s in states])
        self.log_density = torch.cat([s.log_density for s in states])
        terms = [torch.stack([s.gradient, 1.0 + s.z * s.gradient], 1) for s in states]
        self.stein = torch.stack(terms).mean(0)

    def _log_ratio(self) -> Tensor:
        """Log of target over base at the particles; ``-inf`` where either has no density.

        Raises:
            NonFiniteError: If that is at all of them.
        """
        self.num_evaluations += len(self.z)
        ratio = self.density(self.z)[0] - self.base.value_and_grad(self.z)[0]
        ratio = torch.where(torch.isfinite(ratio), ratio, -torch.inf)
        if not bool(torch.isfinite(ratio).any()):
            raise NonFiniteError(
                f"the density is zero or not finite at all of {len(ratio)} draws of the base "
                "density, so there is no path to it. Take a base that overlaps with the target."
            )
        return ratio

    def _tempered(self, temperature: float) -> Evaluate:
        def density(z: Tensor) -> tuple[Tensor, Tensor]:
            self.num_evaluations += len(z)
            value, gradient = self.density(z)
            if temperature < 1.0:
                base_value, base_gradient = self.base.value_and_grad(z)
                value = temperature * value + (1.0 - temperature) * base_value
                gradient = temperature * gradient + (1.0 - temperature) * base_gradient
            bad = ~(torch.isfinite(value) & torch.isfinite(gradient).all(-1))
            return value.masked_fill(bad, -torch.inf), gradient.masked_fill(bad[:, None], 0.0)

        return density

    def _resample(self, weights: Tensor) -> None:
        """Systematic resampling, and the metric of the weighted particles.

        Particles are taken in the order in which they lie along the widest direction, so that
        chance has little say in how many of them each of two modes keeps.
        """
        size, dim = self.z.shape
        _, covariance = weighted_moments(self.z, weights)
        sd = covariance.diagonal().clamp_min(torch.finfo(weights.dtype).tiny).sqrt()
        correlation = covariance / torch.outer(sd, sd)
        if dim <= _MAX_DENSE:
            shrinkage = dim / (dim + float(1.0 / weights.square().sum()))
            identity = torch.eye(dim).to(correlation)
            shrunk = (1.0 - shrinkage) * correlation + shrinkage * identity
            self.metric = Metric(sd[:, None] * torch.linalg.cholesky(shrunk))
            widest = torch.linalg.eigh(shrunk).eigenvectors[:, -1]
            order = (self.z / sd @ widest).argsort()
        else:
            self.metric = Metric(sd)
            order = torch.arange(size)
        start = torch.rand((), generator=self.generator, dtype=weights.dtype)
        positions = (torch.arange(size) + start) / size
        chosen = torch.searchsorted(weights[order].cumsum(0), positions).clamp_max(size - 1)
        self.z = self.z[order[chosen]]

    def _move(self, temperature: float) -> None:
        density = self._tempered(temperature)
        state = begin = HMCState.at(density, self.z)
        accepted = []
        self.step.settle()
        for _ in range(_MAX_MOVES):
            state, acceptance = self._transition(density, state)
            accepted.append(acceptance)
            self.step.update(acceptance)
            if float(_jump(begin, state).min()) >= _ENOUGH_JUMP:
                break
        self.step.settle()
        self.acceptance.append(sum(accepted) / len(accepted))
        self.z = state.z

    def _transition(self, density: Evaluate, state: HMCState) -> tuple[HMCState, float]:
        """Move all particles once; the state and the mean acceptance probability."""
        jitter, rounding = torch.rand(2, generator=self.generator).tolist()
        # Lengths from half to one and a half, rounded at random: no direction is always met at its
        # own period.
        length = _LENGTH * (0.5 + jitter)
        num_steps = min(max(int(length / self.step.value + rounding), 1), _MAX_STEPS)
        moved, acceptance = hmc_transition(
            density, state, self.step.value, num_steps, self.metric, self.generator
        )
        return moved, float(acceptance.mean())


def _jump(begin: HMCState, end: HMCState) -> Tensor:
    """How far coordinates, and log densities, moved: 1 from one independent draw to another."""
    before, after = (torch.cat([s.z, s.log_density[:, None]], 1) for s in (begin, end))
    return (after - before).square().mean(0) / (2.0 * before.var(0))
