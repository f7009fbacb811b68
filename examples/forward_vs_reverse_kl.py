"""What does each KL divergence make of correlation, two modes, and skew? Pictures and numbers.

A normal mean field is fitted by `fit` under the reverse KL(q||p), which avoids regions where p has
no mass (zero-forcing), and under the forward KL(p||q), which must not leave out regions where p has
mass (zero-avoiding). Every p here has evidence 1, so the bracket ELBO <= log evidence <= EUBO must
hold 0; both divergences are computed by quadrature beside it.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files, on machines without a screen too

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_mf as mf

COLOURS = {"reverse": "tab:blue", "forward": "tab:orange"}
CORRELATION = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)


def correlated_log_density(z: Tensor) -> Tensor:
    return dist.MultivariateNormal(torch.zeros(2, dtype=z.dtype), CORRELATION).log_prob(z)


def bimodal_log_density(z: Tensor) -> Tensor:
    modes = [dist.Normal(loc, 0.5).log_prob(z[..., 0]) for loc in (-2.0, 2.0)]
    return torch.logaddexp(*modes) - math.log(2.0)


def skewed_log_density(z: Tensor) -> Tensor:
    u = (z[..., 0] - 0.5) / 2.0
    half = dist.Normal(0.0, 1.0).log_prob(u) - math.log(2.0)
    return half + torch.erfc(-5.0 * u / math.sqrt(2.0)).log()  # skew-normal of shape 5


@dataclass
class Target:
    """A density with evidence 1, as a function and as a Pyro model."""

    name: str
    log_density: Callable[[Tensor], Tensor]
    size: int

    def model(self) -> None:
        """An improper flat prior times the density."""
        real = dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (self.size,))
        z = pyro.sample("z", real)
        pyro.factor("density", self.log_density(z))


TARGETS = (
    Target("correlated normal", correlated_log_density, 2),
    Target("two modes", bimodal_log_density, 1),
    Target("skew-normal", skewed_log_density, 1),
)


class Grid:
    """An even grid that holds all mass of the targets; sums over it are exact to many digits."""

    def __init__(self, size: int) -> None:
        self.axis = torch.linspace(-14.0, 18.0, 641 if size == 2 else 8001, dtype=torch.float64)
        self.points = torch.cartesian_prod(*[self.axis] * size).reshape(-1, size)
        self.cell = float(self.axis[1] - self.axis[0]) ** size

    def divergence(self, log_a: Tensor, log_b: Tensor) -> float:
        """KL(a || b) in nats."""
        a = log_a.exp()
        return float(torch.where(a > 0.0, a * (log_a - log_b), 0.0).sum()) * self.cell


@dataclass
class Fit:
    """A fitted q with its divergences."""

    result: mf.FitResult
    loc: Tensor
    sd: Tensor
    reverse_kl: float
    forward_kl: float

    def log_density(self, z: Tensor) -> Tensor:
        """Log q at the last dimension of ``z``."""
        return dist.Normal(self.loc, self.sd).log_prob(z).sum(-1)


def fit(target: Target, objective: pyro.infer.ELBO, grid: Grid) -> Fit:
    """Fit q, and compare it with p by quadrature."""
    result = mf.fit(target.model, objective=objective, tolerance=0.05)
    summary = result.summary()
    loc, sd = (torch.tensor(summary[column].to_numpy()) for column in ("mean", "sd"))
    fitted = Fit(result, loc, sd, math.nan, math.nan)
    log_p, log_q = target.log_density(grid.points), fitted.log_density(grid.points)
    fitted.reverse_kl = grid.divergence(log_q, log_p)
    fitted.forward_kl = grid.divergence(log_p, log_q)
    return fitted


def draw(axes: plt.Axes, target: Target, fits: dict[str, Fit]) -> None:
    """The density and both fits; contours where there are two dimensions."""
    one_sd, two_sds = math.exp(-0.5), math.exp(-2.0)
    if target.size == 2:
        x = torch.linspace(-3.2, 3.2, 241, dtype=torch.float64)
        points = torch.stack(torch.meshgrid(x, x, indexing="xy"), -1)
        log_p = target.log_density(points)
        levels = np.array([two_sds, one_sd, 1.0]) * float(log_p.exp().max())
        axes.contourf(x, x, log_p.exp(), levels, colors=["0.85", "0.65"])
        for name, found in fits.items():
            log_q = found.log_density(points)
            levels = np.array([two_sds, one_sd]) * float(log_q.exp().max())
            axes.contour(x, x, log_q.exp(), levels, colors=COLOURS[name])
        axes.set(aspect="equal", xlabel="$z_1$, contours at 1 and 2 sds", ylabel="$z_2$")
    else:
        x = torch.linspace(-7.0, 7.0, 1001, dtype=torch.float64)
        if target.name == "skew-normal":
            x = torch.linspace(-3.0, 8.0, 1001, dtype=torch.float64)
        axes.fill_between(x, target.log_density(x[:, None]).exp(), color="0.8")
        for name, found in fits.items():
            axes.plot(x, found.log_density(x[:, None]).exp(), color=COLOURS[name], lw=2)
        axes.set(xlabel="$z$", ylim=(0.0, None), yticks=[])
    lines = [
        f"{name}: KL(q‖p) {found.reverse_kl:.2f}, KL(p‖q) {found.forward_kl:.2f}"
        for name, found in fits.items()
    ]
    lower, upper = fits["reverse"].result.elbo, fits["forward"].result.eubo
    lines.append(f"ELBO of reverse {lower:.2f} ≤ log evidence 0 ≤ {upper:.2f} EUBO of forward")
    axes.set_title(f"{target.name}\n" + "\n".join(lines), fontsize=9)


def picture(rows: list[tuple[Target, dict[str, Fit]]], path: Path) -> None:
    """All targets side by side, with one legend."""
    figure, panels = plt.subplots(1, len(rows), figsize=(13, 4.8), layout="constrained")
    for axes, (target, fits) in zip(panels, rows, strict=True):
        draw(axes, target, fits)
    handles = [
        plt.Rectangle((0, 0), 1, 1, color="0.75", label="p, the posterior"),
        plt.Line2D([], [], color=COLOURS["reverse"], lw=2, label="q by reverse KL: zero-forcing"),
        plt.Line2D([], [], color=COLOURS["forward"], lw=2, label="q by forward KL: zero-avoiding"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def make_table(rows: list[tuple[Target, dict[str, Fit]]]) -> Table:
    table = Table(title="log evidence is 0; KLs by quadrature, bounds by the fit")
    for column in ("target", "objective"):
        table.add_column(column, no_wrap=True)
    for column in ("mean", "sd", "KL(q||p)", "KL(p||q)", "ELBO", "EUBO"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for target, fits in rows:
        for name, found in fits.items():
            table.add_row(
                target.name,
                name,
                *(", ".join(f"{x:.3f}" for x in part) for part in (found.loc, found.sd)),
                *(f"{kl:.4f}" for kl in (found.reverse_kl, found.forward_kl)),
                *bounds(found.result),
                found.result.stop_reason,
            )
        table.add_section()
    return table


def bounds(result: mf.FitResult) -> tuple[str, str]:
    """The bracket of the log evidence that a fit reports; its upper end needs draws from p."""
    lower = f"{result.elbo:.3f} ± {result.elbo_se:.3f}"
    upper = "" if math.isnan(result.eubo) else f"{result.eubo:.3f} ± {result.eubo_se:.3f}"
    return lower, upper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # arrays of this size are slower on several threads
    rows = []
    for target in TARGETS:
        grid = Grid(target.size)
        objectives = {"reverse": mf.ReverseKL(), "forward": mf.ForwardKL()}
        rows.append((target, {name: fit(target, o, grid) for name, o in objectives.items()}))
    path = args.out / "forward_vs_reverse_kl.png"
    picture(rows, path)
    Console(width=140).print(make_table(rows))
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
