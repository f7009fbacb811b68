"""Time of NUTS: stock Pyro on the model, the captured density in Pyro's kernel, and in nutpie.

Both of the demo's models, one chain of the same length each, in one process.
Run from the repository's root: python -m benchmarks.nuts
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf
from examples.demo import Problem, affairs, eight_schools

Run = Callable[[Problem, int, int], dict[str, Tensor]]


def stock(problem: Problem, warmup: int, draws: int) -> dict[str, Tensor]:
    return _stock(problem, warmup, draws, jit_compile=False)


def stock_jit(problem: Problem, warmup: int, draws: int) -> dict[str, Tensor]:
    return _stock(problem, warmup, draws, jit_compile=True)


def _stock(problem: Problem, warmup: int, draws: int, *, jit_compile: bool) -> dict[str, Tensor]:
    kernel = NUTS(problem.model, jit_compile=jit_compile, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*problem.args)
    return mcmc.get_samples(group_by_chain=True)


def captured(problem: Problem, warmup: int, draws: int) -> dict[str, Tensor]:
    return _ours(problem, warmup, draws, "pyro")


def nutpie(problem: Problem, warmup: int, draws: int) -> dict[str, Tensor]:
    return _ours(problem, warmup, draws, "nutpie")


def _ours(problem: Problem, warmup: int, draws: int, backend: str) -> dict[str, Tensor]:
    size = {"num_samples": draws, "warmup_steps": warmup, "num_chains": 1}
    return mf.run_nuts(problem.model, problem.args, backend=backend, progress=False, **size).samples


CONTENDERS: dict[str, Run] = {
    "stock Pyro": stock,
    "stock Pyro, torch.jit": stock_jit,
    "captured, Pyro's kernel": captured,
    "captured, nutpie": nutpie,
}


def smallest_ess(samples: dict[str, Tensor]) -> float:
    """Effective sample size of the worst scalar latent."""
    import arviz as az

    flat = torch.cat([v.reshape(*v.shape[:2], -1) for v in samples.values()], -1)
    return min(float(az.ess(flat[..., i].numpy())) for i in range(flat.shape[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    warmup, draws = (20, 20) if args.smoke else (args.warmup, args.draws)
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    torch.set_default_dtype(torch.float64)

    table = Table(title=f"NUTS, one chain of {warmup} + {draws}, everything included")
    for column in ("model", "contender"):
        table.add_column(column)
    for column in ("seconds", "stock takes", "min ESS", "ESS per second"):
        table.add_column(column, justify="right")
    for problem in (eight_schools(), affairs()):
        reference = np.nan
        for name, run in CONTENDERS.items():
            pyro.set_rng_seed(0)
            begin = time.perf_counter()
            samples = run(problem, warmup, draws)
            seconds = time.perf_counter() - begin
            reference = seconds if np.isnan(reference) else reference
            ess = smallest_ess(samples)
            table.add_row(
                problem.name,
                name,
                f"{seconds:.1f}",
                f"{reference / seconds:.1f} x",
                f"{ess:.0f}",
                f"{ess / seconds:.1f}",
            )
        table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
