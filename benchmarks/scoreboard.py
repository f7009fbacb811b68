"""Do verdicts tell good fits from bad ones? Methods against 16 reference posteriors.

Errors are over all parameters of a reference, deterministic sites included, on their own scale:
of means and of the 5, 50 and 95 % quantiles in the reference's sds, of sds as |log ratio|. Truth
is bad where a mean is off by over 0.25 sds or an sd by over 25 %, and *edge* where two standard
errors could turn that over. Verdicts are those of `diagnose`. *Forward draws* are those that the
forward fit's factors were fitted to. Seconds are of CPU for fits, of the clock for verdicts.

Every score is appended to a file and every fit kept beside it, so a run that was cut goes on where
it was, and `--rediagnose` asks kept fits for their verdicts again. Stock `AutoNormal` has 10,000
steps of Adam and at most 60 seconds; fits and verdicts have at most `--limit` each. Set POSTERIORDB
to the folder of the references.
Run from the repository's root: python -m benchmarks.scoreboard
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.posteriors import MODELS, Posterior, load
from benchmarks.problems import short_name
from benchmarks.scoreboard_methods import (
    METHODS,
    Fit,
    Settings,
    interrupted_after,
    moments,
    strata,
)
from benchmarks.scoreboard_rows import (
    Row,
    cells,
    key,
    print_good,
    print_verdicts,
    read,
    score_table,
)
from benchmarks.scoreboard_truth import Error, from_zero

SLOW = ("Mtbh", "accel_gp", "hmm", "one_comp")  # come last, and without NUTS
BATCHES = 20


# -- a score ---------------------------------------------------------------------------------------


def score(posterior: Posterior, method: str, settings: Settings, folder: Path, num: int) -> Row:
    """Fit, or read the fit that was kept, and hold it against the reference."""
    how = METHODS[method]
    path = folder / f"{short_name(posterior.name)}.{how.kept_as}.{settings.seed}.pt"
    row: Row = {"posterior": posterior.name, "method": method, "seed": settings.seed}
    try:
        fit = how.load(posterior, path) if path.exists() else how.run(posterior, settings, path)
    except Exception as error:  # others are to be scored all the same
        return row | {"seconds": np.nan, "ended": f"failed: {error}"[:200], "parameters": {}}
    row |= {"seconds": fit.seconds, "ended": fit.ended}
    drawn = how.draw(fit, strata(BATCHES, num // BATCHES, fit.log_joint.size, settings.seed))
    if drawn is None:
        return row | {"ended": "has none", "parameters": {}}
    wanted = {name for name, numbers in posterior.reference.items() if numbers["sd"] > 0}
    found = moments(fit.log_joint, drawn, wanted)
    row["parameters"] = {
        name: asdict(Error.of(found[name], posterior.reference[name])) for name in sorted(wanted)
    }
    return row | verdict(posterior, method, fit, row, settings.limit)


def verdict(posterior: Posterior, method: str, fit: Fit, row: Row, limit: float) -> Row:
    """What the fit says of itself, whole and by parameter; nothing where it has no verdict."""
    diagnose = METHODS[method].diagnose
    if diagnose is None:
        return {}
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(), interrupted_after(limit):
            warnings.simplefilter("ignore")  # what they say is in the verdict
            found = diagnose(posterior, fit)
    except Exception as error:  # a verdict that fails is one that the table has to show
        return {"verdict": "failed", "reasons": [f"{type(error).__name__}: {error}"]}
    statuses = found.parameters["status"]
    parameters = {
        name: numbers | {"status": str(statuses.get(from_zero(name), ""))}
        for name, numbers in row["parameters"].items()
    }
    checks = [check for check in found.checks if check.status in {"amber", "red"}]
    return {
        "verdict": found.status,
        "reasons": [f"{check.name} {check.status}: {check.finding}" for check in checks],
        "diagnose_seconds": time.perf_counter() - began,
        "parameters": parameters,
    }


def judge_again(posterior: Posterior, row: Row, folder: Path, limit: float) -> Row:
    """A row with a new verdict on the fit that was kept."""
    how = METHODS[row["method"]]
    path = folder / f"{short_name(row['posterior'])}.{how.kept_as}.{row['seed']}.pt"
    if how.diagnose is None or not path.exists() or not row["parameters"]:
        return row
    return row | verdict(posterior, row["method"], how.load(posterior, path), row, limit)


# -- the run ---------------------------------------------------------------------------------------


def names_of(only: list[str]) -> list[str]:
    """Names that have a part in common with those wanted, slow ones last."""
    chosen = dict.fromkeys(name for part in only for name in MODELS if part in name)
    return sorted(chosen, key=lambda name: any(part in name for part in SLOW))


def is_skipped(name: str, method: str, *, all_nuts: bool) -> bool:
    return method == "NUTS" and not all_nuts and any(part in name for part in SLOW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/scoreboard/scores.jsonl"))
    parser.add_argument("--draws", type=int, default=100_000, help="draws per score")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per fit or verdict")
    parser.add_argument("--nuts-all", action="store_true", help="NUTS on the slow ones, too")
    parser.add_argument("--rediagnose", action="store_true", help="new verdicts on kept fits")
    parser.add_argument("--table", action="store_true", help="only print what is in the file")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    settings = Settings(args.seed, args.limit)
    names = names_of(args.only)
    if args.smoke:
        names, settings, args.draws = names[:1], Settings(args.seed, 5.0, 1.0, 50), 2000
    folder = args.out.parent / "fits"
    folder.mkdir(parents=True, exist_ok=True)

    console = Console(width=190, highlight=False)
    rows = read(args.out)
    pairs = [(n, m) for n in names for m in args.methods]
    for name, method in () if args.table else pairs:
        known = rows.get((name, method, args.seed))
        is_done = known is not None and not args.rediagnose
        if is_done or is_skipped(name, method, all_nuts=args.nuts_all):
            continue
        posterior = load(name)
        if known is None:
            row = score(posterior, method, settings, folder, args.draws)
        else:
            row = judge_again(posterior, known, folder, args.limit)
        rows[key(row)] = row
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" | ".join(cells(row)), flush=True)

    wanted = [(name, method, args.seed) for name, method in pairs]
    chosen = [rows[at] for at in wanted if at in rows]
    if not chosen:
        return
    console.print(score_table(chosen))
    print_good(console, chosen)
    print_verdicts(console, chosen)


if __name__ == "__main__":
    main()
