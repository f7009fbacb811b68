"""Registries that contract tests run over: small models, one per kind of latent site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints


@dataclass(frozen=True)
class ModelCase:
    """A small model and what is known about it.

    Args:
        model: The Pyro model; it makes its tensors in the default dtype when it runs.
        args: Its arguments, made when asked for so that they have the test's dtype.
        is_subsampled: Whether a plate is subsampled.
        has_discrete: Whether a latent site has to be summed out.
        has_improper: Whether a prior cannot be sampled.
    """

    model: Callable[..., Any]
    args: Callable[[], tuple[Any, ...]] = field(default=tuple)
    is_subsampled: bool = False
    has_discrete: bool = False
    has_improper: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every stock objective and predictive can run it."""
        return not (self.is_subsampled or self.has_discrete or self.has_improper)


def _three() -> tuple[Any, ...]:
    return (torch.tensor([0.3, -0.2, 1.1]),)


def _ten() -> tuple[Any, ...]:
    return (torch.linspace(-1.0, 1.0, 10),)


def normal_normal(x):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def gamma_poisson(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def hierarchical(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("group", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def unit_interval(x):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=(x > 0).to(x))


def interval(x):
    loc = pyro.sample("loc", dist.Uniform(x.min() - 3.0, x.max() + 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def lower_bounded(x):
    scale = pyro.sample("scale", dist.Pareto(0.5, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, scale), obs=x)


def circular(x):
    angle = pyro.sample("angle", dist.VonMises(0.0, 20.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(angle, 20.0), obs=x)


def real_vector(x):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(beta, 1.0).to_event(1), obs=x)


def real_matrix(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(weight.sum(-2), 1.0).to_event(1), obs=x)


def multivariate_normal(x):
    covariance = torch.eye(3) + 0.5
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), covariance))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def positive_vector(x):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    pyro.sample("x", dist.Normal(0.0, scale).to_event(1), obs=x)


def simplex(x):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", 4):
        pyro.sample("k", dist.Categorical(p), obs=torch.tensor([0, 1, 2, 2]))


def simplex_in_plate(x):
    with pyro.plate("document", 2):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("k", dist.Categorical(p), obs=torch.tensor([0, 2]))


def ordered(x):
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    cuts = pyro.sample(
        "cuts", dist.TransformedDistribution(base, dist.transforms.OrderedTransform())
    )
    pyro.sample("x", dist.Normal(cuts, 1.0).to_event(1), obs=x)


def lkj_cholesky(x):
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)


def lkj_in_plate(x):
    with pyro.plate("group", 2):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        pyro.sample(
            "x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x.expand(2, 3)
        )


def crossed_plates(x):
    rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(a, b), obs=x.expand(2, 3))


def nested_plates(x):
    with pyro.plate("school", 3, dim=-1):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("pupil", 2, dim=-2):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
            pyro.sample("x", dist.Normal(loc + p.sum(-1), 1.0), obs=x.expand(2, 3))


def sequential_plate(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(loc, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def dotted_names(x):
    weight = pyro.sample("layer.weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("layer.scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(weight, scale.unsqueeze(-1)).to_event(1), obs=x)


def improper(x):
    loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as index:
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def given_subsample(x, index):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _minibatch() -> tuple[Any, ...]:
    index = torch.tensor([7, 1, 4])
    return torch.linspace(-1.0, 1.0, 10)[index], index


MODELS: dict[str, ModelCase] = {
    "scalar real": ModelCase(normal_normal, _three),
    "scalar positive": ModelCase(gamma_poisson, lambda: (torch.tensor([0.0, 2.0, 1.0]),)),
    "real in a plate": ModelCase(hierarchical, _three),
    "unit interval": ModelCase(unit_interval, _three),
    "interval with tensor bounds": ModelCase(interval, _three),
    "lower bound": ModelCase(lower_bounded, _three),
    "circular": ModelCase(circular, _three),
    "real vector": ModelCase(real_vector, _three),
    "real matrix": ModelCase(real_matrix, _three),
    "multivariate normal": ModelCase(multivariate_normal, _three),
    "positive vector": ModelCase(positive_vector, _three),
    "simplex": ModelCase(simplex, _three),
    "simplex in a plate": ModelCase(simplex_in_plate, _three),
    "ordered": ModelCase(ordered, _three),
    "correlation Cholesky": ModelCase(lkj_cholesky, _three),
    "correlation Cholesky in a plate": ModelCase(lkj_in_plate, _three),
    "crossed plates": ModelCase(crossed_plates, _three),
    "nested plates": ModelCase(nested_plates, _three),
    "sequential plate": ModelCase(sequential_plate, _three),
    "dotted names": ModelCase(dotted_names, _three),
    "improper prior": ModelCase(improper, _three, has_improper=True),
    "discrete summed out": ModelCase(mixture, _three, has_discrete=True),
    "subsampled plate": ModelCase(subsampled, _ten, is_subsampled=True),
    "subsample given": ModelCase(given_subsample, _minibatch, is_subsampled=True),
}
