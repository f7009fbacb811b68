"""Peak memory of `fit` on a logistic regression with up to a million rows and 10 predictors.

Every size runs in a process of its own. "Before" is the peak once the data are made, "of the fit"
what the peak grew by. Run from the repository's root: python -m benchmarks.memory
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.logistic import logistic_regression
from pyro_mf.fitting import fit

SIZE = 10
MEBI = 2**20


def peak() -> float:
    """Most memory that this process has held so far, MiB."""
    kibi = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibi / MEBI


def measure(rows: int) -> dict[str, float | str]:
    """Fit one regression in this process."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, SIZE, generator=generator)
    y = torch.bernoulli(torch.sigmoid(x.sum(-1) / 2), generator=generator)
    before = peak()
    begin = time.perf_counter()
    result = fit(logistic_regression, (x, y), progress=False)
    return {
        "data": (x.nbytes + y.nbytes) / MEBI,
        "before": before,
        "fit": peak() - before,
        "seconds": time.perf_counter() - begin,
        "gradients": result.num_gradients,
        "stopped": result.stop_reason,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    if args.child:
        print(json.dumps(measure(args.rows[0])))
        return
    table = Table(title=f"Memory of a logistic regression with {SIZE} predictors, MiB")
    for column in ("rows", "data", "before", "of the fit", "fit / data", "seconds", "gradients"):
        table.add_column(column, justify="right")
    table.add_column("stopped")
    for rows in [1000] if args.smoke else args.rows:
        command = [sys.executable, "-m", "benchmarks.memory", "--child", "--rows", str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        table.add_row(
            f"{rows:,}",
            f"{found['data']:.1f}",
            f"{found['before']:.0f}",
            f"{found['fit']:.0f}",
            f"{found['fit'] / found['data']:.1f}",
            f"{found['seconds']:.1f}",
            str(found["gradients"]),
            found["stopped"],
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
