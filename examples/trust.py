"""Which fit can be trusted? A verdict on each, and NUTS to see whether the verdict was right.

Murder rates of the states of the USA, explained by poverty, single parents, urbanisation and the
share of high-school graduates, with errors that may have heavy tails. Predictors are used as they
are recorded, not centred, so that coefficients depend on one another, as in most first models. Four
fits of the same model: mean field by reverse KL, its linear response, forward KL with factors that
can be skewed where a site needs it, and a guide that stock SVI trained for too short a time.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf
from pyro_mf.plots import plot_diagnosis


def murders(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 50.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 5.0).expand([x.shape[1]]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("state", len(y)):
        pyro.sample("rate", dist.StudentT(df, intercept + x @ slopes, scale), obs=y)


def load(*, smoke: bool) -> tuple[Tensor, Tensor]:
    data = sm.datasets.statecrime.load_pandas().data
    predictors = data[["poverty", "single", "urban", "hs_grad"]]
    x = torch.tensor(predictors.to_numpy())
    if smoke:  # a posterior that chains cross in few steps
        x = (x - x.mean(0))[:, :2]
    return x, torch.tensor(data["murder"].to_numpy())


def train_stock(args: tuple[Any, ...], steps: int) -> AutoNormal:
    guide = AutoNormal(murders)
    svi = SVI(murders, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(options.seed)

    args = load(smoke=options.smoke)
    reverse = mf.fit(murders, args, seed=options.seed)
    family = "normal" if options.smoke else "auto"
    forward = mf.fit(murders, args, objective=mf.ForwardKL(), family=family, seed=options.seed)
    stock = train_stock(args, 50 if options.smoke else 1000)
    verdicts = {
        "mean field": reverse.diagnose(),
        "linear response": reverse.diagnose(linear_response=True),
        "forward KL": forward.diagnose(),
        "SVI, cut short": mf.diagnose(stock, murders, args),
    }
    print(verdicts["mean field"])

    # Predictors that are not centred make long trajectories, so that NUTS takes most of the time.
    work = {"num_samples": 60, "num_chains": 2, "max_tree_depth": 3} if options.smoke else {}
    nuts = mf.run_nuts(
        murders, args, warmup_steps=60 if options.smoke else 1000, seed=options.seed, **work
    ).to_arviz()
    fits = {
        "mean field": reverse.to_arviz(like=nuts),
        "linear response": reverse.to_arviz(linear_response=True, like=nuts),
        "forward KL": forward.to_arviz(like=nuts),
        "SVI, cut short": mf.from_pyro_svi(stock, args, model=murders, like=nuts),
    }
    summary = mf.compare_posteriors(nuts, fits).summary

    table = Table(title="What the verdict says, and what NUTS says", title_justify="left")
    for column in ("fit", "verdict", "worst mean error", "worst sd ratio", "by NUTS: mean", "sd"):
        table.add_column(column)
    for name, verdict in verdicts.items():
        own, nuts_row = verdict["marginals"].values, summary.loc[name]
        table.add_row(
            name,
            verdict.status,
            f"{own['mean_error']:+.2f}",
            f"{own['sd_ratio']:.2f}",
            f"{nuts_row['mean_error_worst']:.2f}",
            f"{nuts_row['sd_ratio_worst']:.2f}",
        )
    Console(width=100).print(table)
    path = options.out / "trust.png"
    plot_diagnosis(verdicts, path=path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
