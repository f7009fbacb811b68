"""Are marginals by the forward KL as wide as NUTS's? Against 16 reference posteriors.

Errors are those of `benchmarks.accuracy`, means over all parameters of a reference on their own
scale: of the mean in reference sds, of |log sd ratio|, and the median relative error of the sd.
*forward* is the product of normal factors, *its draws* are those that it was fitted to: where
they differ, a marginal is not normal on the unconstrained axis. *gradients* are of the log joint at
one point each, in thousands. Set POSTERIORDB to the folder of the references.
Run from the repository's root: python -m benchmarks.forward
"""

import argparse

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.forward_contenders import Entry, bound, forward, nuts, reverse
from benchmarks.posteriors import MODELS, Posterior, load
from benchmarks.problems import short_name
from benchmarks.scoring import Errors, errors, errors_of_draws
from pyro_mf.density import LogJoint


def make_table(seed: int) -> Table:
    table = Table(title=f"Against reference posteriors, seed {seed}")
    for column in ("posterior", "method", "ended"):
        table.add_column(column, no_wrap=True)
    for column in ("D", "mean", "log sd", "sd, rel", "gradients", "seconds", "ELBO", "EUBO"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def score(
    posterior: Posterior, log_joint: LogJoint, entries: list[Entry], num_draws: int
) -> dict[str, Errors]:
    """Errors by method; draws are judged as they are, factors by draws of theirs."""
    compared = {"reference": posterior.reference, "num_draws": num_draws}
    found = {}
    for entry in entries:
        if entry.method != "NUTS":
            found[entry.method] = errors(log_joint, entry.loc, entry.scale, **compared)
        if entry.draws is not None:
            name = "NUTS" if entry.method == "NUTS" else "its draws"
            found[name] = errors_of_draws(log_joint, entry.draws, posterior.reference)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=20_000, help="fresh draws per error")
    parser.add_argument("--nuts", action="store_true", help="NUTS too, 4 chains of 1000 + 1000")
    parser.add_argument("--notes", action="store_true", help="print what the fits say")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    names = [n for n in MODELS if any(part in n for part in args.only)][: 1 if args.smoke else None]

    console = Console(width=190)
    table = make_table(args.seed)
    scores: dict[str, list[Errors]] = {}
    for name in names:
        posterior = load(name)
        entries = reverse(posterior.model, posterior.args, seed=args.seed)
        entries += forward(posterior.model, posterior.args, seed=args.seed)
        if args.nuts:
            entries += nuts(posterior.model, posterior.args, seed=args.seed)
        log_joint = LogJoint(posterior.model, posterior.args)
        by_method = {entry.method: entry for entry in entries}
        by_method["its draws"] = by_method["forward"]
        scored = score(posterior, log_joint, entries, 200 if args.smoke else args.draws)
        for method, found in scored.items():
            entry, is_first = by_method[method], method == "reverse"
            is_repeated = method == "its draws"
            console.print(f"{short_name(name)}, {method}: {found}, {entry.verdict}")
            if args.notes and not is_repeated:
                console.print(f"  {entry.note}")
            table.add_row(
                short_name(name) if is_first else "",
                method,
                "" if is_repeated else entry.verdict,
                str(len(entry.loc)) if is_first else "",
                *(f"{value:.3f}" for value in found),
                "" if is_repeated else f"{entry.gradients / 1000:.1f}",
                "" if is_repeated else f"{entry.seconds:.1f}",
                "" if is_repeated else bound(*entry.elbo),
                "" if is_repeated else bound(*entry.eubo),
            )
            scores.setdefault(method, []).append(found)
        table.add_section()
    for method, all_found in scores.items():
        medians = np.median(np.array(all_found), 0)
        table.add_row("median", method, "", "", *(f"{value:.3f}" for value in medians))
    console.print(table)
    for method, all_found in scores.items():
        within = sum(e.mean <= 0.05 and e.relative_sd <= 0.03 for e in all_found)
        console.print(
            f"{method}: mean within 0.05 sds, sd within 3 %: {within} of {len(all_found)}"
        )


if __name__ == "__main__":
    main()
