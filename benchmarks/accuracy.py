"""How close does `fit` come to 16 reference posteriors? Mean-field and linear response, no peers.

Errors are means over all parameters of a reference, on their own scale: of the mean in reference
sds, of |log sd ratio|, and the median relative error of the sd. ELBO by 20,000 fresh draws. Set
POSTERIORDB to the folder of the references.
Run from the repository's root: python -m benchmarks.accuracy
"""

import argparse
import time
import warnings

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peers.ours import draws_of
from benchmarks.posteriors import MODELS, load
from benchmarks.problems import short_name
from benchmarks.scoring import Errors, elbo, errors
from pyro_mf.fitting import fit

NONE = Errors(np.nan, np.nan, np.nan)


def make_table(seed: int) -> Table:
    table = Table(title=f"Against reference posteriors, seed {seed}")
    for column in ("posterior", "stopped"):
        table.add_column(column, no_wrap=True)
    for column in ("D", "seconds", "grads", "draws", "ELBO"):
        table.add_column(column, justify="right", no_wrap=True)
    for family in ("MF", "LR"):
        for column in ("mean", "log sd", "sd, rel"):
            table.add_column(f"{family} {column}", justify="right", no_wrap=True)
    table.add_column("believed", no_wrap=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=20_000, help="fresh draws per ELBO and error")
    parser.add_argument("--notes", action="store_true", help="print the solver's notes too")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    num_draws = 200 if args.smoke else args.draws
    names = [n for n in MODELS if any(part in n for part in args.only)][: 2 if args.smoke else None]

    console = Console(width=190)
    table = make_table(args.seed)
    rows: list[tuple[Errors, Errors, Errors]] = []
    for name in names:
        posterior = load(name)
        begin = time.perf_counter()
        result = fit(posterior.model, posterior.args, seed=args.seed, progress=False)
        seconds = time.perf_counter() - begin
        console.print(
            f"{short_name(name)}: {seconds:.1f} s, {result.stop_reason}: {result.message}"
        )
        for note in result.notes if args.notes else ():
            console.print(f"  {note}")

        loc, sd = (p.detach() for p in result.guide.flat_params())
        found = elbo(result.log_joint, loc, sd, num_draws=num_draws)
        compared = {"reference": posterior.reference, "num_draws": num_draws}
        field = errors(result.log_joint, loc, sd, **compared)
        known, response = result.known_response(), NONE
        if known.found is None:
            console.print(f"  no linear response: {known.refusal}")
        else:
            response = errors(result.log_joint, loc, known.found.scale_tril, **compared)
        trusts_response = known.is_better(result.outcome)
        rows.append((field, response, response if trusts_response else field))
        table.add_row(
            short_name(name),
            result.stop_reason,
            str(len(loc)),
            f"{seconds:.2f}",
            str(result.num_gradients),
            str(draws_of(result)),
            f"{found.value:.2f} ± {found.se:.2f}",
            *(f"{value:.3f}" for value in (*field, *response)),
            "LR" if trusts_response else "MF",
        )
    medians = np.nanmedian(np.array(rows), 0)
    table.add_section()
    table.add_row("median", *[""] * 6, *(f"{value:.3f}" for value in medians[:2].reshape(-1)))
    console.print(table)
    mean, log_sd, relative_sd = medians[2]
    console.print(
        f"Of those to believe, medians: mean {mean:.3f}, log sd {log_sd:.3f}, sd {relative_sd:.3f}."
    )
    within = sum(believed.mean <= 0.1 and believed.log_sd <= 0.1 for *_, believed in rows)
    console.print(f"Mean within 0.1 sds and log sd within 0.1: {within} of {len(rows)}.")


if __name__ == "__main__":
    main()
