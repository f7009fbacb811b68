"""How far is stock SVI from the optimum? Its loss against that of `fit`, on real data.

Whether a married woman reports an affair, from 6,366 answers to a magazine's questionnaire (Fair
1978). The same guide is trained by Pyro's own `SVI` with the captured `ReverseKL`, and by `fit`.
"""

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
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


def load_affairs(num: int) -> tuple[Tensor, Tensor]:
    """At most ``num`` answers, in random order, predictors standardised."""
    data = fair.load_pandas().data.sample(frac=1.0, random_state=0).head(num)
    predictors = data.drop(columns="affairs")
    standardised = (predictors - predictors.mean()) / predictors.std()
    x, y = np.array(standardised), np.array(data["affairs"] > 0, float)
    return torch.from_numpy(x), torch.from_numpy(y)


def train(data: tuple[Tensor, Tensor], rate: float, steps: int) -> tuple[list[float], float]:
    """Losses and seconds of stock SVI at one learning rate."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = mf.AutoMeanField(affairs_model)
    optimiser = pyro.optim.Adam({"lr": rate})
    svi = pyro.infer.SVI(affairs_model, guide, optimiser, loss=mf.ReverseKL(num_particles=8))
    begin = time.perf_counter()
    losses = [svi.step(*data) for _ in range(steps)]
    return losses, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    data = load_affairs(500 if args.smoke else 10_000)

    begin = time.perf_counter()
    result = mf.fit(affairs_model, data)
    seconds = time.perf_counter() - begin
    print(result, f"\n\nfit: {result.num_gradients} gradients, {seconds:.1f} s\n")

    figure, axes = plt.subplots(figsize=(7, 4))
    for rate in (0.1, 0.01, 0.001):
        losses, spent = train(data, rate, steps=60 if args.smoke else 1500)
        last = np.mean(losses[-len(losses) // 10 :]) + result.elbo
        axes.plot(np.array(losses) + result.elbo, label=f"Adam, learning rate {rate}", lw=0.7)
        print(
            f"SVI, learning rate {rate}: {len(losses)} gradients, {spent:.1f} s, its last tenth "
            f"{last:.2f} nats above the loss that fit reached"
        )
    axes.axhline(0.0, color="black", lw=1, label="fit")
    axes.set(xlabel="step", ylabel="loss above that of fit (nats)", yscale="symlog")
    axes.legend()
    picture = args.out / "svi_losses.png"
    figure.savefig(picture, dpi=150, bbox_inches="tight")
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
