"""Parallel chains run until their Monte Carlo error is small, or they are seen not to agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_mf.density import Layout
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels import Metric, Mixing, ParallelHMC, initialise, measure_mixing
from pyro_mf.kernels.mixing import effective_sample_size
from pyro_mf.solvers.posterior_draws import PosteriorDraws, Source
from pyro_mf.solvers.scouts import LOWER, LOWER_EACH

_WARM_UP, _ROUND = 200, 50
# R-hat up to which chains agree, and above which more iterations are not the cure.
MAX_RHAT, _HOPELESS_RHAT = 1.05, 1.5
# After as many iterations as are the last word chains that are still so far apart are slow for a
# reason: in a funnel they pass the other checks by chance.
MAX_LATE_RHAT = 1.02
_DOUBTFUL_RHAT = 1.1
_NUM_TUNINGS = 3  # times that chains are warmed up anew if they disagree
_PATIENCE = 150  # iterations by which they are to agree
_GROWTH = 3  # a round is as long as all before it, over this
# Share of trajectories that may diverge: more of them mean a region that chains do not enter.
_MAX_DIVERGENT = 0.002
_LAST_WORD = 300  # iterations that are enough to know this share
# How the one problem begins that is no doubt about the chains: they are too short.
IMPRECISE = "the largest Monte Carlo error"
_MAX_ELEMENTS = 2**25  # of the draws that are kept, 256 MiB; beyond, every other one is dropped


@dataclass(frozen=True, eq=False)
class ChainDraws:
    """Draws of parallel chains.

    Args:
        z: Shape ``(T, N, D)``.
        log_density: Shape ``(T, N)``.
    """

    z: Tensor
    log_density: Tensor

    @cached_property
    def mixing(self) -> Mixing:
        """How well the chains agree."""
        return measure_mixing(self.z)

    @property
    def largest_error(self) -> float:
        """The largest standard error of a mean, in sds, or of an sd, relative."""
        return float(torch.maximum(self.mixing.mcse_mean, self.mixing.mcse_sd).max())

    def expectation(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Averages of functions ``(T * N, K)`` of the draws, and standard errors, each ``(K,)``."""
        chains = values.reshape(*self.log_density.shape, -1)
        error = chains.std((0, 1)) / effective_sample_size(chains).sqrt()
        return chains.mean((0, 1)), error

    def problems(self, names: list[str], max_rhat: float = MAX_RHAT) -> tuple[str, ...]:
        """Why the draws are not to be trusted, in words.

        Args:
            names: A name per latent element.
            max_rhat: R-hat up to which chains agree.
        """
        found = []
        mixed = self.mixing
        if not mixed.worst_rhat <= max_rhat:
            worst = torch.maximum(mixed.rhat, mixed.rhat_squares)
            index = int(worst.argmax())
            found.append(
                f"the chains do not agree (R-hat {mixed.worst_rhat:.2f} of '{names[index]}', above "
                f"{max_rhat})"
            )
        idle = int((self.z == self.z[0]).all(0).any(-1).sum())
        if idle:
            found.append(f"{idle} of {self.z.shape[1]} chains never move in some latent")
        return tuple(found)

    def freeze(
        self, source: Source, problems: tuple[str, ...], diagnostics: dict[str, float]
    ) -> PosteriorDraws:
        """As draws in one row, with what is known about them."""
        mixed = self.mixing
        count = self.log_density.numel()
        return PosteriorDraws(
            source=source,
            z=self.z.flatten(0, 1),
            log_weights=torch.zeros(count, dtype=self.z.dtype),
            log_density=self.log_density.flatten(),
            mean_error=mixed.mcse_mean,
            sd_error=mixed.mcse_sd,
            problems=problems,
            diagnostics={
                "rhat": mixed.worst_rhat,
                "ess": float(mixed.ess.min()),
                "ess_squares": float(mixed.ess_squares.min()),
                **diagnostics,
            },
        )


