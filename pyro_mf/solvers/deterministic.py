"""The deterministic solver: a mean-field Normal fitted over fixed draws, to a certificate."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.solvers.blocks import Blocks
from pyro_mf.solvers.certificate import Certificate, certify
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import Estimate, FixedDrawELBO
from pyro_mf.solvers.minimise import lbfgs, natural_gradient
from pyro_mf.solvers.outcome import Outcome, Progress, Report, silent
from pyro_mf.solvers.start import find_start

_FIRST_DRAWS, _MAX_DRAWS, _FRESH_DRAWS = 32, 512, 512
# Rounds of L-BFGS with the Hessian of the last point as its metric.
_MAX_POLISHES = 4


class BudgetSpentError(Exception):
    """The solver may compute no more gradients."""


class CountedELBO(FixedDrawELBO):
    """A fixed-draw ELBO that counts, reports and remembers what it is asked."""

    def __init__(self, blocks: Blocks, draws: Tensor, run: Run) -> None:
        super().__init__(blocks, draws)
        self._run = run

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """As in :class:`FixedDrawELBO`."""
        value, gradient = super().value_and_gradient(x)
        self._run.record(self, x, value)
        return value, gradient


class Run:
    """One run of the solver: the point it has reached, and what that took.

    Args:
        blocks: The log joint.
        seed: Seed of all draws.
        max_gradients: Budget.
        report: Called now and then.
    """

    def __init__(self, blocks: Blocks, seed: int, max_gradients: int, report: Report) -> None:
        self.blocks = blocks
        self.seed = seed
        self.max_gradients = max_gradients
        self.report = report
        self.best: tuple[float, Tensor] | None = None
        self.phase = "start"
        self.losses: list[float] = []
        self.notes: list[str] = []
        self.num_gradients = 0
        self.certificate: Certificate | None = None
        self.fresh = Estimate(math.nan, math.nan)

    def objective(self, num_draws: int) -> CountedELBO:
        """The ELBO over so many draws."""
        self.phase = f"{num_draws} draws"
        self.best = None  # values over other draws do not compare
        draws = fixed_draws(num_draws, self.blocks.size, seed=self.seed)
        return CountedELBO(self.blocks, draws, self)

    def record(self, elbo: FixedDrawELBO, x: Tensor, value: float) -> None:
        """Count a gradient."""
        self.num_gradients += 1
        if math.isfinite(value):
            self.losses.append(value)
            if self.best is None or value < self.best[0]:
                self.best = value, x.clone()
            self.report(Progress(self.phase, self.num_gradients, -value, self.fresh.se))
        if self.num_gradients > self.max_gradients:
            raise BudgetSpentError


def optimise(elbo: CountedELBO, x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise from a start, and return the point with its Hessian."""
    size = elbo.size
    x = natural_gradient(elbo, x, max_steps=30)
    round_ = torch.cat([x[size:].exp(), torch.full_like(x[size:], 0.5**0.5)])
    x = lbfgs(
        elbo.value_and_gradient,
        x,
        round_,
        max_iterations=300,
        gradient_tolerance=1e-3,
        value_tolerance=1e-10,
    )
    hessian = elbo.hessian(x)
    for _ in range(_MAX_POLISHES):
        if not bool(torch.isfinite(hessian).all()):
            break
        metric = _inverse_root(hessian)
        start = x
        x = lbfgs(elbo.value_and_gradient, x, metric, max_iterations=30, gradient_tolerance=1e-5)
        moved = torch.linalg.solve(metric, x - start).norm()
        if moved < 0.03:
            break
        hessian = elbo.hessian(x)
    return x, hessian


def _inverse_root(hessian: Tensor) -> Tensor:
    """A matrix in whose coordinates the Hessian is the identity, up to signs."""
    root = hessian.diagonal().abs().clamp_min(1e-12).sqrt()
    eigenvalues, vectors = torch.linalg.eigh(hessian / (root[:, None] * root))
    return vectors / eigenvalues.abs().clamp_min(1e-8).sqrt() / root[:, None]


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
    """Fit Normal factors by minimising the negative ELBO over fixed draws."""
    began = time.perf_counter()
    blocks = Blocks(log_joint)
    run = Run(blocks, seed, max_gradients, report)
    elbo = run.objective(_FIRST_DRAWS)
    x = find_start(elbo, seed=seed, disperse=disperse)
    while True:
        x, hessian = optimise(elbo, x)
        fresh_draws = fixed_draws(_FRESH_DRAWS, blocks.size, seed=seed + 1)
        run.fresh = FixedDrawELBO(blocks, fresh_draws).estimate(x)
        run.certificate = certify(elbo, x, hessian, run.fresh)
        c = run.certificate
        run.notes.append(
            f"{elbo.num_draws} draws: {run.num_gradients} grads blocks {blocks.num_calls} dec {c.decrement:.1e} noise {float(c.noise.max()):.3f} opt {c.optimism:.2f} gap {c.gap:.2f}±{c.gap_se:.2f}"
        )
        if c.is_stationary and c.is_precise(tolerance) and c.agrees_on_fresh_draws:
            reason = "converged"
            break
        if elbo.num_draws >= _MAX_DRAWS:
            reason = "budget"
            break
        elbo = run.objective(2 * elbo.num_draws)
    loc, scale = x[: blocks.size], x[blocks.size :].exp()
    guide.set_flat_params((loc, scale))
    return Outcome(
        run.fresh.elbo,
        run.fresh.se,
        reason,
        "",
        tuple(run.losses),
        run.num_gradients,
        {"optimise": time.perf_counter() - began},
        tuple(run.notes),
        c.response,
        c.refusal,
    )
