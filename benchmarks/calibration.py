"""Fits of many data sets: side by side, as `calibrate` makes them, against one `fit` after another.

Both fit the same simulated data with the same seeds, in one process and in turns, each once before
the clock starts. Only the fits are timed, capturing and compiling included; drawing and ranking
truths is not. The fits are the same solver's, so they agree: the largest difference of locations,
in the factors' sds, is in the last column.

Run from the repository's root: python -m benchmarks.calibration
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf
from pyro_mf.density import LogJoint
from pyro_mf.density.data_sets import DataSets
from pyro_mf.diagnostics.joint_draws import Simulations
from pyro_mf.diagnostics.simulations import simulate_all
from pyro_mf.solvers.many_data import Solved, solve_many_data

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(sigma: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def stack_loss(x: Tensor, y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("days", len(x)):
        pyro.sample("y", dist.StudentT(4.0, intercept + x @ slopes, sigma), obs=y)


def fair(x: Tensor, y: Tensor | None = None) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 0.5).expand([x.shape[1]]).to_event(1))
    with pyro.plate("women", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slopes), obs=y)


def covariates(name: str, most: int) -> Tensor:
    """Standardised covariates of one of statsmodels' data sets."""
    data = getattr(sm.datasets, name).load_pandas()
    x = torch.tensor(data.exog.to_numpy(dtype="float64"))[:most]
    return (x - x.mean(0)) / x.std(0)


class Problem(NamedTuple):
    """A model and its covariates."""

    name: str
    model: Callable[..., None]
    load: Callable[[], Tensor]


PROBLEMS = (
    Problem("eight schools", schools, lambda: SIGMA),
    Problem("stack loss, robust", stack_loss, lambda: covariates("stackloss", 21)),
    Problem("affairs, logistic, 200 rows", fair, lambda: covariates("fair", 200)),
)


def side_by_side(simulations: Simulations, size: int) -> list[Any]:
    first = simulations.arguments[0]
    data_sets = DataSets(LogJoint(simulations.log_joint.model, *first), simulations.arguments)
    if data_sets.obstacle:
        raise ValueError(f"the data sets cannot be fitted side by side: {data_sets.obstacle}.")
    return solve_many_data(
        data_sets,
        torch.zeros(size, dtype=torch.float64),
        seeds=range(len(data_sets)),
        tolerance=0.1,
        max_gradients=5000,
        num_at_once=64,
        is_done=lambda _: None,
    )


def one_by_one(simulations: Simulations) -> list[mf.FitResult]:
    model = simulations.log_joint.model
    return [
        mf.fit(model, *arguments, seed=k, progress=False)
        for k, arguments in enumerate(simulations.arguments)
    ]


def largest_difference(together: list[Any], separate: list[mf.FitResult]) -> float:
    """Of locations, in sds of the factors."""
    found = []
    for one, other in zip(together, separate, strict=True):
        if isinstance(one, Solved):
            loc, scale = (p.detach() for p in other.guide.flat_params())
            found.append(float(((one.loc - loc) / scale).abs().max()))
    return max(found)


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = run()
    return time.perf_counter() - begin, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    parser.add_argument("--num", type=int, default=200, help="data sets")
    args = parser.parse_args()
    num, repeats = (20, 1) if args.smoke else (args.num, 3)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    table = Table(title=f"seconds for {num} data sets, median (range) of {repeats}")
    for column in ("model", "latents", "one by one", "side by side", "ratio", "differ by"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for problem in PROBLEMS[: 1 if args.smoke else None]:
        template: Any = ((problem.load(), None), {})
        simulations = simulate_all(problem.model, {"y": "y"}, num, template, seed=0)
        size = simulations.log_joint.size
        side_by_side(simulations, size)
        mf.fit(problem.model, *simulations.arguments[0], progress=False)
        rounds = []
        for _ in range(repeats):
            slow, separate = seconds_of(lambda s=simulations: one_by_one(s))
            fast, together = seconds_of(lambda s=simulations, d=size: side_by_side(s, d))
            rounds.append((slow, fast, slow / fast))
        difference = largest_difference(together, separate)
        cells = [
            f"{statistics.median(x):.1f} ({min(x):.1f} to {max(x):.1f})"
            for x in zip(*rounds, strict=True)
        ]
        table.add_row(problem.name, str(size), *cells, f"{difference:.1g}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
