"""Which model predicts better, by NUTS and by variational inference?

Murder rates of the states of the USA in 2009, regressed on predictors that say much the same, with
Normal errors and with Student's t of four degrees of freedom: one state is an outlier. The
leave-one-out predictive density of both models is computed from draws of NUTS, from draws of the
mean-field fit taken for the posterior's (wrong), and from those of the fit and of its linear
response with the weights that correct for what they are. k-hat says which of these to believe.
"""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf
from pyro_mf.convert import ELPDNumbers, elpd_numbers, generations, loo

PREDICTORS = ["violent", "hs_grad", "poverty", "single", "urban"]
SOURCES = ("NUTS", "mean field, taken as is", "mean field", "linear response")
COLOURS = dict(zip(SOURCES, ("black", "tab:red", "tab:orange", "tab:blue"), strict=True))
NUM_DRAWS = 4000


def normal_errors(x: Tensor, y: Tensor) -> None:
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("state", len(y)):
        pyro.sample("murder", dist.Normal(intercept + x @ slopes, sigma), obs=y)


def student_errors(x: Tensor, y: Tensor) -> None:
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    with pyro.plate("state", len(y)):
        pyro.sample("murder", dist.StudentT(4.0, intercept + x @ slopes, sigma), obs=y)


MODELS = {"Normal": normal_errors, "Student t": student_errors}


def load() -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Standardised predictors, murders per 100 000, and the states' names."""
    table = sm.datasets.statecrime.load_pandas().data
    x = torch.tensor(table[PREDICTORS].to_numpy(dtype="float64"))
    y = torch.tensor(table["murder"].to_numpy(dtype="float64"))
    return ((x - x.mean(0)) / x.std(0), y), list(table.index)


@dataclass
class Found:
    """What the draws of one source say of one model."""

    elpd: ELPDNumbers
    seconds: float


def leave_out(model: Any, data: tuple[Tensor, ...], num_draws: int) -> dict[str, Found]:
    """The leave-one-out predictive density by every source."""
    fit = mf.fit(model, data, progress=False)
    nuts = mf.run_nuts(
        model,
        data,
        num_samples=num_draws // 4,
        warmup_steps=num_draws // 4,
        num_chains=4,
        progress=False,
    )
    vi = sum(fit.seconds.values())
    draws = fit.to_arviz(num_draws=num_draws)
    found = {
        "NUTS": Found(elpd_numbers(loo(nuts)), sum(nuts.seconds.values())),
        "mean field, taken as is": Found(
            elpd_numbers(generations.import_arviz().loo(draws, pointwise=True)), vi
        ),
        "mean field": Found(elpd_numbers(loo(draws)), vi),
        "linear response": Found(
            elpd_numbers(loo(fit, linear_response=True, num_draws=num_draws)), vi
        ),
    }
    return {source: found[source] for source in SOURCES}


def difference(found: dict[str, dict[str, Found]], source: str) -> tuple[float, float]:
    """By how much Student's t predicts better, in nats, with its standard error over the states."""
    of_each = found["Student t"][source].elpd.pointwise - found["Normal"][source].elpd.pointwise
    return float(of_each.sum()), float(np.sqrt(len(of_each)) * of_each.std(ddof=1))


def make_table(found: dict[str, dict[str, Found]]) -> Table:
    table = Table(title="Leave-one-out log predictive density in nats: more is better")
    table.add_column("draws of", no_wrap=True)
    for model in MODELS:
        table.add_column(f"elpd: {model}", justify="right", no_wrap=True)
        table.add_column("p", justify="right")
        table.add_column("k bad", justify="right")
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("s", justify="right")
    for source in SOURCES:
        row = [source]
        for model in MODELS:
            elpd = found[model][source].elpd
            row += [f"{elpd.elpd:.2f}", f"{elpd.p:.1f}", f"{elpd.num_bad}/{len(elpd.khat)}"]
        gain, error = difference(found, source)
        seconds = sum(found[model][source].seconds for model in MODELS)
        table.add_row(*row, f"{gain:.2f} ± {error:.2f}", f"{seconds:.1f}")
    return table


def picture(found: dict[str, dict[str, Found]], states: list[str], path: Path) -> None:
    """Left: what each source makes of both models. Right: k-hat of every state, Normal errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for row, source in enumerate(SOURCES):
        for model, marker in zip(MODELS, "os", strict=True):
            elpd = found[model][source].elpd
            face = "white" if elpd.num_bad else COLOURS[source]
            left.plot(elpd.elpd, row, marker, color=COLOURS[source], mfc=face, markersize=9)
    for model, style in zip(MODELS, ("--", ":"), strict=True):
        left.axvline(found[model]["NUTS"].elpd.elpd, color="0.7", linestyle=style, zorder=0)
    left.set(
        yticks=range(len(SOURCES)),
        yticklabels=SOURCES,
        ylim=(len(SOURCES) - 0.5, -0.5),
        xlabel="elpd in nats (circle: Normal, square: Student t; hollow: some k-hat is bad)",
    )
    for source in ("linear response", "mean field", "NUTS"):
        elpd = found["Normal"][source].elpd
        right.plot(elpd.khat, ".", color=COLOURS[source], label=source)
    good_k = found["Normal"]["NUTS"].elpd.good_k
    right.axhline(good_k, color="0.5", linestyle="--")
    worst = int(np.argmax(found["Normal"]["NUTS"].elpd.khat))
    right.annotate(
        states[worst],
        (worst, found["Normal"]["NUTS"].elpd.khat[worst]),
        xytext=(8, 4),
        textcoords="offset points",
    )
    right.set(xlabel="state", ylabel="k-hat without this state", xticks=[])
    right.margins(y=0.25)
    right.legend(frameon=False, loc="lower center", ncols=3)
    figure.suptitle("Leave-one-out needs draws of the posterior, or weights that make up for it")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    warnings.simplefilter("ignore", UserWarning)  # the table counts what they say of k-hat
    data, states = load()
    num_draws = 200 if args.smoke else NUM_DRAWS
    found = {name: leave_out(model, data, num_draws) for name, model in MODELS.items()}
    path = args.out / "compare_models_loo.png"
    picture(found, states, path)
    Console(width=120).print(make_table(found))
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
