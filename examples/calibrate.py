"""Can the eight schools' uncertainties be trusted? Simulate schools, fit each, look for the truth.

The model says what it holds for likely, so it can be asked for two hundred other sets of eight
schools, with truths that are known. Each set is fitted in three ways. Where a posterior is right,
the truth lies below its 5 % quantile one time in twenty, and so on for every quantile. Mean field
with the reverse KL is too sure of how much schools differ (tau); linear response of the very same
fits is not. Nor does a fit's ELBO or its convergence tell the difference.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from torch import Tensor

import pyro_mf as mf

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # errors of real schools
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def non_centred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def centred(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


CASES = (
    ("non_centred_mean_field", non_centred, False),
    ("non_centred_linear_response", non_centred, True),
    ("centred_mean_field", centred, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    console = Console(width=120)
    for name, model, linear_response in CASES[: 1 if args.smoke else None]:
        found = mf.calibrate(
            model,
            num_simulations=20 if args.smoke else 200,
            model_args=(SIGMA, Y),
            linear_response=linear_response,
            progress=False,
        )
        console.print(found)
        path = args.out / f"calibrate_{name}.png"
        plt.close(mf.plot_calibration(found, path=path))
        print(f"Picture: {path}\n")


if __name__ == "__main__":
    main()
