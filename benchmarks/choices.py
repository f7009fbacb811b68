"""Which fixed draws, and which optimiser? The choices of the deterministic solver, measured.

Draws: distance of the optimum over 32 of them from that over 4,096, in scales of the factors and in
log scales, before the scales are settled; root mean square over latents and seeds. Optimisers:
gradients of the ELBO (a Hessian product counts three) until the ELBO is within 0.01 nats of the
optimum's, from the same start; the Hessian of the solver's certificate is not counted.

Run from the repository's root: python -m benchmarks.choices
"""

import argparse
import math

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import optimize
from scipy.stats import norm, qmc
from torch import Tensor

from benchmarks.posteriors import MODELS, load
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.minimise import descend, lbfgs, natural_gradient, polish
from pyro_mf.solvers.start import find_starts

NAMES = ("eight_schools_noncentered", "arK", "kidscore", "nes", "surgical", "wells", "radon_hier")
NUM_DRAWS, NATS, MOST = 32, 0.01, 2_000


class ReachedError(Exception):
    """The optimum is near enough, or too far."""


class Counter(FixedDrawELBO):
    """Counts gradients until a value is reached."""

    def __init__(self, blocks: Blocks, draws: Tensor, target: float = -math.inf) -> None:
        super().__init__(blocks, draws)
        self.target, self.count = target, 0

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Count one."""
        self.count += 1
        value, gradient = super().value_and_gradient(x)
        if value < self.target + NATS or self.count >= MOST:
            raise ReachedError
        return value, gradient

    def hessian_vector(self, x: Tensor, vector: Tensor) -> Tensor:
        """Count three."""
        self.count += 3
        if self.count >= MOST:
            raise ReachedError
        return super().hessian_vector(x, vector)


def independent(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_DRAWS, size, generator=generator, dtype=torch.float64)


def antithetic(size: int, seed: int) -> Tensor:
    half = independent(size, seed)[: NUM_DRAWS // 2]
    return torch.cat([half, -half])


def unit_antithetic(size: int, seed: int) -> Tensor:
    draws = antithetic(size, seed)
    return draws / draws.square().mean(0).sqrt()


def sobol(size: int, seed: int) -> Tensor:
    uniform = qmc.Sobol(size, rng=np.random.default_rng(seed)).random(NUM_DRAWS)
    return torch.from_numpy(norm.ppf(uniform.clip(1e-12, 1 - 1e-12)))


def ours(size: int, seed: int) -> Tensor:
    return fixed_draws(NUM_DRAWS, size, seed=seed)


DRAWS = {
    "independent": independent,
    "antithetic": antithetic,
    "antithetic, unit moment": unit_antithetic,
    "scrambled Sobol": sobol,
    "orthogonal, unit moment": ours,
}


def by_trust_region(elbo: Counter, x: Tensor) -> None:
    metric = elbo.unit_metric(x)

    def move(y: np.ndarray) -> Tensor:
        return x + metric * torch.from_numpy(y)

    optimize.minimize(
        lambda y: (lambda v, g: (v, (metric * g).numpy()))(*elbo.value_and_gradient(move(y))),
        np.zeros(len(x)),
        jac=True,
        hessp=lambda y, v: (
            metric * elbo.hessian_vector(move(y), metric * torch.from_numpy(v))
        ).numpy(),
        method="trust-ncg",
        options={"maxiter": 500, "gtol": 1e-6},
    )


def by_lbfgs(elbo: Counter, x: Tensor) -> None:
    metric = elbo.unit_metric(x)
    lbfgs(elbo.value_and_gradient, x, metric, max_iterations=MOST, gradient_tolerance=1e-8)


def by_both(elbo: Counter, x: Tensor) -> None:
    by_lbfgs(elbo, natural_gradient(elbo, x, max_steps=30))


OPTIMISERS = {
    "trust-ncg": by_trust_region,
    "L-BFGS": by_lbfgs,
    "natural gradient, then L-BFGS": by_both,
}


def optimum(elbo: FixedDrawELBO, x: Tensor) -> Tensor:
    return polish(elbo, descend(elbo, x))[0]


def draw_errors(blocks: Blocks, truth: Tensor, seeds: int) -> dict[str, str]:
    size, scale = blocks.size, truth[blocks.size :].exp()
    table = {}
    for name, make in DRAWS.items():
        found = [optimum(FixedDrawELBO(blocks, make(size, s)), truth) - truth for s in range(seeds)]
        loc, log_scale = torch.stack(found).chunk(2, 1)
        loc = (loc / scale).square().mean().sqrt()
        table[name] = f"{float(loc):.3f} / {float(log_scale.square().mean().sqrt()):.3f}"
    return table


def gradient_counts(blocks: Blocks) -> dict[str, str]:
    draws = fixed_draws(NUM_DRAWS, blocks.size)
    elbo = FixedDrawELBO(blocks, draws)
    origin = torch.zeros(blocks.size, dtype=torch.float64)
    start = next(iter(find_starts(elbo, origin, seed=0)))
    target = elbo.value_and_gradient(optimum(elbo, start))[0]
    table = {}
    for name, minimise in OPTIMISERS.items():
        counter = Counter(blocks, draws, target)
        try:
            minimise(counter, start)
            table[name] = "stopped short"
        except ReachedError:
            table[name] = str(counter.count) if counter.count < MOST else f"> {MOST}"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    full = [name for key in NAMES for name in MODELS if key in name][: 1 if args.smoke else None]
    draws_table = Table("posterior", *DRAWS, title="error of the optimum: location / log scale")
    optimiser_table = Table("posterior", *OPTIMISERS, title="gradients")
    for name in full:
        posterior = load(name)
        blocks = Blocks(LogJoint(posterior.model, posterior.args, backend="graph"))
        many = FixedDrawELBO(blocks, fixed_draws(256 if args.smoke else 4096, blocks.size, seed=99))
        origin = torch.zeros(blocks.size, dtype=torch.float64)
        start = next(iter(find_starts(FixedDrawELBO(blocks, ours(blocks.size, 0)), origin, seed=0)))
        truth = optimum(many, optimum(FixedDrawELBO(blocks, ours(blocks.size, 0)), start))
        short = name.split("-")[-1]
        errors = draw_errors(blocks, truth, seeds=2 if args.smoke else 5)
        draws_table.add_row(short, *errors.values())
        optimiser_table.add_row(short, *gradient_counts(blocks).values())
    console = Console(width=150)
    console.print(draws_table)
    console.print(optimiser_table)


if __name__ == "__main__":
    main()
