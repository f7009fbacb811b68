"""The deterministic solver for factors of any family: fixed noise, from the optimum of Normals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks, Evaluate
from pyro_mf.families.protocol import Params
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.solvers.family_elbo import FamilyELBO
from pyro_mf.solvers.fixed_draw_elbo import estimate_from
from pyro_mf.solvers.heavy_tails import describe_infinite
from pyro_mf.solvers.meter import BudgetSpentError, Meter
from pyro_mf.solvers.minimise import lbfgs
from pyro_mf.solvers.normal_start import NormalStart, fit_normal
from pyro_mf.solvers.outcome import Outcome, Report, StopReason, silent

_FIRST_DRAWS, _MAX_DRAWS, _FRESH_DRAWS = 128, 2048, 1024
_FIRST_COSTLY_DRAWS, _FRESH_COSTLY_DRAWS = 32, 128
_PER_ELEMENT = 4  # draws for each element of the largest block, whose covariance they must span
_MAX_ITERATIONS = 300
_VALUE = 1e-7  # relative gain of an iteration below which there is nothing left to gain
_MAX_SHRINKS = 20
_NATS = 0.05  # of ELBO that the fixed draws may cost
_Z = 2.0  # standard errors
_REFUSAL = "linear response is for Normal factors"


def solve_pathwise(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    *,
    seed: int = 0,
    tolerance: float = 0.1,
    max_gradients: int = 5000,
    disperse: bool = False,
    start: NormalStart | None = None,
    evaluate: Evaluate | None = None,
    make_elbo: Callable[..., FamilyELBO] = FamilyELBO,
    report: Report = silent,
) -> Outcome:
    """Fit factors of any family by minimising the negative ELBO over fixed noise.

    The optimum of Normal factors is where it starts. The number of draws is doubled until medians
    and spreads move by less than the tolerance. Ctrl-C ends the run; the guide then holds the best
    point.

    Args:
        log_joint: The density, of the full data.
        guide: A guide for the same latents, set up; it gets the optimum.
        seed: Seed of all draws; the same seed gives the same bits.
        tolerance: By how much medians, in sds, and spreads, relative, may move when the draws are
            doubled.
        max_gradients: Gradients of the ELBO after which the run ends.
        disperse: Start at a random point of the seed's.
        start: The optimum of Normal factors, where it is known.
        evaluate: The density and its gradient at rows, where they are other than the start's.
        make_elbo: Makes the ELBO over fixed noise, where it is another.
        report: Called with the progress.

    Returns:
        The outcome.

    Raises:
        ModelError: If no finite starting point was found.
    """
    began = time.perf_counter()
    if start is None:
        start = fit_normal(
            log_joint,
            guide,
            seed=seed,
            max_gradients=max_gradients,
            disperse=disperse,
            report=report,
        )
    first = guide.family.init(start.loc, start.scale)
    if start.outcome is not None and start.outcome.stop_reason == "interrupted":
        guide.set_flat_params(tuple(p.to(guide.flat_leaves()[0]) for p in first))
        return replace(start.outcome, response=None, refusal=_REFUSAL)
    spent = 0 if start.outcome is None else start.outcome.num_gradients
    meter = Meter(max(1, max_gradients - spent), report)
    meter.losses = [] if start.outcome is None else list(start.outcome.losses)
    run = _Run(Blocks(log_joint, evaluate), guide, seed, tolerance, meter, make_elbo)
    if start.outcome is None:
        run.start = "start"
    reason, message = run.solve(first)
    infinite = describe_infinite(run.blocks, guide)
    if infinite:
        reason, message = "diverged", infinite
    return Outcome(
        elbo=-math.inf if infinite else run.elbo,
        elbo_se=math.nan if infinite else run.elbo_se,
        stop_reason=reason,
        message=message,
        losses=tuple(meter.losses),
        num_gradients=spent + meter.num_gradients,
        seconds={"optimise": time.perf_counter() - began},
        notes=() if infinite else tuple(run.notes),
        refusal=_REFUSAL,
    )


class _Run:
    def __init__(
        self,
        blocks: Blocks,
        guide: FactorisedGuide,
        seed: int,
        tolerance: float,
        meter: Meter,
        make_elbo: Callable[..., FamilyELBO],
    ) -> None:
        self.blocks, self.guide, self.meter = blocks, guide, meter
        self.seed, self.tolerance = seed, tolerance
        self.x = torch.empty(0)
        self.elbo, self.elbo_se = math.nan, math.nan
        self.notes: list[str] = []
        self.start = "members of the family nearest to the optimal Normal factors"
        num_fresh = _FRESH_COSTLY_DRAWS if blocks.is_costly else _FRESH_DRAWS
        self.make_elbo = make_elbo
        self.fresh = make_elbo(blocks, guide, num_fresh, seed=seed + 1_000_003, meter=meter)

    def solve(self, start: Params) -> tuple[StopReason, str]:
        first = self._finite(self.fresh.flatten(start))
        self._keep(first)
        try:
            reason, message = self._optimise(first)
        except BudgetSpentError:
            reason = "budget"
            message = f"the budget of {self.meter.num_gradients} gradients is spent"
        except KeyboardInterrupt:
            reason, message = "interrupted", "interrupted by the user"
        if reason in ("budget", "interrupted") and self.meter.best is not None:
            self._keep_if_better(self.meter.best[1])
        self._compare(first)
        like = self.guide.flat_leaves()[0]
        self.guide.set_flat_params(tuple(p.to(like) for p in self.fresh.params(self.x)))
        return reason, message

    def _optimise(self, x: Tensor) -> tuple[StopReason, str]:
        num_draws = self._first_draws()
        before: tuple[Tensor, Tensor] | None = None
        while True:
            elbo = self.make_elbo(
                self.blocks, self.guide, num_draws, seed=self.seed, meter=self.meter
            )
            if not math.isfinite(elbo.value_and_gradient(x)[0]):
                x = self._finite(x, elbo)
            x = lbfgs(
                elbo.value_and_gradient,
                x,
                elbo.unit_metric(x),
                max_iterations=_MAX_ITERATIONS,
                gradient_tolerance=1e-3,
                value_tolerance=max(_VALUE, 10.0 * torch.finfo(self.blocks.log_joint.dtype).eps),
            )
            gained = self._keep_if_better(x)
            median, spread = self._shape(x)
            if before is not None:
                moved = float(((median - before[0]).abs() / spread).max())
                stretched = float((spread / before[1]).log().abs().max())
                ending = (
                    f"over {num_draws} fixed draws medians are within {moved:.2f} sds and spreads "
                    f"within {stretched:.0%} of those over half as many"
                )
                # The error of the draws is halved with every doubling, and what is left of it is
                # about what the last one gained.
                if max(moved, stretched) <= self.tolerance and gained <= _NATS:
                    return "converged", f"the optimum of {self.guide.family.name} factors: {ending}"
                if num_draws >= _MAX_DRAWS:
                    return "budget", (
                        f"{ending} (tolerance {self.tolerance:g}), and the last doubling gained "
                        f"{gained:.2f} nats (tolerance {_NATS:g})"
                    )
            before = median, spread
            num_draws *= 2

    def _first_draws(self) -> int:
        first = _FIRST_COSTLY_DRAWS if self.blocks.is_costly else _FIRST_DRAWS
        parts = getattr(self.guide.family, "parts", ())
        block = max((part.block_size for part in parts), default=1)
        while first < _PER_ELEMENT * block:
            first *= 2
        return first

    def _shape(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Medians and half the distance of the quantiles one sd to each side, each ``(D,)``."""
        at = torch.tensor([[0.158655], [0.5], [0.841345]], dtype=x.dtype)
        with torch.no_grad():
            low, median, high = self.guide.family.quantile(self.fresh.params(x), at)
        return median, (high - low) / 2

    def _finite(self, x: Tensor, elbo: FamilyELBO | None = None) -> Tensor:
        """The point, or one of narrower factors around it, at which the ELBO is finite.

        Raises:
            ModelError: If there is none.
        """
        elbo = elbo or self.fresh
        median, spread = self._shape(x)
        for shrink in range(_MAX_SHRINKS):
            if bool(torch.isfinite(elbo.pair_elbos(x)).all()):
                return x
            narrower = spread * math.exp(-1.0 - shrink)
            x = elbo.flatten(self.guide.family.init(median, narrower))
        raise ModelError(
            f"no {self.guide.family.name} factors with a finite ELBO were found around the optimum "
            "of Normal factors. Their tails reach to where the model has no density."
        )

    def _keep(self, x: Tensor) -> None:
        self.x = x
        self.elbo, self.elbo_se = estimate_from(self.fresh.pair_elbos(x))
        self.meter.elbo_se = self.elbo_se

    def _keep_if_better(self, x: Tensor) -> float:
        """Keep a point if it has the higher ELBO over fresh draws; returns by how much, surely."""
        gain = estimate_from(self.fresh.pair_elbos(x) - self.fresh.pair_elbos(self.x))
        if gain.elbo >= 0.0:
            self._keep(x)
        return gain.elbo - _Z * gain.se

    def _compare(self, first: Tensor) -> None:
        """Say by how much the ELBO is above that of the start."""
        if torch.equal(self.x, first):
            self.notes.append(
                "no optimum over fixed draws had a higher ELBO at fresh ones than the "
                f"{self.start}, which stayed"
            )
            return
        gain = estimate_from(self.fresh.pair_elbos(self.x) - self.fresh.pair_elbos(first))
        self.notes.append(
            f"the ELBO is {gain.elbo:.3f} +- {gain.se:.3f} nats above that of the {self.start}"
        )
