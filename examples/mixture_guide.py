"""Does one fit cover a posterior of two modes? Regimes of economic growth, whose labels can swap.

Quarterly growth of US GDP, 1959 to 2009, as a mixture of two regimes. Nothing in model or data says
which regime is the first, so the posterior has two modes, mirror images of each other. A mean field
fits one of them, and chains of NUTS seldom change sides. Mixtures of mean fields are fitted beside.
What is true is known here: the draws of NUTS with the labels of half of them swapped.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from statsmodels.datasets import macrodata
from torch import Tensor

import pyro_mf as mf
from pyro_mf.guides import log_importance_weights
from pyro_mf.weights import psis

NUM_DRAWS = 4000


def regimes(growth: Tensor) -> None:
    """Two regimes with means and sds of their own; every prior treats them alike."""
    share = pyro.sample("share", dist.Dirichlet(torch.full((2,), 2.0)))
    with pyro.plate("regime", 2):
        loc = pyro.sample("loc", dist.Normal(1.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("quarter", len(growth)):
        law = dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(loc, scale))
        pyro.sample("growth", law, obs=growth)


def data() -> Tensor:
    """Percent by quarter, 202 of them."""
    gdp = macrodata.load_pandas().data["realgdp"].to_numpy()
    return torch.as_tensor(100.0 * np.diff(np.log(gdp)))


@dataclass
class Row:
    """What one method says: draws of the two regimes' sds, and numbers about it."""

    name: str
    scales: Tensor
    elbo: str = ""
    khat: str = ""
    seconds: float = float("nan")

    @property
    def first_is_wider(self) -> float:
        """Probability that the first regime is the wider one; a half, by symmetry."""
        return float((self.scales[:, 0] > self.scales[:, 1]).double().mean())


def fit(growth: Tensor, num_components: int) -> Row:
    """One mean field, or a mixture of several."""
    guide = mf.AutoMeanField(regimes)
    name = "one mean field"
    if num_components > 1:
        guide = mf.AutoMeanFieldMixture(regimes, num_components)
        name = f"mixture of {num_components}"
    result = mf.fit(regimes, (growth,), guide=guide)
    print(f"\n{result}")
    khat = psis(log_importance_weights(regimes, guide, (growth,), num_draws=NUM_DRAWS)).khat
    return Row(
        name,
        result.sample(NUM_DRAWS)["scale"],
        f"{result.elbo:.2f} ± {result.elbo_se:.2f}",
        f"{khat:.2f}",
        sum(result.seconds.values()),
    )


def sample(growth: Tensor, *, smoke: bool) -> tuple[Row, Row]:
    """NUTS as it runs, and with both labellings."""
    few = {"num_samples": 50, "warmup_steps": 50, "num_chains": 2}
    many = {"num_samples": 1000, "warmup_steps": 500, "num_chains": 4}
    nuts = mf.run_nuts(regimes, (growth,), **(few if smoke else many))
    chains = nuts.samples["scale"]
    sides = [f"{float((c[:, 0] > c[:, 1]).double().mean()):.2f}" for c in chains]
    print(f"\nNUTS: share of draws with the first regime wider, chain by chain: {', '.join(sides)}")
    draws = chains.flatten(0, 1)
    seconds = sum(nuts.seconds.values())
    both = torch.cat([draws, draws.flip(1)])
    return Row("NUTS", draws, seconds=seconds), Row("NUTS, both labellings", both)


def make_table(rows: list[Row]) -> Table:
    table = Table(title="sds of the two regimes, percent by quarter")
    table.add_column("method", no_wrap=True)
    for column in (
        "ELBO",
        "k-hat",
        "P(first is wider)",
        "mean of first",
        "sd of first",
        "5 %",
        "95 %",
        "seconds",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        first = row.scales[:, 0]
        low, high = torch.quantile(first, torch.tensor([0.05, 0.95], dtype=first.dtype))
        numbers = (row.first_is_wider, first.mean(), first.std(), low, high)
        seconds = "" if np.isnan(row.seconds) else f"{row.seconds:.1f}"
        table.add_row(row.name, row.elbo, row.khat, *(f"{float(x):.2f}" for x in numbers), seconds)
    return table


def picture(rows: list[Row], path: Path) -> None:
    """Both regimes' sds against each other, a panel for each method."""
    figure, panels = plt.subplots(
        1, len(rows), figsize=(3.1 * len(rows), 3.5), sharex=True, sharey=True, layout="constrained"
    )
    for axes, row in zip(panels, rows, strict=True):
        shown = row.scales[:: max(1, len(row.scales) // 1500)]
        axes.plot([0.1, 1.5], [0.1, 1.5], color="0.8", lw=1)
        axes.plot(*shown.T, ".", ms=2, alpha=0.4)
        axes.set(aspect="equal", xlim=(0.1, 1.5), ylim=(0.1, 1.5), xlabel="sd of first regime")
        axes.set_title(f"{row.name}\n{row.elbo and f'ELBO {row.elbo}'}", fontsize=9)
    panels[0].set_ylabel("sd of second regime")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    torch.manual_seed(0)
    growth = data()
    rows = [fit(growth, num) for num in ((1, 2) if args.smoke else (1, 2, 4))]
    rows += sample(growth, smoke=args.smoke)
    path = args.out / "mixture_guide.png"
    picture(rows, path)
    Console(width=140).print(make_table(rows))
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
