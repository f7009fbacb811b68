"""Which fit may predict, and which may report a parameter? Collinear real data, against NUTS.

Longley's economic series (1967) are collinear as few data are: the predictors of employment move
together from year to year. A forward-KL mean field gets every coefficient's own uncertainty right
and, having no correlations, predicts with far too much; a reverse-KL mean field is the other way
round; linear response, with correlations, is right in both. Then the eight schools (Rubin 1981),
where no posterior is normal and all of them err a little. NUTS is the judge, and is judged itself.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import longley
from torch import Tensor

import pyro_mf as mf
from pyro_mf import plots

SCHOOLS_Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOLS_SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
NOISE = 0.1  # sd of the standardised employment given its predictors


def employment(x: Tensor, y: Tensor) -> None:
    with pyro.plate("predictor", x.shape[-1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("year", len(y)):
        trend = pyro.deterministic("trend", slope @ x.T)
        pyro.sample("y", dist.Normal(trend, NOISE), obs=y)


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def problems() -> dict[str, tuple[Callable[..., Any], tuple[Tensor, Tensor], dict[str, list[str]]]]:
    """Models with their data and labels."""
    frame = longley.load_pandas().data
    scaled = (frame - frame.mean()) / frame.std()
    predictors = [name for name in scaled.columns if name != "TOTEMP"]
    x, y = (torch.tensor(scaled[c].to_numpy()) for c in (predictors, "TOTEMP"))
    years = [str(int(year)) for year in frame["YEAR"]]
    return {
        "employment": (employment, (x, y), {"predictor": predictors, "year": years}),
        "schools": (
            schools,
            (torch.tensor(SCHOOLS_SIGMA), torch.tensor(SCHOOLS_Y)),
            {"school": list("ABCDEFGH")},
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    short = {"num_samples": 50, "warmup_steps": 50, "num_chains": 2, "max_tree_depth": 4}
    size = short if args.smoke else {"num_samples": 400, "warmup_steps": 300, "num_chains": 4}
    num_draws = 300 if args.smoke else 2000
    for name, (model, data, coords) in list(problems().items())[: 1 if args.smoke else None]:
        reverse = mf.fit(model, data)
        forward = mf.fit(model, data, objective=mf.ForwardKL())
        nuts = mf.run_nuts(model, data, target_accept_prob=0.8 if args.smoke else 0.9, **size)
        both = {"coords": coords, "posterior_predictive": True}
        settings = {"num_draws": num_draws, **both}
        fits = {
            "reverse": reverse.to_arviz(**settings),
            "forward": forward.to_arviz(**settings),
            "linear response": reverse.to_arviz(linear_response=True, **settings),
        }
        report = mf.compare_posteriors(nuts.to_arviz(**both), fits)
        print(f"\n=== {name}\n\n{report}\n")
        for picture in ("comparison", "ranks", "pairs", "sds", "trace", "khat", "predictive"):
            path = args.out / f"compare_{name}_{picture}.png"
            getattr(plots, f"plot_{picture}")(report, path=path)
            matplotlib.pyplot.close("all")
            print(f"Picture: {path}")


if __name__ == "__main__":
    main()
