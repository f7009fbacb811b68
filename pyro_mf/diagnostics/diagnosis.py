"""``Diagnosis``: the verdict on a fit, with what it rests on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyro_mf.diagnostics.check import Check, Status

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

    from pyro_mf.diagnostics.reference import Reference
    from pyro_mf.solvers.posterior_draws import PosteriorDraws


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Whether to trust an approximation; printing it says why, and what to do.

    Args:
        status: The verdict on the marginals of all parameters together: ``"green"``, shown to be
            right; ``"amber"``, not shown; ``"red"``, shown to be wrong. Right is a mean within a
            quarter of a posterior sd and an sd within a quarter of the posterior's, by two standard
            errors.
        headline: The verdict in one sentence.
        claim: What was judged.
        parameters: One row per scalar element of every latent and deterministic site, named as in
            ``summary()``. ``status``, then ``mean`` and ``sd`` of the approximation, ``mean_error``
            in posterior sds, ``sd_ratio`` to the posterior's sd, each with its standard error in
            ``*_se``, ``wasserstein`` distance of the marginals in posterior sds, and ``khat`` of
            the marginal. NaN where there are no draws of the posterior to tell.
        checks: Everything that was looked at.
        reference: What it was judged by; see :attr:`draws`.
        seed: Seed of the diagnosis.
        num_gradients: Gradients at 64 points each that the diagnosis took.
        seconds: Wall time.
    """

    status: Status
    headline: str
    claim: str
    parameters: pd.DataFrame = field(repr=False)
    checks: tuple[Check, ...] = field(repr=False)
    reference: Reference | None = field(repr=False)
    seed: int
    num_gradients: int
    seconds: float

    @property
    def draws(self) -> PosteriorDraws | None:
        """Draws of the posterior that it was judged by, ``None`` where there are none.

        Where no check speaks against them they may be used in place of the approximation.
        """
        return None if self.reference is None else self.reference.draws

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do next, most important first."""
        order = {"red": 0, "amber": 1, None: 2, "green": 3}
        given = [c for c in sorted(self.checks, key=lambda c: order[c.status]) if c.advice]
        return tuple(dict.fromkeys(check.advice for check in given))

    def __getitem__(self, name: str) -> Check:
        """One check by its name.

        Raises:
            KeyError: If there is none of this name.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check '{name}'; there are {[check.name for check in self.checks]}.")

    def __str__(self) -> str:
        from pyro_mf.diagnostics.report import as_text

        return as_text(self)

    def __rich__(self) -> Group:
        """The report for ``rich.print``."""
        from pyro_mf.diagnostics.report import as_group

        return as_group(self)
