"""Many runs of a random program at once: what vmap does equals what a loop does."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf.convert import vectorise
from pyro_mf.convert.vectorise import run_many

VMAPPED = {
    "normal": lambda p: dist.Normal(p, 1.0),
    "student": lambda p: dist.StudentT(5.0, p, 1.0),
    "exponential": lambda p: dist.Exponential(p),
    "gamma": lambda p: dist.Gamma(p, 1.0),
    "poisson": lambda p: dist.Poisson(p),
    "bernoulli": lambda p: dist.Bernoulli(logits=p),
    "negative binomial": lambda p: dist.NegativeBinomial(5.0, logits=-p),
    "categorical": lambda p: dist.Categorical(logits=torch.stack([p, -p], -1)),
    "half normal": lambda p: dist.HalfNormal(p),
    "multivariate normal": lambda p: dist.MultivariateNormal(p, torch.eye(2)),
}
LOOPED = {
    "beta": lambda p: dist.Beta(p, 2.0),
    "binomial": lambda p: dist.Binomial(5, logits=p),
    "dirichlet": lambda p: dist.Dirichlet(p),
    "von Mises": lambda p: dist.VonMises(p, 1.0),
}


def sampler(make):
    return lambda row: {"x": pyro.sample("x", make(row["p"]))}


@pytest.mark.parametrize("name", [*VMAPPED, *LOOPED])
def test_draws_have_the_right_mean_run_by_run(name):
    """Two settings, 400 runs each: the means are within 5 standard errors of a direct sample's."""
    make = {**VMAPPED, **LOOPED}[name]
    settings = torch.tensor([[0.5, 1.0], [2.0, 1.5]])
    p = settings.repeat_interleave(400, 0)
    x = run_many(sampler(make), 800, {"p": p}, seed=0)["x"].double().reshape(2, 400, -1)
    for draws, setting in zip(x, settings, strict=True):
        direct = make(setting).sample((4000,)).double().reshape(4000, -1)
        error = (draws.var(0) / 400 + direct.var(0) / 4000).sqrt()
        assert bool(((draws.mean(0) - direct.mean(0)).abs() < 5 * error).all())
        assert len(draws[:, 0].unique()) > 1


@pytest.mark.parametrize("name", VMAPPED)
def test_common_distributions_run_under_vmap(name):
    calls = []
    run = sampler(VMAPPED[name])

    def counted(row):
        calls.append(1)
        return run(row)

    run_many(counted, 100, {"p": torch.ones(100, 2)}, seed=0)
    assert len(calls) == 1


def test_a_loop_takes_over_where_vmap_cannot():
    calls = []

    def run(row):
        calls.append(1)
        return {"x": row["p"] * (2.0 if float(row["p"]) > 0 else -1.0)}

    x = run_many(run, 3, {"p": torch.tensor([-1.0, 1.0, 2.0])}, seed=0)["x"]
    assert torch.equal(x, torch.tensor([1.0, 2.0, 4.0]))
    assert len(calls) == 4  # once under vmap, then row by row


def test_errors_of_the_program_itself_come_through():
    def run(row):
        raise KeyError("no such site")

    with pytest.raises(KeyError, match="no such site"):
        run_many(run, 3, {}, seed=0)


def test_the_seed_decides_and_the_global_generator_stays():
    state = torch.get_rng_state()
    x = [run_many(lambda row: {"x": torch.randn(2)}, 5, {}, seed=s)["x"] for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])
    assert len(x[0].unique()) == 10


def test_more_runs_than_one_chunk_are_independent():
    num = 2 * vectorise._CHUNK + 3
    x = run_many(lambda row: {"x": torch.empty(1).normal_()}, num, {}, seed=0)["x"]
    assert x.shape == (num, 1)
    assert len(x.unique()) == num


def test_handlers_around_see_nothing():
    with pyro.poutine.trace() as trace:
        run_many(sampler(VMAPPED["normal"]), 4, {"p": torch.ones(4)}, seed=0)
    assert list(trace.trace.nodes) == []
