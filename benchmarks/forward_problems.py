"""Posteriors whose marginals are known, for the forward KL: exactly, or by many chains.

Means and sds are on the unconstrained axis, where the factors of a mean field live. Gaussians have
closed forms: with covariance S and precision A, the forward KL's optimum has variances S_dd and is
-1/2 log det corr(S) nats away, the reverse KL's has 1 / A_dd and is -1/2 log det corr(A) away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.logistic import laplace
from benchmarks.posteriors import eight_schools_centered, eight_schools_noncentered
from pyro_mf.density import LogJoint

Moments = dict[str, tuple[Tensor, Tensor]]

SCHOOLS_Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SCHOOLS_SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclass(frozen=True)
class Target:
    """A model with what is known about its posterior.

    Args:
        name: What a table calls it.
        model: The Pyro model.
        args: Its arguments.
        truth: Mean and sd of each latent site's marginals, on the unconstrained axis.
        covariance: That of a Gaussian posterior; ``None`` for others.
        log_evidence: In nats; NaN where it is not known.
        source: Where the truth is from.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    truth: Moments
    covariance: Tensor | None = None
    log_evidence: float = math.nan
    source: str = "exact"

    @property
    def reverse_sd(self) -> Tensor:
        """Sds of the reverse KL's optimum, of a Gaussian."""
        return torch.linalg.inv(self._gaussian()).diagonal().rsqrt()

    @property
    def reverse_kl(self) -> float:
        """KL(q || p) at the reverse KL's optimum, of a Gaussian, nats."""
        return _total_correlation(torch.linalg.inv(self._gaussian()))

    @property
    def forward_kl(self) -> float:
        """KL(p || q) at the forward KL's optimum, of a Gaussian, nats."""
        return _total_correlation(self._gaussian())

    def _gaussian(self) -> Tensor:
        if self.covariance is None:
            raise ValueError(f"{self.name} is no Gaussian; its optima have no closed form here.")
        return self.covariance


def _total_correlation(covariance: Tensor) -> float:
    scale = covariance.diagonal().sqrt()
    return -0.5 * float(torch.linalg.slogdet(covariance / torch.outer(scale, scale))[1])


# -- Gaussians -------------------------------------------------------------------------------------


def gaussian(name: str, covariance: Tensor) -> Target:
    """A centred Gaussian, as a model with one multivariate latent."""

    def model(covariance: Tensor) -> None:
        mean = torch.zeros(len(covariance), dtype=covariance.dtype)
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    covariance = covariance.double()
    truth = {"z": (torch.zeros(len(covariance)).double(), covariance.diagonal().sqrt())}
    return Target(name, model, (covariance,), truth, covariance, log_evidence=0.0)


def three_by_three() -> Target:
    """The example of Margossian, Pillaud-Vivien and Saul (2024), https://arxiv.org/abs/2403.13748."""
    rows = [[2.75, 0.71, -2.46], [0.71, 1.51, -1.79], [-2.46, -1.79, 3.59]]
    return gaussian("three by three", torch.tensor(rows))


def equicorrelated(size: int, rho: float = 0.5) -> Target:
    """Unit variances, one correlation."""
    covariance = (1 - rho) * torch.eye(size) + rho
    return gaussian(f"equicorrelated {rho:g}, D={size}", covariance)


