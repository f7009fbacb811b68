"""How far the NUTS run itself can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyro_mf.compare.statistics import arviz_statistic, effective_sample_size
from pyro_mf.convert import generations

MAX_RHAT = 1.05
STILL = 100.0  # R-hat of chains that do not move, up to rounding
MIN_ESS = 100
MIN_BFMI = 0.3
DEEP_TREE = 10  # where Pyro, nutpie and Stan stop by default
MAX_DEEP = 0.01  # share of transitions


@dataclass(frozen=True)
class Baseline:
    """The quality of the NUTS run.

    Args:
        chains: Number of chains.
        draws: Draws per chain.
        max_rhat: Largest rank-normalised split R-hat of any parameter; NaN with one chain, infinite
            where chains stand still at different values.
        min_ess: Smallest bulk effective sample size of any parameter.
        min_ess_tail: Smallest tail effective sample size, of the 5 and 95 % quantiles.
        divergences: Number of divergent transitions; ``None`` where they were not recorded.
        seconds: Wall time of the run; ``None`` where it was not recorded.
        bfmi: Smallest Bayesian fraction of missing information (Betancourt 2016) of any chain;
            ``None`` where energies were not recorded.
        max_tree_depth: Depth of the largest tree; ``None`` where it was not recorded.
        deep_share: Share of transitions with a tree of depth 10 or more, where a sampler gives up
            by default.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Bürkner (2021), Rank-Normalization, Folding, and
        Localization: An Improved R-hat, https://arxiv.org/abs/1903.08008

        Betancourt (2016), Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte
        Carlo, https://arxiv.org/abs/1604.00695
    """

    chains: int
    draws: int
    max_rhat: float
    min_ess: float
    min_ess_tail: float
    divergences: int | None = None
    seconds: float | None = None
    bfmi: float | None = None
    max_tree_depth: int | None = None
    deep_share: float = 0.0

    @property
    def is_doubtful(self) -> bool:
        """Whether there is a reason not to take this run for the truth."""
        return bool(self.reasons())

    def reasons(self) -> list[str]:
        """Each reason not to take this run for the truth, as a clause; the gravest first."""
        lines = []
        if self.max_rhat > MAX_RHAT:
            lines.append(f"the chains disagree: R-hat is {self.max_rhat:.2f} (> {MAX_RHAT})")
        if self.chains == 1:
            lines.append("there is one chain, so R-hat cannot be computed")
        if self.divergences:
            plural = "s" if self.divergences > 1 else ""
            lines.append(f"{self.divergences} transition{plural} diverged")
        for kind, ess in (("", self.min_ess), ("tail ", self.min_ess_tail)):
            if not ess >= MIN_ESS:
                lines.append(f"the smallest {kind}effective sample size is {ess:.0f} (< {MIN_ESS})")
        if self.bfmi is not None and self.bfmi < MIN_BFMI:
            lines.append(f"energies mix slowly: BFMI is {self.bfmi:.2f} (< {MIN_BFMI})")
        if self.deep_share > MAX_DEEP:
            lines.append(f"{self.deep_share:.0%} of the trees have depth {DEEP_TREE} or more")
        return lines

    def warnings(self) -> list[str]:
        """A sentence for each of :meth:`reasons`."""
        return [f"The NUTS baseline is doubtful: {line}." for line in self.reasons()]

    def __str__(self) -> str:
        text = f"NUTS: {self.chains} chains of {self.draws} draws"
        text += f", max R-hat {self.max_rhat:.3f}, min ESS {self.min_ess:.0f}"
        text += f" (tail {self.min_ess_tail:.0f})"
        if self.divergences is not None:
            text += f", {self.divergences} divergences"
        if self.bfmi is not None:
            text += f", BFMI {self.bfmi:.2f}"
        if self.deep_share:
            text += f", tree depth up to {self.max_tree_depth}"
        return text if self.seconds is None else f"{text}, {self.seconds:.1f} s"


def judge_parameters(draws: np.ndarray) -> dict[str, np.ndarray]:
    """R-hat and effective sample sizes of every parameter, and whether they are too bad.

    Args:
        draws: Of NUTS, shape (chain, draw, P).

    Returns:
        ``nuts_rhat`` (NaN with one chain), ``nuts_ess_bulk``, ``nuts_ess_tail`` and
        ``nuts_doubtful``, each of shape (P,).
    """
    rhat = np.full(draws.shape[-1], np.nan)
    if draws.shape[0] > 1:
        rhat = arviz_statistic("rhat", draws)
        rhat = np.where(rhat < STILL, rhat, np.inf)
    bulk, tail = (
        effective_sample_size(draws, independent=False, method=m) for m in ("bulk", "tail")
    )
    return {
        "nuts_rhat": rhat,
        "nuts_ess_bulk": bulk,
        "nuts_ess_tail": tail,
        "nuts_doubtful": (rhat > MAX_RHAT) | ~(np.minimum(bulk, tail) >= MIN_ESS),
    }


def judge_run(
    result: Any, shape: tuple[int, ...], quality: dict[str, np.ndarray], seconds: float | None
) -> Baseline:
    """The whole run.

    Args:
        result: The NUTS result.
        shape: That of its draws, (chain, draw, P).
        quality: What :func:`judge_parameters` found.
        seconds: Wall time, if known.
    """
    known: dict[str, Any] = {}
    if "sample_stats" in generations.groups(result):
        stats = generations.dataset(result, "sample_stats")
        if "diverging" in stats:
            known["divergences"] = int(stats["diverging"].sum())
        if "energy" in stats:
            known["bfmi"] = _bfmi(stats["energy"].transpose("chain", "draw").values)
        if "tree_depth" in stats:
            depth = stats["tree_depth"].values
            known["max_tree_depth"] = int(depth.max())
            known["deep_share"] = float((depth >= DEEP_TREE).mean())
    return Baseline(
        chains=shape[0],
        draws=shape[1],
        max_rhat=float(quality["nuts_rhat"].max()),
        min_ess=float(quality["nuts_ess_bulk"].min()),
        min_ess_tail=float(quality["nuts_ess_tail"].min()),
        seconds=seconds,
        **known,
    )


def _bfmi(energy: np.ndarray) -> float | None:
    """The smallest over chains of (chain, draw) energies."""
    spread = energy.var(1)
    if not np.isfinite(energy).all() or not (spread > 0).all():
        return None
    return float((np.square(np.diff(energy, axis=1)).mean(1) / spread).min())
