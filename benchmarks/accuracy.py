"""How close do our fits come to 16 reference posteriors? Mean-field and linear response, no peers.

Errors are means over all parameters of a reference, on their own scale: of the mean in reference sds
and of |log sd ratio|. ELBO by 20,000 fresh draws. Set POSTERIORDB to the folder of the references.
Run from the repository's root: python -m benchmarks.accuracy
"""

import argparse
import time
import warnings

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ours import fit_posterior
from benchmarks.posteriors import MODELS, load
from benchmarks.scoring import Errors, elbo, errors
from pyro_mf.density import LogJoint

NAN = Errors(np.nan, np.nan, np.nan)


def shown(found: Errors) -> list[str]:
    return [f"{found.mean:.3f}", f"{found.log_sd:.3f}", f"{found.relative_sd:.3f}"]


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
    names = [n for n in MODELS if any(part in n for part in args.only)]
    if args.smoke:
        names = names[:2]

    console = Console(width=170)
    table = Table(title=f"Against reference posteriors, seed {args.seed}")
    for column in ("posterior", "stopped"):
        table.add_column(column, no_wrap=True)
    for column in ("D", "seconds", "grads", "draws", "ELBO"):
        table.add_column(column, justify="right", no_wrap=True)
    for family in ("MF", "LR"):
        for column in ("mean", "log sd", "sd, rel"):
            table.add_column(f"{family} {column}", justify="right")
    found_errors: list[tuple[Errors, Errors]] = []
    for name in names:
        posterior = load(name)
        begin = time.perf_counter()
        fit = fit_posterior(posterior, seed=args.seed)
        seconds = time.perf_counter() - begin
        log_joint = LogJoint(posterior.model, posterior.args)
        found = elbo(log_joint, fit.loc, fit.sd, num_draws=num_draws)
        compared = {"reference": posterior.reference, "num_draws": num_draws}
        field = errors(log_joint, fit.loc, fit.sd, **compared)
        response = NAN
        if fit.response is not None:
            response = errors(log_joint, fit.response.loc, fit.response.scale_tril, **compared)
        found_errors.append((field, response))
        table.add_row(
            name.split("-")[-1],
            fit.stop_reason,
            str(len(fit.loc)),
            f"{seconds:.2f}",
            str(fit.num_gradients),
            str(fit.num_draws),
            f"{found.value:.2f} ± {found.se:.2f}",
            *shown(field),
            *shown(response),
        )
        console.print(f"{name}: {seconds:.1f} s, {fit.stop_reason}: {fit.message}")
        if fit.no_response:
            console.print(f"  no linear response: {fit.no_response}")
        if args.notes:
            console.print("".join(f"  {note}\n" for note in fit.notes), end="")
    table.add_section()
    medians = np.nanmedian(np.array(found_errors), 0).reshape(-1)
    table.add_row("median", *[""] * 6, *(f"{value:.3f}" for value in medians))
    console.print(table)


if __name__ == "__main__":
    main()