def wishart(size: int = 100, freedom: int = 500, seed: int = 0) -> Target:
    """A Gaussian whose precision is a draw of a Wishart distribution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(freedom, size, generator=generator, dtype=torch.float64)
    return gaussian(f"Wishart({freedom}), D={size}", torch.linalg.inv(x.T @ x))


def autoregression(size: int = 1000, rho: float = 0.9) -> Target:
    """A stationary autoregression of unit variance, by its banded precision."""
    innovation = math.sqrt(1 - rho**2)

    def model() -> None:
        real = constraints.independent(constraints.real, 1)
        z = pyro.sample("z", dist.ImproperUniform(real, (), (size,)))
        first = dist.Normal(0.0, 1.0).log_prob(z[0])
        steps = dist.Normal(0.0, innovation).log_prob(z[1:] - rho * z[:-1]).sum()
        pyro.factor("autoregression", first + steps)

    index = torch.arange(size, dtype=torch.float64)
    covariance = rho ** (index[:, None] - index).abs()
    truth = {"z": (torch.zeros(size).double(), torch.ones(size).double())}
    return Target(f"AR({rho:g}), D={size}", model, (), truth, covariance, log_evidence=0.0)


def pooled_schools(tau: float = 2.5) -> Target:
    """Eight schools with a known spread and a flat mean, which is a Gaussian.

    References:
        Margossian and Saul (2023), The Shrinkage-Delinkage Trade-off, https://arxiv.org/abs/2302.09163
    """

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("school", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    y, sigma = _schools()
    size = len(y) + 1  # mu first
    precision = torch.zeros(size, size, dtype=torch.float64)
    precision[0, 0] = len(y) / tau**2
    precision[0, 1:] = precision[1:, 0] = -1 / tau**2
    precision.diagonal()[1:] = 1 / tau**2 + sigma**-2
    covariance = torch.linalg.inv(precision)
    linear = torch.cat([torch.zeros(1), y / sigma**2])
    mean, sd = covariance @ linear, covariance.diagonal().sqrt()
    spread = (sigma**2 + tau**2).sqrt()
    pooled_variance = 1 / (spread**-2).sum()
    at_mean = dist.Normal(mean[0], spread).log_prob(y).sum()
    evidence = float(at_mean + 0.5 * (2 * math.pi * pooled_variance).log())
    truth = {"mu": (mean[0], sd[0]), "theta": (mean[1:], sd[1:])}
    return Target("eight schools, pooled", model, (y, sigma), truth, covariance, evidence)


def collinear(num_data: int = 50, size: int = 8, rho: float = 0.8, seed: int = 0) -> Target:
    """A linear regression whose predictors all have one correlation; noise of sd 1."""
    prior_sd = math.sqrt(2.0)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("predictor", x.shape[-1]):
            beta = pyro.sample("beta", dist.Normal(0.0, prior_sd))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(beta @ x.T, 1.0), obs=y)

    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky((1 - rho) * torch.eye(size).double() + rho)
    x = torch.randn(num_data, size, generator=generator, dtype=torch.float64) @ root.T
    y = x.sum(-1) + torch.randn(num_data, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(x.T @ x + torch.eye(size).double() / prior_sd**2)
    truth = {"beta": (covariance @ (x.T @ y), covariance.diagonal().sqrt())}
    return Target("collinear regression", model, (x, y), truth, covariance)


def _schools() -> tuple[Tensor, Tensor]:
    return torch.tensor(SCHOOLS_Y).double(), torch.tensor(SCHOOLS_SIGMA).double()


# -- by quadrature ---------------------------------------------------------------------------------


def _weights(log_density: Tensor) -> Tensor:
    """Probabilities of the points of an even grid, for smooth densities exact to rounding."""
    return torch.softmax(log_density.flatten(), 0).reshape(log_density.shape)


def _moments(
    weights: Tensor, mean: Tensor, variance: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and sd of a mixture over the first dimension."""
    weights = weights.reshape(-1, *[1] * (mean.dim() - 1))
    total = (weights * mean).sum(0)
    return total, ((weights * (variance + (mean - total) ** 2)).sum(0)).sqrt()


