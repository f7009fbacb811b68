"""What simulation-based calibration found, and how it is printed."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pyro_mf.diagnostics.miscalibration import Miscalibration, holm, measure

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group
    from rich.table import Table

MIN_SIMULATIONS = 20
# Chance of any false alarm, over all parameters and tests.
LEVEL = 0.05
NUM_TESTS = 3  # per parameter: of bias, of the sd, and of uniformity
# Errors that are serious: of a location in posterior sds, and of an sd as a factor.
MAX_BIAS, MAX_FACTOR = 0.25, 1.25
# Share of fits that may be missing before nothing can be called fine.
_MAX_MISSING = 0.05
_SHOWN, _WIDTH = 20, 120
_COVERAGES = (0.5, 0.9)


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What :func:`~pyro_mf.calibrate` found; printing it shows the table.

    Args:
        parameters: Names of the scalar parameters, in the model's own space.
        probabilities: Posterior probability below the truth, shape ``(simulations, parameters)``;
            uniform on (0, 1) where the posteriors are right. Fits that failed are left out.
        truths: The simulated truths on the unconstrained space, shape ``(simulations, D)``.
        num_asked: Simulations that were asked for.
        failures: Why fits failed, by the number of the simulation.
        unconverged: Numbers of the simulations whose fit ended without having converged. They
            count.
        approximation: What was calibrated, in words.
        method: How the fits were made, in words.
        seconds: Wall time.
        is_interrupted: Whether Ctrl-C ended it early.
        num_draws: Draws behind probabilities without a closed form; ``None`` where all have one.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = Calibration(["a", "b"], np.c_[rng.random(200), rng.beta(0.3, 0.3, 200)])
        >>> found.table["verdict"].tolist()
        ['fine', 'too narrow']
        >>> found.verdict
        'not calibrated'
    """

    parameters: list[str]
    probabilities: np.ndarray
    truths: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    num_asked: int = 0
    failures: dict[int, str] = field(default_factory=dict)
    unconverged: tuple[int, ...] = ()
    approximation: str = "the posterior approximation"
    method: str = ""
    seconds: float = 0.0
    is_interrupted: bool = False
    num_draws: int | None = None

    @property
    def num_simulations(self) -> int:
        """Simulations behind the numbers: those whose fit did not fail."""
        return len(self.probabilities)

    def ranks(self, num_draws: int = 99) -> np.ndarray:
        """Ranks of the truths among so many posterior draws, for other tools of SBC.

        Args:
            num_draws: Number of draws L, at least 1.

        Returns:
            Integers from 0 to L, shape ``(simulations, parameters)``; uniform where the posteriors
            are right.
        """
        found: np.ndarray = (self.probabilities * (num_draws + 1)).astype(int).clip(0, num_draws)
        return found

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per parameter.

        ``bias`` is by how much the posteriors' location is too high, in sds as they should be, and
        ``sd_ratio`` the sd over what it should be, each with a standard error (``bias_se`` and
        ``log_sd_ratio_se``, of the logarithm). ``coverage_50`` and ``coverage_90`` are the shares
        of truths in central intervals, with binomial standard errors in ``*_se``. ``p_bias``,
        ``p_sd`` and ``p_uniform`` are the tests' p-values, ``p_adjusted`` the smallest of the three
        after Holm's correction for all tests of all parameters, and ``verdict`` says it in words.
        """
        import pandas as pd

        found = measure(self.probabilities)
        p_values = np.stack([found.p_bias, found.p_sd, found.p_uniform])
        adjusted = holm(p_values)
        columns = {"bias": found.bias, "bias_se": found.bias_se}
        columns |= {"sd_ratio": found.sd_ratio, "log_sd_ratio_se": found.log_sd_ratio_se}
        distance = np.abs(self.probabilities - 0.5)
        for share in _COVERAGES:
            covered = (distance < share / 2).mean(0)
            name = f"coverage_{100 * share:.0f}"
            columns[name] = covered
            # With a success and a failure more, so that it is not zero.
            rate = (covered * self.num_simulations + 1) / (self.num_simulations + 2)
            columns[f"{name}_se"] = np.sqrt(rate * (1 - rate) / self.num_simulations)
        columns |= dict(zip(("p_bias", "p_sd", "p_uniform"), p_values, strict=True))
        columns["p_adjusted"] = adjusted.min(0)
        verdicts = [self._verdict(found, adjusted[:, k], k) for k in range(len(self.parameters))]
        index = pd.Index(self.parameters, name="parameter")
        return pd.DataFrame(columns | {"verdict": verdicts}, index=index)

    @property
    def verdict(self) -> str:
        """``"calibrated"``, ``"not calibrated"`` or ``"cannot tell"``.

        Calibrated in every parameter by itself: nothing is said of correlations.
        """
        verdicts = set(self.table["verdict"])
        if verdicts - {"fine", "cannot tell"}:
            return "not calibrated"
        return "cannot tell" if "cannot tell" in verdicts else "calibrated"

    def worst(self, count: int) -> list[str]:
        """The parameters that are furthest from calibrated, worst first.

        Args:
            count: At most that many.
        """
        p_values = self.table[["p_bias", "p_sd", "p_uniform"]].min(axis=1)
        size = self.table["bias"].abs() / MAX_BIAS
        size += self.table["sd_ratio"].map(np.log).abs() / np.log(MAX_FACTOR)
        order = np.lexsort((-size.to_numpy(), p_values.to_numpy().clip(1e-8)))
        return [self.parameters[k] for k in order[:count]]

    def notes(self) -> list[str]:
        """What a reader has to know before believing the table."""
        lines = []
        if self.is_interrupted:
            done = self.num_simulations + len(self.failures)
            lines.append(f"Interrupted: {done} of {self.num_asked} simulations are done.")
        if self.failures:
            first = next(iter(self.failures.values()))
            lines.append(
                f"{len(self.failures)} fits failed and are in no number below. Fits do not fail at "
                "random, so coverages may be off by up to "
                f"{len(self.failures) / (self.num_simulations + len(self.failures)):.1%}. The "
                f"first: {first}"
            )
        if self.unconverged:
            lines.append(
                f"{len(self.unconverged)} fits ended without having converged. They count, as they "
                "would for who uses them."
            )
        if self.num_simulations < MIN_SIMULATIONS:
            lines.append(
                f"{self.num_simulations} simulations are too few for any verdict but the crassest."
            )
        return lines

    def _verdict(self, found: Miscalibration, p_values: np.ndarray, k: int) -> str:
        bias, ratio = found.bias[k], found.sd_ratio[k]
        faults, is_small = [], []
        if p_values[0] < LEVEL:
            faults.append("high" if bias > 0 else "low")
            is_small.append(abs(bias) < MAX_BIAS)
        if p_values[1] < LEVEL:
            faults.append("narrow" if ratio < 1 else "wide")
            is_small.append(1 / MAX_FACTOR < ratio < MAX_FACTOR)
        if not faults and p_values[2] < LEVEL:
            return "wrong shape"
        if faults:
            return ("slightly " if all(is_small) else "") + f"too {' and '.join(faults)}"
        return "fine" if self._is_shown_fine(found, k) else "cannot tell"

    def _is_shown_fine(self, found: Miscalibration, k: int) -> bool:
        """Whether serious errors lie outside the 95 % intervals of their estimates."""
        missing = len(self.failures) / max(1, self.num_simulations + len(self.failures))
        bias = abs(found.bias[k]) + 1.96 * found.bias_se[k]
        spread = abs(np.log(found.sd_ratio[k])) + 1.96 * found.log_sd_ratio_se[k]
        is_within = bias < MAX_BIAS + 0.05 and spread < np.log(MAX_FACTOR) + 0.05
        return bool(is_within and missing <= _MAX_MISSING)

    # -- printing --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"Calibration({self.verdict}: {len(self.parameters)} parameters, "
            f"{self.num_simulations} simulations, {len(self.failures)} failed)"
        )

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __rich__(self) -> Group:
        """The table for ``rich.print``."""
        from rich.console import Group
        from rich.text import Text

        head = f"Calibration of {self.approximation}: {self.verdict.upper()}"
        count = f"{self.num_simulations} simulations, {len(self.failures)} failed, "
        count += f"{len(self.unconverged)} not converged; {self.seconds:.1f} s"
        count += f"; {self.method}" if self.method else ""
        notes = [Text(note, style="bold red") for note in self.notes()]
        title = "Worst first"
        if (hidden := len(self.parameters) - _SHOWN) > 0:
            title += f", {_SHOWN} of {len(self.parameters)}; {hidden} more in .table"
        foot = (
            "bias (too high: +) in sds as they should be, sd over the sd as it should be, share of "
            "truths in central intervals, each ± standard error; p adjusted for the number of "
            f"tests: the chance of any false alarm is at most {LEVEL:.0%}."
        )
        if self.num_draws is not None:
            foot += (
                f" Probabilities without a closed form are ranks among {self.num_draws} draws, off "
                f"by {0.5 / self.num_draws**0.5:.3f} at most."
            )
        if "cannot tell" in set(self.table["verdict"]):
            foot += (
                " Where it cannot tell, a bias of 0.25 sd or an sd off by 25 % is not ruled out: "
                "run more simulations."
            )
        return Group(Text(head, style="bold"), Text(count), *notes, title, self._table(), foot)

    def _table(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD)
        table.add_column("parameter", no_wrap=True)  # the only one that may be cut
        for name, width in (("bias", 12), ("sd ratio", 11), ("in 50 %", 10), ("in 90 %", 10)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        table.add_column("p", justify="right", no_wrap=True, min_width=8)
        shown = self.worst(_SHOWN)
        longest = max(map(len, self.table["verdict"][shown]))
        table.add_column("verdict", no_wrap=True, min_width=longest)
        for name in shown:
            row = self.table.loc[name]
            table.add_row(
                Text(name),
                f"{row['bias']:+.2f} ± {row['bias_se']:.2f}",
                f"{row['sd_ratio']:.2f} ± {row['sd_ratio'] * row['log_sd_ratio_se']:.2f}",
                f"{100 * row['coverage_50']:.0f} ± {100 * row['coverage_50_se']:.0f} %",
                f"{100 * row['coverage_90']:.0f} ± {100 * row['coverage_90_se']:.0f} %",
                f"{row['p_adjusted']:.2g}" if row["p_adjusted"] >= 1e-6 else "< 1e-6",
                row["verdict"],
            )
        return table
