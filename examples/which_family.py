"""Which family of factors does a marginal need? Skewed and heavy-tailed posteriors, side by side.

Two small hierarchical posteriors: the eight schools, whose spread between schools is hardly known,
and a robust regression of the stack loss data, with the degrees of freedom of its errors unknown.
Under the forward KL all families are fitted to the draws of one fit: what is left is their own
misfit. Under the reverse KL the ELBO says what they gain. `family="auto"` chooses by itself.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf

FAMILIES = ("normal", "sinh_arcsinh", "spline", "auto")
COLOURS = dict(zip(FAMILIES, ("tab:blue", "tab:orange", "tab:green", "black"), strict=True))
NUM_DRAWS, NUM_FRESH = 20_000, 10_000


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def stack_loss(x: Tensor, y: Tensor) -> None:
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(5.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("days", len(y)):
        pyro.sample("loss", dist.StudentT(df, intercept + x @ slopes, sigma), obs=y)


def load_schools() -> tuple[Tensor, ...]:
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return sigma, torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def load_stack_loss() -> tuple[Tensor, ...]:
    data = sm.datasets.stackloss.load_pandas()
    x = torch.tensor(data.exog.to_numpy(dtype="float64"))
    y = torch.tensor(data.endog.to_numpy(dtype="float64"))
    return (x - x.mean(0)) / x.std(0), y - y.mean()


@dataclass
class Problem:
    """A posterior, and the site whose marginal is drawn."""

    name: str
    model: Callable[..., None]
    load: Callable[[], tuple[Tensor, ...]]
    shown: str
    largest: float


PROBLEMS = (
    Problem("eight schools: tau", schools, load_schools, "tau", 15.0),
    Problem("stack loss: df", stack_loss, load_stack_loss, "df", 60.0),
)


@dataclass
class Found:
    """What one family makes of a posterior."""

    family: str
    chosen: str
    forward: mf.FitResult
    reverse: mf.FitResult

    def density(self, site: str, x: Tensor) -> Tensor:
        """Density of a positive scalar site under the forward fit."""
        layout = self.forward.layout
        u = self.forward.guide.layout[site].transform.inv(x)
        family, params = self.forward.guide.site_family(layout[site])
        log_prob = family.log_prob(tuple(p.detach() for p in params.values()), u)
        return (log_prob - layout[site].transform.log_abs_det_jacobian(u, x)).exp()


def fit_all(problem: Problem, families: tuple[str, ...]) -> tuple[dict[str, Tensor], list[Found]]:
    """Draws of the posterior by site, and a fit of both objectives for every family."""
    options: dict[str, Any] = {"progress": False}
    data = problem.load()
    first = mf.fit(problem.model, data, objective=mf.ForwardKL(), **options)
    draws = first.sample(NUM_DRAWS, draws=True)
    found = []
    for family in families:
        forward = mf.fit(
            problem.model,
            data,
            family=family,
            objective=mf.ForwardKL(),
            draws=draws,
            **options,
        )
        reverse = mf.fit(problem.model, data, family=family, **options)
        chosen = {site: f.name for site, f in forward.guide.families.items()}
        found.append(Found(family, chosen[problem.shown], forward, reverse))
    return draws, found


def quantile_error(found: Found, draws: dict[str, Tensor], p: float) -> float:
    """Error of a quantile in sds of the draws, averaged over all latents."""
    ours = found.forward.guide.quantiles([p])
    errors = [
        ((ours[site][0].cpu() - draws[site].quantile(p, 0)) / draws[site].std(0)).abs().reshape(-1)
        for site in ours
    ]
    return float(torch.cat(errors).mean())


def elbo(result: mf.FitResult) -> tuple[float, float]:
    """ELBO over many fresh draws, with its standard error."""
    z = result.sample_unconstrained(NUM_FRESH, seed=1)
    with torch.no_grad():
        log_weights = result.log_joint(z) - result.guide.log_prob_unconstrained(z)
    return float(log_weights.mean()), float(log_weights.std()) / NUM_FRESH**0.5


def make_table(rows: list[tuple[Problem, dict[str, Tensor], list[Found]]]) -> Table:
    table = Table(title="forward KL: errors of quantiles in sds; reverse KL: nats of ELBO")
    table.add_column("posterior", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for column in ("5 %", "50 %", "95 %", "ELBO", "above normal"):
        table.add_column(column, justify="right", no_wrap=True)
    for problem, draws, fits in rows:
        base = elbo(fits[0].reverse)[0]
        for found in fits:
            value, error = elbo(found.reverse)
            name = found.family if found.family != "auto" else f"auto ({found.chosen})"
            table.add_row(
                problem.name,
                name,
                *(f"{quantile_error(found, draws, p):.3f}" for p in (0.05, 0.5, 0.95)),
                f"{value:.3f} ± {error:.3f}",
                f"{value - base:.3f}",
            )
        table.add_section()
    return table


def picture(rows: list[tuple[Problem, dict[str, Tensor], list[Found]]], path: Path) -> None:
    """The skewed marginal of each posterior under every family, over the draws."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(5.5 * len(rows), 4), layout="constrained", squeeze=False
    )
    for axes, (problem, draws, fits) in zip(panels[0], rows, strict=True):
        x = torch.linspace(problem.largest / 400, problem.largest, 400)
        values = draws[problem.shown].numpy()
        axes.hist(
            values, bins=80, range=(0.0, problem.largest), density=True, color="0.85", label="draws"
        )
        for found in fits:
            style = "--" if found.family == "auto" else "-"
            label = found.family if style == "-" else f"auto: {found.chosen}"
            density = found.density(problem.shown, x)
            axes.plot(x, density, style, color=COLOURS[found.family], label=label)
        axes.set(xlabel=problem.name, yticks=[], xlim=(0.0, problem.largest))
        axes.legend(frameon=False)
    figure.suptitle("Marginals by the forward KL: one family each, fitted to the same draws")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    rows = []
    families = ("normal", "auto") if args.smoke else FAMILIES
    for problem in PROBLEMS[: 1 if args.smoke else None]:
        rows.append((problem, *fit_all(problem, families)))
    path = args.out / "which_family.png"
    picture(rows, path)
    Console(width=120).print(make_table(rows))
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
