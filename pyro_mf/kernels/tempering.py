r"""Tempered sequential Monte Carlo: from a base density to the target without losing a mode.

Particles start in a base density :math:`b` that is easy to draw from and wide enough to reach all
of the target :math:`p`, and follow :math:`b^{1-t} p^t` from t = 0 to 1: at each temperature they
are weighted, resampled, and moved by Hamiltonian trajectories. Several independent runs are
combined by their estimates of the evidence; how far they differ is the error of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels.adaptation import StepSize
from pyro_mf.kernels.hmc import HMCState, hmc_transition
from pyro_mf.kernels.metric import Metric
from pyro_mf.kernels.weighted import WeightedDraws, temper, weighted_moments
from pyro_mf.weights import effective_sample_size

_KEPT_ESS = 0.5  # share of the particles that a change of temperature leaves effective
_MAX_TEMPERATURES = 200
# Particles move at most so often at a temperature, until the mean squared jump of each coordinate,
# and of the log density, is this share of that between independent draws.
_MAX_MOVES, _ENOUGH_JUMP = 12, 0.8
_LENGTH, _MAX_STEPS = math.pi / 2, 16  # of a trajectory, in the metric's unit and in steps
_TARGET_ACCEPTANCE, _LEAST_ACCEPTANCE = 0.8, 0.4
_MAX_DENSE = 300  # dimension up to which the metric knows correlations
_MIN_RUNS, _MAX_RUNS = 4, 16
_EFFECTIVE_RUNS = 0.5  # share of the runs by evidence; where it is less they found other things


class Base(Protocol):
    """A normalised density that can be drawn from."""

    def sample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Draws, shape ``(num_draws, D)``."""
        ...

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities, shape ``(S,)``, and gradients, ``(S, D)``, at rows ``(S, D)``."""
        ...


@dataclass(frozen=True, eq=False)
class TemperedDraws(WeightedDraws):
    """Draws of tempered SMC; a unit is a run, and there is one stratum.

    Args:
        run_log_evidence: Each run's log evidence, in nats, shape ``(R,)``.
        temperatures: For each run its temperatures, from the first above 0 to 1.
        acceptance: For each run the mean acceptance probability at each temperature.
    """

    run_log_evidence: Tensor = field(default_factory=lambda: torch.empty(0))
    temperatures: tuple[tuple[float, ...], ...] = ()
    acceptance: tuple[tuple[float, ...], ...] = ()

    @property
    def ess(self) -> float:
        """Independent draws that would know the worst mean as well as the runs' spread says."""
        return float(1.0 / self.mean_error.square().max())


