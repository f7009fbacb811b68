"""Draws that the user has already: read, or refused at the door."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf.convert import from_pyro
from pyro_mf.density import LogJoint
from pyro_mf.fitting.given_draws import read_draws


def model():
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", 3):
        pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.fixture
def log_joint():
    return LogJoint(model)


def draws(chains=2, length=100):
    return {
        "scale": torch.randn(chains, length).exp(),
        "x": torch.randn(chains, length, 3),
        "more": torch.zeros(chains, length),
    }


def test_chains_and_single_runs_are_read(log_joint):
    given = draws()
    z = read_draws(given, log_joint)
    assert z.shape == (2, 100, 4)
    assert torch.equal(z[..., 0], given["scale"].log())
    assert torch.equal(z[..., 1:], given["x"])
    assert torch.equal(read_draws({k: v[0] for k, v in given.items()}, log_joint), z[:1])
    arrays = {k: v.float().numpy() for k, v in given.items()}
    assert torch.allclose(read_draws(arrays, log_joint), z, atol=1e-5)


def test_a_result_for_arviz_is_read(log_joint):
    given = draws()
    given.pop("more")
    result = from_pyro(given, model=model)
    assert torch.allclose(read_draws(result, log_joint), read_draws(given, log_joint))


def test_what_pyro_sampled_is_read(log_joint):
    mcmc = pyro.infer.MCMC(
        pyro.infer.NUTS(model), num_samples=100, warmup_steps=50, disable_progbar=True
    )
    mcmc.run()
    z = read_draws(mcmc, log_joint)
    assert torch.allclose(z[0, :, 0], mcmc.get_samples()["scale"].log())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, r"lack the latent sites \['x'\]"),
        ({"x": torch.zeros(2, 100, 4)}, r"'x' must have shape .* got \(2, 100, 4\)"),
        ({"x": torch.zeros(1, 2, 100, 3)}, r"'x' must have shape"),
        ({"x": torch.zeros(2, 50, 3)}, "as many for every site"),
        ({"x": torch.full((2, 100, 3), np.nan)}, "600 of 600 values of 'x' in draws are NaN"),
        ({"scale": -torch.ones(2, 100)}, "200 values of 'scale' in draws are outside"),
        ({"scale": torch.zeros(2, 100)}, "outside of its support|edge of their support"),
    ],
)
def test_what_does_not_fit_is_refused(log_joint, change, words):
    given = {k: v for k, v in (draws() | change).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        read_draws(given, log_joint)


def test_draws_that_are_all_the_same_are_refused(log_joint):
    with pytest.raises(ValueError, match=r"all draws of 'x\[1\]' are the same"):
        read_draws(
            draws() | {"x": torch.randn(2, 100, 3) * torch.tensor([1.0, 0.0, 1.0])}, log_joint
        )


@pytest.mark.parametrize("values", ["abc", [None] * 100])
def test_what_is_no_array_is_refused(log_joint, values):
    with pytest.raises(TypeError, match="'x' must be a tensor or an array of numbers"):
        read_draws(draws() | {"x": values}, log_joint)


def test_chains_that_are_too_short_are_refused(log_joint):
    with pytest.raises(ValueError, match="100 chains of 3; at least 4 in a row"):
        read_draws(draws(100, 3), log_joint)


def test_a_sampler_that_has_not_run_is_refused(log_joint):
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=100)
    with pytest.raises(ValueError, match="has not run yet"):
        read_draws(mcmc, log_joint)


def test_too_few_draws_are_refused(log_joint):
    with pytest.raises(ValueError, match="draws are 99; at least 100"):
        read_draws(draws(1, 99), log_joint)


@pytest.mark.parametrize("given", [torch.zeros(100, 4), 7, "draws"])
def test_what_is_no_draws_is_refused(log_joint, given):
    with pytest.raises(TypeError, match="draws must be a mapping from site names"):
        read_draws(given, log_joint)
