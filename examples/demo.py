"""How good is a mean-field fit, and which error bars to believe? Two real data sets, with NUTS.

Eight schools (Rubin 1981), non-centred, and a logistic regression on 6,366 answers to a magazine's
questionnaire (Fair 1978). Each is fitted by `fit`, whose linear response corrects the standard
deviations, and sampled with NUTS on the same captured density; both are compared with it parameter
by parameter.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import fair
from torch import Tensor

import pyro_mf as mf


@dataclass
class Problem:
    """A model with its data, and labels for its plates."""

    name: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    coords: dict[str, list[str]]
    target_accept_prob: float = 0.8  # of NUTS


class Laps:
    """Wall time of one phase after another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    def end(self, name: str) -> None:
        """The phase that has run until now was ``name``."""
        now = time.perf_counter()
        self.seconds[name] = now - self._begin
        self._begin = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())


def schools_model(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic_model(x, y=None):
    with pyro.plate("predictor", x.shape[-1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.5))
    with pyro.plate("answer", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=slope @ x.T), obs=y)


def eight_schools() -> Problem:
    """Effects of coaching in eight schools, with their standard errors."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    coords = {"school": list("ABCDEFGH")}
    return Problem("eight schools", schools_model, (sigma, y), coords, target_accept_prob=0.95)


def affairs() -> Problem:
    """Whether a married woman reports an affair, on standardised predictors and an intercept."""
    data = fair.load_pandas().data
    predictors = data.drop(columns="affairs")
    standardised = (predictors - predictors.mean()) / predictors.std()
    x = np.column_stack([np.ones(len(data)), standardised])
    y = (data["affairs"] > 0).to_numpy(float)
    names = ["intercept", *predictors.columns]
    return Problem(
        "affairs", logistic_model, (torch.as_tensor(x), torch.as_tensor(y)), {"predictor": names}
    )


def what_mean_field_misses(report: Any, believed: str) -> str:
    """Two sentences, read off the table."""
    table = report.table.xs("mean field", level="fit")
    response = report.table.xs("linear response", level="fit")
    worst = table["sd_ratio"].idxmin()
    return (
        f"Mean field treats parameters as independent: its sd of {worst} is "
        f"{table.loc[worst, 'sd_ratio']:.2f} of NUTS's, that of linear response "
        f"{response.loc[worst, 'sd_ratio']:.2f}. Median over the parameters: "
        f"{table['sd_ratio'].median():.2f} and {response['sd_ratio'].median():.2f}. Without NUTS "
        f"the fit says: believe '{believed}'."
    )


def run(problem: Problem, out: Path, *, smoke: bool) -> None:
    """Fit, sample, compare, print and draw."""
    print(f"\n=== {problem.name}: {', '.join(str(tuple(a.shape)) for a in problem.args)} data\n")
    laps = Laps()
    result = mf.fit(problem.model, problem.args)
    laps.end("fit")
    short = {"num_samples": 50, "warmup_steps": 50, "num_chains": 2}
    full = {"num_samples": 400, "warmup_steps": 200, "num_chains": 4}
    nuts = mf.run_nuts(
        problem.model,
        problem.args,
        target_accept_prob=problem.target_accept_prob,
        **(short if smoke else full),
    )
    laps.end("NUTS")
    nuts_data = nuts.to_arviz(coords=problem.coords)
    like = {"like": nuts_data, "coords": problem.coords}
    fits = {
        "mean field": result.to_arviz(**like),
        "linear response": result.to_arviz(linear_response=True, **like),
    }
    laps.end("to ArviZ")
    report = mf.compare_posteriors(nuts_data, fits)
    picture = out / f"{problem.name.replace(' ', '_')}.png"
    mf.plot_comparison(report, path=picture)
    laps.end("table and picture")

    print(f"{result}\n\n{report}")
    print(f"\n{what_mean_field_misses(report, result.summary().attrs['believe'])}")
    print(f"Seconds: {laps}")
    print(f"Picture: {picture}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    begin = time.perf_counter()
    for problem in (eight_schools(), affairs()):
        run(problem, args.out, smoke=args.smoke)
    print(f"\nDone in {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    main()
