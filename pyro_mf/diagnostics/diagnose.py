"""The verdict on an approximation: draws of the posterior are made anew, and it is held to them."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.diagnostics.check import Check, worst
from pyro_mf.diagnostics.claim import Claim
from pyro_mf.diagnostics.diagnosis import Diagnosis
from pyro_mf.diagnostics.drift import Drift, measure_drift
from pyro_mf.diagnostics.errors import marginal_errors
from pyro_mf.diagnostics.joint import judge_joint, marginal_khats
from pyro_mf.diagnostics.quantities import Quantities
from pyro_mf.diagnostics.reference import (
    Reference,
    Start,
    draw_reference,
    find_start,
    start_of_draws,
)
from pyro_mf.diagnostics.verdict import (
    DRAW_ANEW,
    headline,
    judge_drift,
    judge_marginals,
    judge_reference,
)
from pyro_mf.kernels import Metric
from pyro_mf.solvers.meter import BudgetSpentError, MeteredDensity
from pyro_mf.solvers.outcome import Progress, Report, silent

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_BUDGET = 10_000
_NUM_DRAWS = 20_000  # of the approximation
_NUM_CHAINS, _NUM_COSTLY_CHAINS = 128, 32
_DRIFT_SHARE = 0.2  # of the budget, for the chains that look for a drift
_SEED = 2_000_003  # draws here are not those of the fit


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of an approximation before it is judged.

    Args:
        start: A Gaussian near the posterior; found anew where there is none.
        checks: What the fit itself says: its certificate, its restarts.
        reference: Draws of the posterior that another claim was judged by and that passed.
        better: What to do instead of believing it where it is wrong.
    """

    start: Start | None = None
    checks: tuple[Check, ...] = ()
    reference: Reference | None = None
    better: str = DRAW_ANEW


def judge(
    log_joint: LogJoint,
    claim: Claim,
    known: Known,
    *,
    seed: int = 0,
    max_gradients: int = DEFAULT_BUDGET,
    report: Report = silent,
) -> Diagnosis:
    """Judge a claim.

    Args:
        log_joint: The model with its full data.
        claim: The approximation.
        known: What is known of it before.
        seed: Seed of everything random.
        max_gradients: Budget, in gradients at 64 points each.
        report: Called with the progress.
    """
    began = time.perf_counter()
    trial = _Trial(log_joint, claim, seed + _SEED, max_gradients, report)
    with suppress(KeyboardInterrupt):  # what is known by then is judged
        trial.run(known)
    return trial.verdict(known, time.perf_counter() - began)


class _Trial:
    """What is found, one thing after another, so that an interrupt loses nothing."""

    def __init__(
        self, log_joint: LogJoint, claim: Claim, seed: int, max_gradients: int, report: Report
    ) -> None:
        self.claim, self.seed, self.max_gradients = claim, seed, max_gradients
        self.report = report
        self.blocks = Blocks(log_joint)
        self.quantities = Quantities(log_joint, is_costly=self.blocks.is_costly)
        num = min(_NUM_DRAWS, self.quantities.max_draws)
        self.z = claim.draw(num, seed)
        self.drift: Drift | None = None
        self.has_drift = False
        self.reference: Reference | None = None
        self.notes: tuple[str, ...] = ("it was interrupted",)
        self.num_gradients = 0
        self.table: pd.DataFrame | None = None
        self.others: tuple[Check, ...] = ()

    def run(self, known: Known) -> None:
        """Look at everything, the cheap and the decisive first."""
        starts = self._drift(self.z)
        self.reference = known.reference
        if self.reference is None:
            self._draw(known.start, starts)
        if self.reference is not None:
            self._compare(self.z, self.reference)
        self.report(Progress("weights", self.num_gradients, math.nan, math.nan))
        self.others = judge_joint(
            self.claim,
            self.blocks,
            self.z,
            None if self.reference is None else self.reference.draws,
            seed=self.seed,
        )

    def _draw(self, start: Start | None, starts: Tensor) -> None:
        if start is None:
            start = find_start(self.blocks, self.z, seed=self.seed, report=self.report)
            self.num_gradients += start.num_gradients
        self.reference, self.notes, spent = draw_reference(
            self.blocks,
            start,
            starts,
            seed=self.seed,
            max_gradients=self.max_gradients - self.num_gradients,
            report=self.report,
        )
        self.num_gradients += spent

    def _drift(self, z: Tensor) -> Tensor:
        """Where chains from the approximation's draws get to."""
        num = _NUM_COSTLY_CHAINS if self.blocks.is_costly else _NUM_CHAINS
        self.report(Progress("drift", self.num_gradients, math.nan, math.nan))
        metric = Metric(start_of_draws(z).scale)
        generator = torch.Generator().manual_seed(self.seed)
        most = int(_DRIFT_SHARE * self.max_gradients)
        density = MeteredDensity(self.blocks.value_and_grad, most)
        try:
            self.drift = measure_drift(density, z[:num], metric, generator=generator)
            self.has_drift = True
        except BudgetSpentError:  # chains in a place far too narrow for the approximation's metric
            pass
        self.num_gradients += density.num_gradients
        return z[:num] if self.drift is None else self.drift.z

    def _compare(self, z: Tensor, reference: Reference) -> None:
        draws = reference.draws
        claimed, truth = self.quantities.at(z), self.quantities.at(draws.z)
        errors = marginal_errors(
            claimed,
            truth,
            draws.weights,
            reference.averages,
            draws.diagnostics.get("ess", math.inf),
        )
        table = errors.table(self.quantities.names)
        # What is the same number in all draws of both is structure, such as zeros of a matrix.
        constant = (claimed == truth[0]).all(0) & (truth == truth[0]).all(0)
        self.table = table[~constant.numpy()].assign(khat=math.nan)
        khats = marginal_khats(self.claim, self.blocks.log_joint.layout, z, draws)
        known = [name for name in khats if name in self.table.index]
        self.table.loc[known, "khat"] = [khats[name] for name in known]

    def verdict(self, known: Known, seconds: float) -> Diagnosis:
        names = self.blocks.log_joint.layout.element_names()
        reference = judge_reference(self.reference)
        checks = [judge_marginals(self.table, self.reference, self.notes, known.better), reference]
        if self.has_drift:
            checks.append(judge_drift(self.drift, names, known.better))
        checks += [*self.others, *known.checks]
        if reference.status == "green":
            checks = [check.at_ease() if check.is_standby else check for check in checks]
        status = worst(check.status for check in checks)
        table = self.table
        if table is None:
            table = self._unknown()
        elif self.reference is not None and self.reference.problems:
            table["status"] = "amber"
        return Diagnosis(
            status=status,
            headline=headline(status, self.claim.name.capitalize(), self.table, tuple(checks)),
            claim=self.claim.name,
            parameters=table,
            checks=tuple(checks),
            reference=self.reference,
            seed=self.seed - _SEED,
            num_gradients=self.num_gradients,
            seconds=seconds,
        )

    def _unknown(self) -> pd.DataFrame:
        """The table where there is nothing to compare with."""
        import pandas as pd

        values = self.quantities.at(self.z)
        unknown = ["mean_error", "mean_error_se", "sd_ratio", "sd_ratio_se", "wasserstein", "khat"]
        columns = {"status": "amber", "mean": values.mean(0).numpy(), "sd": values.std(0).numpy()}
        index = pd.Index(self.quantities.names, name="parameter")
        return pd.DataFrame(columns | dict.fromkeys(unknown, math.nan), index=index)
