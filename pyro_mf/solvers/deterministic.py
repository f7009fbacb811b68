"""The deterministic solver: a mean-field Normal fitted over fixed draws, up to a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks, Evaluate
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.solvers.certificate import Certificate, certify, describe_kinks
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import Curvature, Estimate, FixedDrawELBO, estimate_from
from pyro_mf.solvers.improper import describe_loose, describe_runaway
from pyro_mf.solvers.lockstep import run_in_lockstep
from pyro_mf.solvers.meter import BudgetSpentError, Meter, MeteredELBO
from pyro_mf.solvers.minimise import descend, polish
from pyro_mf.solvers.outcome import Outcome, Report, StopReason, silent
from pyro_mf.solvers.scales import settle_scales
from pyro_mf.solvers.start import describe_wrong_gradient, find_starts

_FIRST_DRAWS, _MAX_DRAWS, _FRESH_DRAWS = 32, 512, 512
# The first and the last of these where draws are costly: such posteriors have much data, and little
# noise.
_FIRST_COSTLY_DRAWS, _FRESH_COSTLY_DRAWS = 16, 128
# Nats by which two ELBOs over the same draws may differ at one optimum.
_SAME_ELBO = 0.05
# Nats of standard error from which on the ELBO is worth the more draws.
_MAX_ELBO_SE = 0.3


def solve_deterministic(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    *,
    seed: int = 0,
    tolerance: float = 0.1,
    max_gradients: int = 5000,
    disperse: bool = False,
    report: Report = silent,
) -> Outcome:
    """Fit Normal factors by minimising the negative ELBO over fixed draws.

    The number of draws is doubled until their error is below the tolerance, and the point is
    accepted when it has a certificate: a Newton decrement of zero to rounding, and the same ELBO
    over fresh draws, up to its error. Ctrl-C ends the run; the guide then holds the best point.

    Args:
        log_joint: The density, of the full data.
        guide: A guide with Normal factors for the same latents, set up. Its locations are where the
            way to the optimum starts; it gets the optimum.
        seed: Seed of all draws; the same seed gives the same bits.
        tolerance: Error of each location that the fixed draws may cause, in posterior sds.
        max_gradients: Gradients of the ELBO after which the run ends.
        disperse: Start at a random point of the seed's and not at the guide's locations.
        report: Called with the progress.

    Returns:
        The outcome, with the linear response where there is one.

    Raises:
        ModelError: If no finite starting point was found, the log density does not depend on some
            latent, or its gradient is not its derivative.

    References:
        Giordano, Ingram and Broderick (2024), Black Box Variational Inference with a Deterministic
        Objective, https://arxiv.org/abs/2304.05527
        Burroni, Domke and Sheldon (2024), Sample Average Approximation for Black-Box VI,
        https://arxiv.org/abs/2304.06803
    """
    origin = None if disperse else _loc(guide)
    run = _Run(Blocks(log_joint), origin, seed, tolerance, Meter(max_gradients, report))
    outcome, x = run.solve()
    if x is not None:
        guide.set_flat_params(_params(guide, x))
    return outcome


def solve_from_many(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    seeds: Sequence[int],
    *,
    reports: Sequence[Report],
    tolerance: float = 0.1,
    max_gradients: int = 5000,
) -> list[tuple[Outcome, tuple[Tensor, ...]] | Exception]:
    """Fit from several starts at once: the guide's locations, then random points.

    All runs share their evaluations of the density, which takes little longer than one run.

    Args:
        log_joint: The density, of the full data.
        guide: A guide with Normal factors, set up; it keeps its parameters.
        seeds: A seed per start.
        reports: Where each reports its progress.
        tolerance: As for :func:`solve_deterministic`.
        max_gradients: Budget of each run.

    Returns:
        Per start the outcome and the family's parameters at its end, or the exception that ended
        it.
    """
    origin, count, began = _loc(guide), len(seeds), time.perf_counter()
    _ = log_joint.footprint  # runs the model, and Pyro's handlers serve one thread at a time

    def job(k: int) -> Callable[[Evaluate], tuple[Outcome, Tensor | None]]:
        def solve(evaluate: Evaluate) -> tuple[Outcome, Tensor | None]:
            blocks = Blocks(log_joint, evaluate, num_sharing=count)
            meter = Meter(max_gradients, reports[k])
            return _Run(blocks, None if k else origin, seeds[k], tolerance, meter).solve()

        return solve

    ended = run_in_lockstep(log_joint.value_and_grad, [job(k) for k in range(count)])
    share = (time.perf_counter() - began) / count
    found: list[tuple[Outcome, tuple[Tensor, ...]] | Exception] = []
    for end in ended:
        if isinstance(end, KeyboardInterrupt):
            found.append(ModelError("interrupted before it had a point to keep"))
            continue
        if isinstance(end, BaseException):
            if not isinstance(end, Exception):
                raise end
            found.append(end)
            continue
        outcome, x = end
        params = guide.flat_params() if x is None else _params(guide, x)
        seconds = {"optimise": share}  # of the time of all
        found.append((replace(outcome, seconds=seconds), tuple(p.detach() for p in params)))
    return found


def _loc(guide: FactorisedGuide) -> Tensor:
    return guide.flat_params()[0].detach().to("cpu", torch.float64)


def _params(guide: FactorisedGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    loc, log_scale = x.to(guide.flat_leaves()[0]).chunk(2)
    return loc, log_scale.exp()


@dataclass(eq=False)
class _Run:
    blocks: Blocks
    origin: Tensor | None
    seed: int
    tolerance: float
    meter: Meter
    x: Tensor | None = None
    fresh: Estimate = Estimate(math.nan, math.nan)
    certificate: Certificate | None = None
    notes: list[str] = field(default_factory=list)

    def solve(self) -> tuple[Outcome, Tensor | None]:
        began, log_joint = time.perf_counter(), self.blocks.log_joint
        self.fresh_elbo = self._fresh(
            _FRESH_COSTLY_DRAWS if self.blocks.is_costly else _FRESH_DRAWS
        )
        captured = log_joint.capture_seconds
        try:
            reason, message = self._optimise()
        except BudgetSpentError:
            reason = "budget"
            message = f"the budget of {self.meter.num_gradients} gradients is spent"
        except KeyboardInterrupt:
            reason, message = "interrupted", "interrupted by the user"
        if self.certificate is None:
            self._take_best()
        elif self.fresh.se > _MAX_ELBO_SE and reason == "converged" and self.x is not None:
            self.fresh = self._fresh(_FRESH_DRAWS).estimate(self.x)
        capture = log_joint.capture_seconds - captured
        certificate = self.certificate
        outcome = Outcome(
            elbo=self.fresh.elbo,
            elbo_se=self.fresh.se,
            stop_reason=reason,
            message=message,
            losses=tuple(self.meter.losses),
            num_gradients=self.meter.num_gradients,
            seconds={"capture": capture, "optimise": time.perf_counter() - began - capture},
            notes=tuple(self.notes),
            response=None if certificate is None else certificate.response,
            refusal="" if certificate is None else certificate.refusal,
        )
        return outcome, self.x

    def _optimise(self) -> tuple[StopReason, str]:
        """Double the draws until the optimum has its certificate."""
        elbo = self._objective(_FIRST_COSTLY_DRAWS if self.blocks.is_costly else _FIRST_DRAWS)
        x = self._best_of(elbo, find_starts(elbo, self.origin, seed=self.seed))
        while True:
            x, curvature = polish(elbo, x)
            certificate = self._examine(elbo, x, curvature)
            complaints = certificate.complaints(self.tolerance)
            if not complaints:
                return "converged", self._describe_optimum(elbo.num_draws, certificate)
            is_loose = math.isinf(certificate.decrement)
            runaway = describe_runaway(self.blocks, x, seed=self.seed) if is_loose else ""
            if runaway:
                return "diverged", runaway
            if elbo.num_draws >= _MAX_DRAWS:
                ending = f"with {elbo.num_draws} fixed draws {', and '.join(complaints)}"
                if is_loose and curvature is not None:
                    ending += f". {describe_loose(self.blocks, curvature)}"
                return "budget", ending
            elbo = self._objective(2 * elbo.num_draws)
            x = descend(elbo, x)

    def _examine(self, elbo: FixedDrawELBO, x: Tensor, curvature: Curvature | None) -> Certificate:
        """Certify an optimum, settle its scales, and keep it unless a better point is known."""
        pairs = self.fresh_elbo.pair_elbos(x)
        certificate = certify(elbo, x, curvature, estimate_from(pairs))
        if curvature is not None:
            x, pairs, certificate = self._settle(x, pairs, certificate, curvature)
        if certificate.response is not None:
            gain = estimate_from(self.fresh_elbo.response_elbos(certificate.response) - pairs)
            if gain.elbo > 0.0:
                sd = certificate.response.sd
                certificate = replace(certificate, sd=sd, is_believed=True)
        fresh = estimate_from(pairs)
        is_worse = fresh.elbo < self.fresh.elbo - max(1.0, 4.0 * self.fresh.se)
        if self.x is None or not is_worse or not certificate.complaints(self.tolerance):
            self.x, self.fresh, self.certificate = x, fresh, certificate
        self.meter.elbo_se = fresh.se
        return certificate

    def _settle(
        self, x: Tensor, pairs: Tensor, certificate: Certificate, curvature: Curvature
    ) -> tuple[Tensor, Tensor, Certificate]:
        """Take the scales of the expected curvature, unless fresh draws speak against them."""
        loc_noise, scale_noise = certificate.noise.chunk(2)
        settled, scale_noise = settle_scales(x, scale_noise, curvature)
        settled_pairs = self.fresh_elbo.pair_elbos(settled)
        gain = estimate_from(settled_pairs - pairs)
        if gain.elbo > -2.0 * gain.se:
            noise = torch.cat([loc_noise, scale_noise])
            return settled, settled_pairs, replace(certificate, noise=noise)
        kinks = describe_kinks(x, curvature)
        if kinks:
            scale = x[len(loc_noise) :].exp()
            certificate = replace(certificate, response=None, refusal=kinks, sd=scale)
        return x, pairs, certificate

    def _fresh(self, num_draws: int) -> FixedDrawELBO:
        """The ELBO over draws that the solver does not optimise over."""
        draws = fixed_draws(num_draws, self.blocks.size, seed=self.seed + 1_000_003)
        return FixedDrawELBO(self.blocks, draws)

    def _objective(self, num_draws: int) -> MeteredELBO:
        draws = fixed_draws(num_draws, self.blocks.size, seed=self.seed)
        return MeteredELBO(self.blocks, draws, self.meter)

    def _check_density(self, elbo: FixedDrawELBO, x: Tensor) -> None:
        """Refuse what no solver that follows the gradient can fit.

        Raises:
            ModelError: If the log density is flat, or its gradient is not its derivative.
        """
        loc, scale = elbo.split(x)
        gradients = self.blocks.value_and_grad(loc + scale * elbo.draws)[1]
        flat = self.blocks.log_joint.layout.describe_flat(gradients)
        if flat is not None:
            raise ModelError(f"{flat}. Its posterior is improper, and the ELBO has no maximum.")
        wrong = describe_wrong_gradient(elbo, x)
        if wrong is not None:
            raise ModelError(f"the gradient of the log density is not its derivative: {wrong}.")

    def _best_of(self, elbo: MeteredELBO, starts: Iterator[Tensor]) -> Tensor:
        """Descend from one start after another, until the best ELBO has been reached twice.

        Raises:
            ModelError: If there is no start, or the density cannot be fitted.
        """
        found: list[Estimate] = []
        best = -math.inf
        for start in starts:
            if not found:
                self._check_density(elbo, start)
            self.meter.best = None
            x = descend(elbo, start)
            estimate = self.fresh_elbo.estimate(x)
            found.append(estimate)
            agrees = abs(estimate.elbo - best) < _SAME_ELBO
            if self.x is None or estimate.elbo > best:
                self.x, self.fresh, best = x, estimate, estimate.elbo
            if agrees:
                break
        worse = [e.elbo for e in found if e.elbo < best - max(1.0, 4.0 * e.se)]
        if worse:
            self.notes.append(
                f"of {len(found)} starts, {len(worse)} stopped lower (ELBO "
                f"{', '.join(f'{elbo:.1f}' for elbo in worse)} against {best:.1f}): their "
                "descents had not ended, or the ELBO has several optima and num_restarts may find "
                "a better one"
            )
        if self.x is None:
            raise ModelError("no start has a finite log density.")
        return self.x

    def _describe_optimum(self, num_draws: int, certificate: Certificate) -> str:
        return (
            f"the optimum over {num_draws} fixed draws: {certificate.decrement:.1g} nats from it, "
            f"locations within {certificate.loc_noise:.2f} of the sds to believe and scales within "
            f"{certificate.scale_noise:.0%} because of the draws, the same ELBO on fresh draws"
        )

    def _take_best(self) -> None:
        """Of the points that a run without a certificate has seen, take the best on fresh draws."""
        known = [] if self.x is None else [self.x]
        known += [] if self.meter.best is None else [self.meter.best[1]]
        if known:
            estimates = [(self.fresh_elbo.estimate(x), x) for x in known]
            self.fresh, self.x = max(estimates, key=lambda pair: pair[0].elbo)
