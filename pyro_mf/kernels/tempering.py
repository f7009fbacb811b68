r"""Tempered sequential Monte Carlo: from a base density to the target without losing a mode.

Particles start in a base density :math:`b` that is easy to draw from and wide enough to reach all
of the target :math:`p`, and follow :math:`b^{1-t} p^t` from t = 0 to 1: at each temperature they
are weighted, resampled, and moved by Hamiltonian trajectories. Several independent runs are
combined by their estimates of the evidence; how far they differ is the error of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import torch
from torch import Tensor

from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels.annealing import KEPT_ESS, AnnealedRun, Base
from pyro_mf.kernels.weighted import WeightedDraws
from pyro_mf.weights import effective_sample_size

_LEAST_ACCEPTANCE = 0.4
_MIN_RUNS, _MAX_RUNS = 4, 16
_EFFECTIVE_RUNS = 0.5  # share of the runs by evidence; where it is less they found other things
_FALSE_ALARM = 1e-3  # chance that draws of the target fail the test of Stein's identities


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
        steps. ``khat`` is ``nan``. The error of the log evidence is the spread between runs only:
        from a vague prior all runs can be low by more, a few nats.

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
    runs: list[AnnealedRun] = []
    while True:
        run = AnnealedRun(density, base, num_particles, max_evaluations // _MIN_RUNS, generator)
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


def _combined(runs: list[AnnealedRun]) -> TemperedDraws:
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


def _problems(runs: list[AnnealedRun], draws: TemperedDraws, tolerance: float) -> list[str]:
    """What speaks against the draws, in words."""
    found = []
    cut = [run.cut_to for run in runs if run.cut_to < KEPT_ESS]
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
    worst = _stein_statistic(runs)
    limit = -NormalDist().inv_cdf(_FALSE_ALARM / (4 * draws.z.shape[1]))
    if not worst <= limit:
        found.append(
            f"the gradients at the draws do not average to what they do over the whole target "
            f"({worst:.1f} standard errors off, of {limit:.1f} by chance): a region next to the "
            "draws is missing, such as the neck of a funnel"
        )
    return found


def _stein_statistic(runs: list[AnnealedRun]) -> float:
    r"""How many standard errors the draws are off Stein's identities, in the worst coordinate.

    Over the target :math:`E[\nabla \log p] = 0` and :math:`E[(z - c) \nabla \log p] = -1` per
    coordinate. Over a part of it, they fail by the density where that is cut off.
    """
    terms = torch.cat([run.stein for run in runs])
    centre = torch.cat([run.draws for run in runs]).mean(0)
    gradient = terms[:, 0]
    both = torch.cat([gradient, terms[:, 1] - centre * gradient], 1)
    error = both.std(0) / math.sqrt(len(both))
    return float((both.mean(0).abs() / error).max())