def eight_schools(*, centered: bool) -> Target:
    """Given ``tau`` all else is Gaussian, so that one integral is left."""
    y, sigma = _schools()
    log_tau = torch.linspace(-25.0, 8.0, 20_001, dtype=torch.float64)
    tau = log_tau.exp()
    spread2 = tau[:, None] ** 2 + sigma**2
    mu_variance = 1 / (1 / 25 + (1 / spread2).sum(-1))
    mu_mean = mu_variance * (y / spread2).sum(-1)
    log_evidence = (
        dist.Normal(mu_mean[:, None], spread2.sqrt()).log_prob(y).sum(-1)
        + dist.Normal(0.0, 5.0).log_prob(mu_mean)
        + 0.5 * (2 * math.pi * mu_variance).log()
    )
    log_density = log_evidence + dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    weights = _weights(log_density)
    # Of an effect given tau: pulled to mu by `pull`, of which mu's own uncertainty is added.
    pull = sigma**2 / spread2
    theta_mean = pull * mu_mean[:, None] + (1 - pull) * y
    theta_variance = tau[:, None] ** 2 * pull + pull**2 * mu_variance[:, None]
    eta_mean = (1 - pull) * (y - mu_mean[:, None]) / tau[:, None]
    eta_variance = pull + (tau[:, None] / spread2) ** 2 * mu_variance[:, None]
    truth = {"mu": _moments(weights, mu_mean, mu_variance), "tau": _moments(weights, log_tau)}
    step = float(log_tau[1] - log_tau[0])
    evidence = float(torch.logsumexp(log_density, 0)) + math.log(step)
    if centered:
        truth["theta"] = _moments(weights, theta_mean, theta_variance)
        name, model = "eight schools, centred", eight_schools_centered
    else:
        truth["theta_trans"] = _moments(weights, eta_mean, eta_variance)
        name, model = "eight schools, non-centred", eight_schools_noncentered
    return Target(name, model, (y, sigma), truth, log_evidence=evidence)


def skew_normal(loc: float = 0.5, scale: float = 2.0, shape: float = 5.0) -> Target:
    """The toy of Naesseth, Lindsten and Blei (2020), https://arxiv.org/abs/2003.10374."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        # Twice a normal distribution function; log_ndtr would be 400 operations of a graph.
        tail = torch.erfc(-shape / math.sqrt(2.0) * (x - loc) / scale).log()
        pyro.factor("skew", dist.Normal(loc, scale).log_prob(x) + tail)

    delta = shape / math.sqrt(1 + shape**2)
    mean = loc + scale * delta * math.sqrt(2 / math.pi)
    sd = scale * math.sqrt(1 - 2 * delta**2 / math.pi)
    truth = {"x": (torch.tensor(mean).double(), torch.tensor(sd).double())}
    return Target("skew-normal", model, (), truth, log_evidence=0.0)


def bimodal(centre: float = 2.0, sd: float = 0.5) -> Target:
    """Two normal modes of one weight."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        modes = [dist.Normal(loc, sd).log_prob(x) for loc in (-centre, centre)]
        pyro.factor("modes", torch.logaddexp(*modes) - math.log(2.0))

    truth = {"x": (torch.tensor(0.0).double(), torch.tensor(math.hypot(centre, sd)).double())}
    return Target("two modes", model, (), truth, log_evidence=0.0)


def funnel(size: int = 9) -> Target:
    """Neal's funnel: a log scale and ``size`` latents of that scale."""

    def model() -> None:
        v = pyro.sample("v", dist.Normal(torch.tensor(0.0).double(), 3.0))
        with pyro.plate("dimension", size):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    # E[exp(v)] with v ~ Normal(0, 3) is exp(9 / 2).
    x_sd = torch.full((size,), math.exp(9 / 4)).double()
    truth = {
        "v": (torch.tensor(0.0).double(), torch.tensor(3.0).double()),
        "x": (torch.zeros(size).double(), x_sd),
    }
    return Target("funnel", model, (), truth, log_evidence=0.0)


