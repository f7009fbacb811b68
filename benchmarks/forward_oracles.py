"""Does the forward KL find the marginals where they are known? Against exact answers and chains.

*mean* is the root mean square error of the means in true sds, *sd* of the log ratios of the sds, on
the unconstrained axis. *gradients* are of the log joint at one point each, in thousands, *seconds*
of CPU. The last column has the best that 13 published and prototyped ways to fit the forward KL
reached on such a target with about 50,000 gradients. The targets below the line are meant to be too
hard for somebody: what counts there is that no wrong answer is called converged.
Run from the repository's root: python -m benchmarks.forward_oracles
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import forward_problems as problems
from benchmarks.forward_contenders import Entry, bound, forward, nuts, reverse
from benchmarks.forward_problems import Target, errors
from pyro_mf.density import LogJoint

EASY: dict[str, tuple[Callable[[], Target], str]] = {
    "three": (problems.three_by_three, ""),
    "pooled": (problems.pooled_schools, ""),
    "skew": (problems.skew_normal, ""),
    "modes": (problems.bimodal, ""),
    "equi10": (partial(problems.equicorrelated, 10), ".007 / .006"),
    "schools": (partial(problems.eight_schools, centered=False), ".010 / .011"),
    "logistic25": (partial(problems.logistic, 25, 500), ".005 / .004"),
    "equi100": (partial(problems.equicorrelated, 100), ".015 / .014"),
    "wishart": (problems.wishart, ".012 / .014"),
    "logistic100": (partial(problems.logistic, 100, 300), ".026 / .018"),
    "ar1000": (problems.autoregression, ".147 / .076"),
}
HARD: dict[str, tuple[Callable[[], Target], str]] = {
    "centred": (partial(problems.eight_schools, centered=True), ""),
    "funnel": (problems.funnel, ""),
    "labels": (problems.switching_labels, ""),
}
SMOKE = ("pooled", "skew")


def make_table() -> Table:
    table = Table(title="Marginals that are known")
    for column in ("target", "method", "ended"):
        table.add_column(column, no_wrap=True)
    names = ("mean", "sd", "gradients", "seconds", "ELBO", "EUBO", "log evidence", "best known")
    for column in names:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def add_rows(
    table: Table, target: Target, log_joint: LogJoint, entries: list[Entry], best: str
) -> None:
    """One line per contender; what is known of the target stands in the first."""
    for number, entry in enumerate(entries):
        first = number == 0
        mean, sd = errors(log_joint, entry.loc, entry.sd, target.truth)
        known = "" if math.isnan(target.log_evidence) else f"{target.log_evidence:.2f}"
        table.add_row(
            target.name if first else "",
            entry.method,
            entry.verdict,
            f"{mean:.3f}",
            f"{sd:.3f}",
            f"{entry.gradients / 1000:.1f}",
            f"{entry.seconds:.1f}",
            bound(*entry.elbo),
            bound(*entry.eubo),
            known if first else "",
            best if first else "",
        )


def gaussian_lines(target: Target, entries: list[Entry]) -> list[str]:
    """Closed forms of a Gaussian beside what the fits say."""
    found = {entry.method: entry for entry in entries}
    lines = []
    if "reverse" in found:
        lines.append(
            f"ELBO is {target.log_evidence - found['reverse'].elbo[0]:.4f} below the log evidence, "
            f"by its closed form {target.reverse_kl:.4f}"
        )
    if "forward" in found:
        lines.append(
            f"EUBO is {found['forward'].eubo[0] - target.log_evidence:.4f} above it, by its closed "
            f"form {target.forward_kl:.4f}"
        )
    return lines


def predictive_table(seed: int) -> Table:
    """What a product of right marginals does to predictions of a regression."""
    target = problems.collinear()
    x, _ = target.args
    table = Table(title="Mean variance of predictions at the data, in units of the noise")
    for column in ("method", "variance"):
        table.add_column(column, justify="right")
    exact = torch.einsum("ni,ij,nj->n", x, target.covariance, x).mean()
    table.add_row("exact", f"{float(exact):.3f}")
    entries = reverse(target.model, target.args, seed=seed)
    for entry in entries + forward(target.model, target.args, seed=seed):
        scale = entry.scale if entry.scale.dim() == 2 else torch.diag(entry.scale)
        variance = (x @ scale).square().sum(-1).mean()
        table.add_row(entry.method, f"{float(variance):.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = EASY | HARD
    parser.add_argument("--only", nargs="+", choices=cases, help="some of the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=None, help="of the fits, in sds")
    parser.add_argument("--nuts", action="store_true", help="NUTS too, 4 chains of 1000 + 1000")
    parser.add_argument("--notes", action="store_true", help="print what the fits say")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    settings = {"seed": args.seed}
    if args.tolerance is not None:
        settings["tolerance"] = args.tolerance
    console = Console(width=190)
    table = make_table()
    for name in args.only or (SMOKE if args.smoke else cases):
        if name == next(iter(HARD)):
            table.add_section()
        make, best = cases[name]
        target = make()
        entries = reverse(target.model, target.args, **settings)
        entries += forward(target.model, target.args, **settings)
        if args.nuts:
            entries += nuts(target.model, target.args, seed=args.seed)
        log_joint = LogJoint(target.model, target.args)
        add_rows(table, target, log_joint, entries, best)
        console.print(f"{target.name}: truth is {target.source}")
        for line in gaussian_lines(target, entries) if target.covariance is not None else ():
            console.print(f"  {line}")
        for entry in entries:
            mean, sd = errors(log_joint, entry.loc, entry.sd, target.truth)
            console.print(f"  {entry.method}, {entry.verdict}: mean {mean:.3f}, sd {sd:.3f}")
            if args.notes and entry.note:
                console.print(f"    {entry.note}")
    console.print(table)
    console.print(predictive_table(args.seed))


if __name__ == "__main__":
    main()
