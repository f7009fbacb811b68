"""The deterministic solver for mixtures of mean fields: modes first, then all at once."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.guides import AutoMeanField
from pyro_mf.guides.auto_mean_field_mixture import AutoMeanFieldMixture
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.fixed_draw_elbo import estimate_from
from pyro_mf.solvers.meter import BudgetSpentError, Meter
from pyro_mf.solvers.minimise import lbfgs
from pyro_mf.solvers.mixture_elbo import Components, MixtureELBO
from pyro_mf.solvers.modes import Mode, Modes, find_modes, place_components
from pyro_mf.solvers.normal_start import START_TOLERANCE
from pyro_mf.solvers.outcome import Outcome, Report, StopReason, silent

# Draws of every component.
_FIRST_DRAWS, _MAX_DRAWS = 64, 1024
_FIRST_COSTLY_DRAWS = 16
_FRESH_DRAWS, _FRESH_COSTLY_DRAWS = 2048, 256  # of all components together
_MAX_ITERATIONS, _FIRST_ITERATIONS = 500, 50  # the latter from every start, before the best goes on
_Z = 2.0  # standard errors within which two ELBOs are taken for the same
_NO_WEIGHT = 1e-3  # a component with less carries nothing
_INIT_SCALE = 0.1
_REFUSAL = "linear response is for one mean field, not for a mixture"


def solve_mixture(
    log_joint: LogJoint,
    guide: AutoMeanFieldMixture,
    *,
    seed: int = 0,
    tolerance: float = 0.1,
    max_gradients: int = 5000,
    disperse: bool = False,
    report: Report = silent,
) -> Outcome:
    """Fit a mixture of mean fields by minimising the negative ELBO over fixed noise.

    One mean field is fitted first. Scouts that start far from it reach other modes, where more
    are fitted; what components are left follow the modes' widths. Then all parameters are
    optimised together, over twice as many draws each time, until the mixture is the same. It is
    never worse than the one mean field. Ctrl-C ends the run; the guide then holds the best point.

    Args:
        log_joint: The density, of the full data.
        guide: A mixture guide for the same latents, set up; it gets the optimum. The middle of its
            components is where the way to the first fit starts.
        seed: Seed of all draws; the same seed gives the same bits.
        tolerance: By how much means, in sds, and sds, relative, may move when the draws are
            doubled.
        max_gradients: Gradients of the ELBO after which the run ends.
        disperse: Start at a random point of the seed's.
        report: Called with the progress.

    Returns:
        The outcome.

    Raises:
        ModelError: If no finite starting point was found, the log density does not depend on some
            latent, or its gradient is not its derivative.

    References:
        Morningstar et al. (2021), Automatic Differentiation Variational Inference with Mixtures,
        https://arxiv.org/abs/2003.01687
    """
    began, num = time.perf_counter(), guide.num_components
    normal: Any = AutoMeanField(log_joint.model)
    normal.setup(*log_joint.model_args, **log_joint.model_kwargs)
    origin = guide.flat_params()[0].detach().mean(1)
    normal.set_flat_params((origin, torch.full_like(origin, _INIT_SCALE)))
    one = solve_deterministic(
        log_joint,
        normal,
        seed=seed,
        tolerance=tolerance if num == 1 else START_TOLERANCE,
        max_gradients=max_gradients,
        disperse=disperse,
        report=report,
    )
    loc, scale = (p.detach().double().cpu() for p in normal.flat_params())
    first = Mode(loc, scale.log(), one.elbo)
    if num == 1 or one.stop_reason in ("interrupted", "diverged"):
        _write(guide, _copies(first, num))
        return replace(one, response=None, refusal=_REFUSAL)
    meter = Meter(max(1, max_gradients - one.num_gradients), report)
    run = _Run(Blocks(log_joint), num, seed, tolerance, meter)
    reason, message = run.solve(first)
    _write(guide, run.elbo_over_fresh.split(run.x))
    return Outcome(
        elbo=run.elbo,
        elbo_se=run.elbo_se,
        stop_reason=reason,
        message=message,
        losses=(*one.losses, *meter.losses),
        num_gradients=one.num_gradients + meter.num_gradients,
        seconds={"optimise": time.perf_counter() - began},
        notes=tuple(run.notes),
        refusal=_REFUSAL,
    )


def _copies(mode: Mode, num: int) -> Components:
    """A mixture that is one Normal, K times."""
    shape = (len(mode.loc), num)
    loc, log_scale = (x[:, None].expand(shape).clone() for x in (mode.loc, mode.log_scale))
    return Components(loc, log_scale, torch.zeros(num, dtype=loc.dtype))


def _write(guide: AutoMeanFieldMixture, components: Components) -> None:
    like = guide.flat_leaves()[0]
    guide.set_flat_params(tuple(p.to(like) for p in components.params))


class _Run:
    def __init__(
        self, blocks: Blocks, num_components: int, seed: int, tolerance: float, meter: Meter
    ) -> None:
        self.blocks, self.num, self.meter = blocks, num_components, meter
        self.seed, self.tolerance = seed, tolerance
        self.x, self.pairs = torch.empty(0), torch.empty(0)
        self.elbo, self.elbo_se = math.nan, math.nan
        self.notes: list[str] = []
        total = _FRESH_COSTLY_DRAWS if blocks.is_costly else _FRESH_DRAWS
        self.elbo_over_fresh = self._elbo(
            max(32, 2 * (total // (2 * num_components))), seed + 1_000_003
        )

    def solve(self, first: Mode) -> tuple[StopReason, str]:
        single = self.elbo_over_fresh.flatten(_copies(first, self.num))
        single_pairs = self.elbo_over_fresh.pair_elbos(single)
        self._keep(single, single_pairs)
        try:
            modes = find_modes(self.blocks, first, self.num, seed=self.seed, meter=self.meter)
            self._note_modes(modes)
            reason, message = self._optimise(modes)
        except BudgetSpentError:
            reason = "budget"
            message = f"the budget of {self.meter.num_gradients} gradients is spent"
        except KeyboardInterrupt:
            reason, message = "interrupted", "interrupted by the user"
        best = self.meter.best
        if reason in ("budget", "interrupted") and best and best[1].shape == single.shape:
            self._keep_if_better(best[1])
        self._note_gain(single_pairs)
        return reason, message

    def _optimise(self, modes: Modes) -> tuple[StopReason, str]:
        num_draws = _FIRST_COSTLY_DRAWS if self.blocks.is_costly else _FIRST_DRAWS
        elbo = self._elbo(num_draws, self.seed)
        starts = place_components(self.blocks, modes, self.num, seed=self.seed)
        x = self._best_of(elbo, [elbo.flatten(start) for start in starts])
        before: tuple[Components, Tensor] | None = None
        while True:
            x = self._descend(elbo, x, _MAX_ITERATIONS)
            pairs = self._keep_if_better(x)
            now = elbo.split(x)
            if before is not None:
                moved, stretched = _changes(before[0], now)
                gain = estimate_from(pairs - before[1])
                ending = (
                    f"over {num_draws} fixed draws of each component means are within "
                    f"{moved:.2f} sds, sds within {stretched:.0%} and the ELBO within "
                    f"{abs(gain.elbo):.3f} nats of those over half as many"
                )
                # What shifts of so many sds cost, if all elements have them.
                allowed = 0.5 * self.tolerance**2 * self.blocks.size + _Z * gain.se
                if max(moved, stretched) <= self.tolerance and abs(gain.elbo) <= allowed:
                    return "converged", f"an optimum of {self.num} components: {ending}"
                if num_draws >= _MAX_DRAWS:
                    return "budget", f"{ending}, more than the tolerance of {self.tolerance:g}"
            before = now, pairs
            num_draws *= 2
            elbo = self._elbo(num_draws, self.seed)

    def _best_of(self, elbo: MixtureELBO, starts: list[Tensor]) -> Tensor:
        """Descend a little from every start, and keep where the ELBO is highest."""
        if len(starts) > 1:
            starts = [self._descend(elbo, start, _FIRST_ITERATIONS) for start in starts]
        elbos = [estimate_from(self.elbo_over_fresh.pair_elbos(x)).elbo for x in starts]
        return starts[max(range(len(starts)), key=elbos.__getitem__)]

    def _descend(self, elbo: MixtureELBO, x: Tensor, max_iterations: int) -> Tensor:
        if not math.isfinite(elbo.value_and_gradient(x)[0]):
            return self.x  # the draws reach out of the density's domain
        return lbfgs(
            elbo.value_and_gradient,
            x,
            elbo.unit_metric(x),
            max_iterations=max_iterations,
            gradient_tolerance=1e-3,
            value_tolerance=max(1e-10, 10.0 * torch.finfo(self.blocks.log_joint.dtype).eps),
        )

    def _elbo(self, num_draws: int, seed: int) -> MixtureELBO:
        return MixtureELBO(self.blocks, self.num, num_draws, seed=seed, meter=self.meter)

    def _keep(self, x: Tensor, pairs: Tensor) -> None:
        self.x, self.pairs = x, pairs
        self.elbo, self.elbo_se = estimate_from(pairs)
        self.meter.elbo_se = self.elbo_se

    def _keep_if_better(self, x: Tensor) -> Tensor:
        """The ELBO over each pair of fresh draws; the point is kept if that is higher."""
        pairs = self.elbo_over_fresh.pair_elbos(x)
        if float(pairs.mean()) >= self.elbo:
            self._keep(x, pairs)
        return pairs

    def _note_modes(self, modes: Modes) -> None:
        fits = modes.fits
        if len(fits) > self.num:
            below = fits[0].elbo - fits[self.num].elbo
            self.notes.append(
                f"{len(fits)} local optima of one mean field were found, more than the {self.num} "
                f"components: the lowest are left out, the best of them {below:.2f} nats below the "
                "highest of all. More components would hold more of the posterior"
            )
        elif len(fits) > 1:
            self.notes.append(f"{len(fits)} local optima of one mean field were found")
        if modes.no_prior:
            self.notes.append(modes.no_prior)

    def _note_gain(self, single: Tensor) -> None:
        gain = estimate_from(self.pairs - single)
        self.notes.append(
            f"the ELBO is {gain.elbo:.3f} +- {gain.se:.3f} nats above that of one mean field"
        )
        weights = self.elbo_over_fresh.split(self.x).weights
        idle = int((weights < _NO_WEIGHT).sum())
        if idle:
            self.notes.append(
                f"{idle} of {self.num} components carry less than {_NO_WEIGHT:.1%} of the weight: "
                "fewer would do"
            )


def _changes(before: Components, now: Components) -> tuple[float, float]:
    """Largest shift of an element's mean, in sds, and largest relative change of an sd."""
    (mean_before, sd_before), (mean, sd) = before.moments(), now.moments()
    shift, stretch = (mean - mean_before).abs() / sd, (sd / sd_before).log().abs()
    return float(shift.max()), float(stretch.max())