def tempered_smc(
    density: Evaluate,
    base: Base,
    *,
    generator: torch.Generator,
    num_particles: int = 512,
    num_sweeps: int = 10,
    tolerance: float = 0.03,
    max_evaluations: int = 5_000_000,
) -> TemperedDraws:
    r"""Draw from a density that may have several modes.

    Temperatures are chosen such that each leaves half of the particles effective. Runs, 4 to 16,
    are added until the Monte Carlo error that their spread shows is at most ``tolerance``, or the
    budget is spent. All averages weight a run by its estimate of the evidence.

    Args:
        density: Log densities and gradients at rows.
        base: Where the path starts: the prior, or a wide distribution around a first fit. A mode
            that it does not reach is not found.
        generator: Source of all randomness.
        num_particles: Particles N of a run, at least 16.
        num_sweeps: Moves of all particles at the target, each of which is kept, at least 1.
        tolerance: Largest standard error of a mean, in sds, and of an sd, relative.
        max_evaluations: Budget of gradients, one per particle and step. A run that has used up its
            quarter goes to the target in one step.

    Returns:
        N ``num_sweeps`` draws of every run. Where they cannot be trusted ``problems`` says why:
        runs that disagree, moves that are hardly accepted, a target that was not reached in small
        steps. ``khat`` is ``nan``.

    Raises:
        ValueError: If a number is out of its range.
        NonFiniteError: If the density is zero or not finite at every draw of the base.

    Example:
        >>> def density(z):  # modes at -2 and 2 of sd 0.5
        ...     tanh = torch.tanh(8.0 * z)
        ...     value = -2.0 * z.square() + 8.0 * z.abs() + torch.log1p((-16.0 * z.abs()).exp())
        ...     return value.squeeze(1), -4.0 * z + 8.0 * tanh
        >>> from pyro_mf.kernels.student_t import StudentT
        >>> wide = StudentT(torch.zeros(1).double(), 4.0 * torch.eye(1).double(), 7.0)
        >>> draws = tempered_smc(density, wide, generator=torch.Generator().manual_seed(0))
        >>> draws.trusted, bool((draws.covariance - 4.25).abs() < 0.2)
        (True, True)

    References:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo Samplers, JRSS B 68(3)
        McNamara, Loper and Regier (2024), Sequential Monte Carlo for Inclusive KL Minimization in
        Amortized Variational Inference, https://arxiv.org/abs/2403.10610
    """
    if num_particles < 16 or num_sweeps < 1 or not tolerance > 0.0:
        raise ValueError(
            "expected num_particles of at least 16, num_sweeps of at least 1 and a positive "
            f"tolerance; got {num_particles}, {num_sweeps} and {tolerance}."
        )
    runs: list[_Run] = []
    while True:
        run = _Run(density, base, num_particles, max_evaluations // _MIN_RUNS, generator)
        run.anneal()
        run.collect(num_sweeps)
        runs.append(run)
        if len(runs) < _MIN_RUNS:
            continue
        draws = _combined(runs)
        problems = _problems(runs, draws, tolerance)
        per_run = draws.num_evaluations / len(runs)
        is_spent = draws.num_evaluations + per_run > max_evaluations
        if not problems or is_spent or len(runs) == _MAX_RUNS:
            return replace(draws, problems=tuple(problems))


class _Run:
    """One population on its way from the base to the target."""

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
        self.cut_to = 1.0  # share of the particles that a forced last step left effective

    def anneal(self) -> None:
        """Follow the path to temperature 1."""
        size, temperature = len(self.z), 0.0
        while temperature < 1.0:
            log_ratio = self._log_ratio()
            rest = 1.0 - temperature
            step = temper(log_ratio, _KEPT_ESS * size, rest)
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
        z, log_density = [], []
        for _ in range(num_sweeps):
            state, _ = self._transition(target, state)
            z.append(state.z)
            log_density.append(state.log_density)
        self.draws, self.log_density = torch.cat(z), torch.cat(log_density)

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


def _combined(runs: list[_Run]) -> TemperedDraws:
    """All runs' draws, weighted such that the mean weight is the mean evidence."""
    evidence = torch.tensor([run.log_evidence for run in runs], dtype=torch.float64)
    per_run = len(runs[0].draws)
    return TemperedDraws(
        z=torch.cat([run.draws for run in runs]),
        log_weights=evidence.repeat_interleave(per_run),
        log_density=torch.cat([run.log_density for run in runs]),
        strata=1,
        units=len(runs),
        khat=math.nan,
        num_evaluations=sum(run.num_evaluations for run in runs),
        run_log_evidence=evidence,
        temperatures=tuple(tuple(run.temperatures) for run in runs),
        acceptance=tuple(tuple(run.acceptance) for run in runs),
    )


def _problems(runs: list[_Run], draws: TemperedDraws, tolerance: float) -> list[str]:
    """What speaks against the draws, in words."""
    found = []
    cut = [run.cut_to for run in runs if run.cut_to < _KEPT_ESS]
    if cut:
        found.append(
            f"{len(cut)} of {len(runs)} runs spent their budget on the way and went to the target "
            f"in one step, which left {min(cut):.1%} of the particles effective"
        )
    effective = float(effective_sample_size(draws.run_log_evidence))
    if effective < _EFFECTIVE_RUNS * len(runs):
        spread = float(draws.run_log_evidence.std())
        found.append(
            f"the runs disagree on the log evidence (sd {spread:.2f}), so that only "
            f"{effective:.1f} of {len(runs)} count: some miss what others found"
        )
    acceptance = min(min(run.acceptance) for run in runs)
    if acceptance < _LEAST_ACCEPTANCE:
        found.append(f"at some temperature only {acceptance:.0%} of the moves were accepted")
    mean_error, sd_error = float(draws.mean_error.max()), float(draws.sd_error.max())
    if not max(mean_error, sd_error) <= tolerance:
        found.append(
            f"the {len(runs)} runs leave a standard error of a mean of {mean_error:.3f} sds and of "
            f"an sd of {sd_error:.1%}, where {tolerance:g} was asked for"
        )
    return found
