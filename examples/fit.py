"""Which error bars to believe? Mean field and linear response against NUTS, on real data.

Whether a married woman reports an affair, from 6,366 answers to a magazine's questionnaire (Fair
1978). Age, years married and number of children go together, so their slopes are correlated in the
posterior. Mean field leaves that out and its standard deviations are too small; linear response
mends them without another fit.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from statsmodels.datasets import fair
from torch import Tensor

import pyro_mf as mf


def affairs_model(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.5))
    with pyro.plate("predictor", x.shape[-1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("answer", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope), obs=y)


def load_affairs(num: int) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """At most ``num`` answers, in random order, and the names of the predictors."""
    data = fair.load_pandas().data.sample(frac=1.0, random_state=0).head(num)
    predictors = data.drop(columns="affairs")
    standardised = (predictors - predictors.mean()) / predictors.std()
    x, y = np.array(standardised), np.array(data["affairs"] > 0, float)
    return (torch.from_numpy(x), torch.from_numpy(y)), list(predictors.columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    data, predictors = load_affairs(500 if args.smoke else 10_000)

    result = mf.fit(affairs_model, data)
    print(result)
    print(f"\n{result.summary().round(3)}\n")

    begin = time.perf_counter()
    num = 100 if args.smoke else 500
    nuts = mf.run_nuts(affairs_model, data, num_samples=num, warmup_steps=num, num_chains=2)
    seconds = time.perf_counter() - begin
    nuts_data = nuts.to_arviz(coords={"predictor": predictors})
    like = {"like": nuts_data, "coords": {"predictor": predictors}}
    report = mf.compare_posteriors(
        nuts_data,
        {
            "mean field": result.to_arviz(**like),
            "linear response": result.to_arviz(linear_response=True, **like),
        },
    )
    print(report)
    picture = args.out / "affairs_fit.png"
    mf.plot_comparison(report, path=picture)
    worst = report.summary["sd_ratio_worst"]
    print(
        f"\nThe worst sd is {worst['mean field']:.2f} times NUTS's with mean field and "
        f"{worst['linear response']:.2f} times with linear response. Without NUTS the fit says: "
        f"believe '{result.summary().attrs['believe']}'.\n"
        f"Seconds: fit {sum(result.seconds.values()):.1f}, NUTS {seconds:.1f}.\n"
        f"Picture: {picture}"
    )


if __name__ == "__main__":
    main()
