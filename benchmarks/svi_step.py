"""Time of one `svi.step`: AutoMeanField with ReverseKL against stock AutoNormal with Trace_ELBO.

Both of the demo's models, the same number of particles, all contenders interleaved in one process.
Run from the repository's root: python -m benchmarks.svi_step
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from rich.console import Console
from rich.table import Table

import pyro_mf as mf
from examples.demo import Problem, affairs, eight_schools

STOCK = "stock"
TURN = 6  # steps in a row


def contenders(problem: Problem, particles: int) -> dict[str, Callable[[], float]]:
    """One step of every contender, each with parameters of its own."""

    def stock(elbo: type[Trace_ELBO], *, vectorise: bool) -> Callable[[], float]:
        loss = elbo(num_particles=particles, vectorize_particles=vectorise, max_plate_nesting=1)
        return stepper(AutoNormal(problem.model), loss)

    def ours(backend: str) -> Callable[[], float]:
        loss = mf.ReverseKL(num_particles=particles, backend=backend)
        return stepper(mf.AutoMeanField(problem.model), loss)

    def stepper(guide: Callable, loss: pyro.infer.ELBO) -> Callable[[], float]:
        svi = SVI(problem.model, guide, pyro.optim.Adam({"lr": 0.001}), loss=loss)
        state = {"params": {}, "constraints": {}}

        def step() -> float:
            with pyro.get_param_store().scope(state):
                begin = time.perf_counter()
                svi.step(*problem.args)
                return time.perf_counter() - begin

        return step

    found = {STOCK: stock(Trace_ELBO, vectorise=False)}
    if particles > 1:
        found["stock, vectorised particles"] = stock(Trace_ELBO, vectorise=True)
    found["stock, torch.jit"] = stock(JitTrace_ELBO, vectorise=particles > 1)
    found["ours, graph"] = ours("graph")
    found["ours, compiled"] = ours("compile")
    return found


def measure(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per step, contenders taking turns so that whatever slows the machine slows all.

    A turn is a few steps in a row, as in training; the first, whose caches another contender left,
    does not count.
    """
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name] += [step() for _ in range(TURN)][1:]
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)

    rounds = 3 if args.smoke else args.rounds
    table = Table(title=f"svi.step, median of {rounds} rounds, {torch.get_num_threads()} threads")
    for column in ("model", "particles", "contender"):
        table.add_column(column)
    for column in ("µs per step", "10 % to 90 %", "stock takes"):
        table.add_column(column, justify="right")
    for problem in (eight_schools(), affairs()):
        for particles in args.particles:
            seconds = measure(contenders(problem, particles), rounds)
            reference = np.median(seconds[STOCK])
            for name, times in seconds.items():
                low, middle, high = np.quantile(times, [0.1, 0.5, 0.9]) * 1e6
                table.add_row(
                    problem.name,
                    str(particles),
                    name,
                    f"{middle:.0f}",
                    f"{low:.0f} to {high:.0f}",
                    f"{reference / middle * 1e6:.1f} x",
                )
            table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