def switching_labels(num_data: int = 40, seed: int = 0) -> Target:
    """A mixture of two normals that nothing tells apart; by quadrature in two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_data, generator=generator, dtype=torch.float64)
    y = noise + torch.tensor([-2.0, 2.0]).double().repeat_interleave(num_data // 2)

    def model(y: Tensor) -> None:
        with pyro.plate("component", 2):
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 5.0))
        weights = dist.Categorical(torch.tensor([0.5, 0.5]).double())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, 1.0)), obs=y)

    grid = torch.linspace(-6.0, 6.0, 1201, dtype=torch.float64)
    prior = dist.Normal(0.0, 5.0).log_prob(grid)
    log_density = prior[:, None] + prior
    each = dist.Normal(grid[:, None], 1.0).log_prob(y)
    for column in each.T:
        log_density = log_density + torch.logaddexp(column[:, None], column) - math.log(2.0)
    mean, sd = _moments(_weights(log_density).sum(1), grid)
    step = float(grid[1] - grid[0])
    evidence = float(torch.logsumexp(log_density.flatten(), 0)) + 2 * math.log(step)
    truth = {"mu": (mean.expand(2), sd.expand(2))}
    return Target("switching labels", model, (y,), truth, log_evidence=evidence)


# -- by many chains --------------------------------------------------------------------------------


def logistic(size: int, num_data: int, *, num_kept: int = 600, seed: int = 0) -> Target:
    """A logistic regression on synthetic, correlated predictors; its truth is from 512 chains.

    Neighbouring predictors have correlation 0.4; slopes are from Normal(0, 0.5), under a standard
    normal prior.
    """

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("predictor", x.shape[-1]):
            beta = pyro.sample("beta", dist.Normal(0.0, torch.ones(x.shape[-1], dtype=x.dtype)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=beta @ x.T), obs=y)

    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(size, dtype=torch.float64)
    root = torch.linalg.cholesky(0.4 ** (index[:, None] - index).abs())
    x = torch.randn(num_data, size, generator=generator, dtype=torch.float64) @ root.T
    slopes = 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)
    chance = torch.rand(num_data, generator=generator, dtype=torch.float64)
    y = (chance < torch.sigmoid(x @ slopes)).double()
    mean, sd, error = _many_chains(x, y, num_kept, generator)
    source = f"512 chains of {num_kept}, errors of means below {error:.4f} sds"
    name = f"logistic, D={size}, n={num_data}"
    return Target(name, model, (x, y), {"beta": (mean, sd)}, source=source)


def _many_chains(
    x: Tensor, y: Tensor, num_kept: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Mean, sd and error of logistic slopes by Hamiltonian chains in the metric of the Laplace fit.

    Written out here, so that nothing of what is to be judged is used. A fifth as many iterations
    are dropped first; every chain's mean is one independent estimate.
    """
    mode, covariance = laplace(x, y, prior_sd=1.0)
    root = torch.linalg.cholesky(covariance)
    whitened = x @ root  # of slopes = mode + root @ u
    offset = x @ mode

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        beta = mode + u @ root.T
        logits = offset + u @ whitened.T
        value = (y * logits - softplus(logits)).sum(-1) - beta.square().sum(-1) / 2
        return value, (y - torch.sigmoid(logits)) @ whitened - beta @ root

    def noise() -> Tensor:
        return torch.randn(512, len(mode), generator=generator, dtype=x.dtype)

    u = noise()
    value, gradient = evaluate(u)
    means, squares = torch.zeros_like(u), torch.zeros_like(u)
    step = 1.2 * len(mode) ** -0.25
    for iteration in range(-(num_kept // 5), num_kept):
        momentum = noise()
        energy = value - momentum.square().sum(-1) / 2
        new_u, new_gradient = u, gradient
        new_value = value
        for _ in range(int(torch.randint(1, 2 + round(3.0 / step), (), generator=generator))):
            momentum = momentum + step / 2 * new_gradient
            new_u = new_u + step * momentum
            new_value, new_gradient = evaluate(new_u)
            momentum = momentum + step / 2 * new_gradient
        gain = new_value - momentum.square().sum(-1) / 2 - energy
        chance = torch.rand(512, generator=generator, dtype=x.dtype)
        accepted = chance.log() < gain
        u = torch.where(accepted[:, None], new_u, u)
        gradient = torch.where(accepted[:, None], new_gradient, gradient)
        value = torch.where(accepted, new_value, value)
        if iteration >= 0:
            beta = u @ root.T
            means += beta / num_kept
            squares += beta.square() / num_kept
    sd = (squares.mean(0) - means.mean(0).square()).sqrt()
    error = float((means.std(0) / sd).max()) / math.sqrt(512)
    return mode + means.mean(0), sd, error


def errors(log_joint: LogJoint, loc: Tensor, sd: Tensor, truth: Moments) -> tuple[float, float]:
    """Root mean square of the means' errors in true sds, and of the log ratios of the sds."""
    locs, sds = log_joint.layout.unpack(loc), log_joint.layout.unpack(sd)
    mean = [((locs[site] - m) / s).flatten() for site, (m, s) in truth.items()]
    ratio = [(sds[site] / s).log().flatten() for site, (_, s) in truth.items()]
    return tuple(float(torch.cat(part).square().mean().sqrt()) for part in (mean, ratio))
