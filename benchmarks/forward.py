"""Are marginals by the forward KL as wide as NUTS's? Against 16 reference posteriors.

Errors are those of `benchmarks.accuracy`, means over all parameters of a reference on their own
scale: of the mean in reference sds, of |log sd ratio|, and the median relative error of the sd.
*forward* is the product of normal factors, *its draws* are those that it was fitted to: where
they differ, a marginal is not normal on the unconstrained axis. *gradients* are of the log joint at
one point each, in thousands; *seconds* are of CPU. NUTS has 4 chains of 1000 + 1000. Rows are
printed as they come. Set POSTERIORDB to the folder of the references.
Run from the repository's root: python -m benchmarks.forward
"""

import argparse
from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.forward_contenders import Entry, forward, nuts, reverse
from benchmarks.posteriors import MODELS, Posterior, load
from benchmarks.problems import short_name
from benchmarks.scoring import Errors, errors, errors_of_draws
from pyro_mf.density import LogJoint

CONTENDERS: dict[str, Callable[..., list[Entry]]] = {
    "reverse": reverse,
    "forward": forward,
    "nuts": nuts,
}
COLUMNS = ("posterior", "D", "method", "mean", "log sd", "sd", "gradients", "seconds", "ended")
TEXT = ("posterior", "method", "ended")  # the others are numbers


def show(*cells: object) -> None:
    """Print a row of a table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def score(
    posterior: Posterior, log_joint: LogJoint, entry: Entry, num_draws: int
) -> dict[str, Errors]:
    """Errors by method; draws are judged as they are, factors by draws of theirs."""
    found = {}
    if entry.method != "NUTS":
        found[entry.method] = errors(
            log_joint, entry.loc, entry.scale, reference=posterior.reference, num_draws=num_draws
        )
    if entry.draws is not None:
        name = "NUTS" if entry.method == "NUTS" else "its draws"
        found[name] = errors_of_draws(log_joint, entry.draws, posterior.reference)
    return found


def contend(posterior: Posterior, methods: list[str], seed: int) -> Iterator[Entry]:
    """One method after another."""
    for name in methods:
        yield from CONTENDERS[name](posterior.model, posterior.args, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="parts of names, in the order wanted")
    parser.add_argument(
        "--methods", nargs="+", choices=CONTENDERS, default=["reverse", "forward"], help="in order"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=20_000, help="fresh draws per error")
    parser.add_argument("--notes", action="store_true", help="print what the fits say")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    chosen = [name for part in args.only or [""] for name in MODELS if part in name]
    names = list(dict.fromkeys(chosen))[: 1 if args.smoke else None]

    show(*COLUMNS)
    show(*("---" if column in TEXT else "--:" for column in COLUMNS))
    scores: dict[str, list[Errors]] = {}
    notes = []
    for name in names:
        posterior = load(name)
        log_joint = LogJoint(posterior.model, posterior.args)
        for entry in contend(posterior, args.methods, args.seed):
            if entry.note:
                notes.append(f"{short_name(name)}, {entry.method}: {entry.note}")
            scored = score(posterior, log_joint, entry, 200 if args.smoke else args.draws)
            for method, found in scored.items():
                cost = f"{entry.gradients / 1000:.1f}", f"{entry.seconds:.1f}", entry.verdict
                show(
                    short_name(name),
                    len(entry.loc),
                    method,
                    *(f"{value:.3f}" for value in found),
                    *(("", "", "") if method == "its draws" else cost),
                )
                scores.setdefault(method, []).append(found)
    for method, all_found in scores.items():
        medians = np.median(np.array(all_found), 0)
        show("median", "", method, *(f"{value:.3f}" for value in medians), "", "", "")
    for method, all_found in scores.items():
        within = sum(e.mean <= 0.05 and e.relative_sd <= 0.03 for e in all_found)
        print(f"{method}: mean within 0.05 sds, sd within 3 %: {within} of {len(all_found)}")
    if args.notes:
        print(*notes, sep="\n")


if __name__ == "__main__":
    main()