class ChainRun:
    """Parallel HMC chains that go on until they know every mean and sd.

    Args:
        density: The log density; it may raise anything, and the draws so far are kept.
        loc: Where the optimum of the reverse KL is.
        metric: Covariance there.
        layout: Names of the latents.
        scouts: Points reached from elsewhere, shape ``(K, D)``; a quarter of the chains start at
            the farthest. If there is another mode, those do not agree with the others.
        starts: Where the others start, shape ``(K, D)``; by default, or where the density is far
            below that of such draws, draws of the Gaussian.
        max_late_rhat: R-hat up to which chains agree that have run for long.
        num_chains: Number of chains.
        max_error: Standard error of means, in sds, and of sds, relative, that is small enough.
        wanted_error: Asked between rounds for the error to stop at, ``max_error`` or smaller.
        generator: Source of randomness.
        report: Told the largest error now and then.

    Raises:
        NonFiniteError: If chains find no place to start.
    """

    def __init__(
        self,
        density: Evaluate,
        loc: Tensor,
        metric: Metric,
        *,
        layout: Layout,
        scouts: Tensor,
        num_chains: int,
        max_error: float,
        wanted_error: Callable[[], float],
        generator: torch.Generator,
        report: Callable[[float], None],
        starts: Tensor | None = None,
        max_late_rhat: float = MAX_LATE_RHAT,
    ) -> None:
        z = initialise(density, loc, metric, num_chains, generator=generator)
        if starts is not None:
            starts = starts[:num_chains]
            # Chains that start far below all that is typical spend the budget on the way.
            lowest = density(z)[0].median() - LOWER - LOWER_EACH * len(loc)
            is_near = density(starts)[0] >= lowest
            z[: len(starts)][is_near] = starts[is_near]
        farthest = metric.whiten(scouts - loc).square().sum(-1).argsort(descending=True)
        farthest = farthest[: num_chains // 4]
        z[num_chains - len(farthest) :] = scouts[farthest]
        self._chains = ParallelHMC(density, z, metric, generator=generator)
        self._names = layout.element_names()
        self._max_error, self._wanted_error = max_error, wanted_error
        self._max_late_rhat = max_late_rhat
        self._report = report
        self._kept = _Kept()

    def run(self) -> None:
        """Go on until the error is small, or the chains are seen never to agree."""
        if not self._kept.count:
            self._chains.warm_up(_WARM_UP)
        tunings = 1
        while True:
            self._kept.add(self._chains)
            found = self._kept.as_chains()
            self._report(found.largest_error)
            if found.largest_error <= self._wanted_error() and not self._problems(found):
                return
            if self._kept.count >= _LAST_WORD and self._kept.divergent > _MAX_DIVERGENT:
                return
            rhat = found.mixing.worst_rhat
            if rhat < _DOUBTFUL_RHAT or self._kept.count < _PATIENCE:
                continue
            if rhat > _HOPELESS_RHAT and tunings > 1:
                return
            if tunings < _NUM_TUNINGS:
                self._chains.warm_up(_WARM_UP)
                anew = _Kept()
                anew.add(self._chains)  # cut short before, there are the draws so far
                self._kept, tunings = anew, tunings + 1

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong but that there are too few draws."""
        if not self._kept.count:
            return False
        agree = not self._problems(self._kept.as_chains())
        return agree and self._kept.divergent <= _MAX_DIVERGENT

    def _problems(self, found: ChainDraws) -> tuple[str, ...]:
        is_late = self._kept.count >= _LAST_WORD
        return found.problems(self._names, self._max_late_rhat if is_late else MAX_RHAT)

    def found(self) -> tuple[ChainDraws, PosteriorDraws] | None:
        """The draws so far and what is to be said about them; ``None`` where there are none."""
        if not self._kept.count:
            return None
        found = self._kept.as_chains()
        problems = self._problems(found)
        if found.largest_error > self._max_error:
            problems += (
                f"{IMPRECISE} of a mean or sd is {found.largest_error:.3f} sds, "
                f"where {self._max_error:.3f} was wanted",
            )
        if self._kept.divergent > _MAX_DIVERGENT:
            problems += (
                f"{self._kept.divergent:.1%} of the trajectories diverged: there is a region of "
                "high curvature, such as the neck of a funnel, that the chains enter too rarely. A "
                "non-centred parametrisation may cure it",
            )
        diagnostics = {
            "acceptance": float(self._chains.acceptance.mean()),
            "num_divergent": float(self._kept.num_divergent),
            "num_chains": float(found.z.shape[1]),
            "step_size": self._chains.step_size,
            "num_steps": self._chains.num_steps,
        }
        return found, found.freeze("hmc", problems, diagnostics)


class _Kept:
    """The draws of one tuning, thinned where they become too many."""

    def __init__(self) -> None:
        self.count = self.num_divergent = self.num_trajectories = 0
        self._z: list[Tensor] = []
        self._log_density: list[Tensor] = []
        self._stride = 1

    @property
    def divergent(self) -> float:
        """Share of the trajectories that diverged."""
        return self.num_divergent / max(self.num_trajectories, 1)

    def add(self, chains: ParallelHMC) -> None:
        new = chains.sample(max(_ROUND, self.count * self._stride // _GROWTH))
        self.num_divergent += chains.num_divergent
        self.num_trajectories += new.log_density.numel()
        self._z.append(new.z[:: self._stride])
        self._log_density.append(new.log_density[:: self._stride])
        self.count += len(self._z[-1])
        if self.count * new.z[0].numel() > _MAX_ELEMENTS:
            self._stride *= 2
            z, log_density = self._joined()
            self._z, self._log_density = [z[::2].clone()], [log_density[::2].clone()]
            self.count = len(self._z[0])

    def as_chains(self) -> ChainDraws:
        return ChainDraws(*self._joined())

    def _joined(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self._z), torch.cat(self._log_density)
