"""The prior as a density and a sampler: one must be that of the other."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from scipy import stats

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.prior import Prior

Y = torch.tensor([1.0, 2.0, 3.0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hierarchical(y):
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.deterministic("twice", 2 * scale)
    with pyro.plate("group", 3):
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
    pyro.factor("more", -shares.square().sum())


def test_density_and_draws_belong_together():
    # For draws of p the gradient of log p averages to zero, and z times it to -1: z = 5.
    prior = Prior(LogJoint(hierarchical, (Y,)))
    z = prior.sample(600, generator())
    values, gradients = prior.value_and_grad(z)
    assert z.shape == (600, 6)
    assert torch.isfinite(values).all()
    centred = z - z.mean(0)
    for terms in (gradients, 1.0 + centred * gradients):
        assert ((terms.mean(0).abs() / terms.std(0)) * 600**0.5 < 5.0).all()


def test_draws_are_those_of_the_sites():
    log_joint = LogJoint(hierarchical, (Y,))
    sites = log_joint.constrain(Prior(log_joint).sample(600, generator()))
    assert stats.kstest(sites["scale"], stats.gamma(2.0).cdf).pvalue > 1e-4
    assert stats.kstest(sites["shares"][:, 0], stats.beta(2.0, 7.0).cdf).pvalue > 1e-4
    standard = sites["theta"][:, 2] / sites["scale"]
    assert stats.kstest(standard, stats.norm.cdf).pvalue > 1e-4


def test_posterior_is_prior_plus_likelihood():
    log_joint = LogJoint(hierarchical, (Y,))
    prior = Prior(log_joint)
    z = prior.sample(5, generator())
    found = log_joint.evaluate(z)
    factor = -found.latents["shares"].square().sum(-1)
    likelihood = found.log_likelihood["y"].sum(-1) + factor
    torch.testing.assert_close(log_joint(z), prior.value_and_grad(z)[0] + likelihood)


def test_conditioned_sites_are_data():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 0.01))

    conditioned = poutine.condition(model, {"x": torch.tensor(5.0)})
    prior = Prior(LogJoint(conditioned))
    value, _ = prior.value_and_grad(torch.zeros(1, 1))
    torch.testing.assert_close(value, dist.Normal(0.0, 1.0).log_prob(torch.zeros(1)))


def test_discrete_latents_are_drawn_and_summed_out():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            component = pyro.sample("component", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(loc + component, 1.0), obs=y)

    prior = Prior(LogJoint(model, (Y,)))
    z = prior.sample(3, generator())
    expected = dist.Normal(0.0, 1.0).log_prob(z.squeeze(1))
    torch.testing.assert_close(prior.value_and_grad(z)[0], expected)


def test_seeds_and_global_randomness():
    prior = Prior(LogJoint(hierarchical, (Y,)))
    before = torch.get_rng_state()
    first, second, other = (prior.sample(3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def improper():
    pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))


def scaled():
    with poutine.scale(scale=0.5):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def masked():
    with poutine.mask(mask=False):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def fails():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z != 0:
        raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (improper, "cannot be sampled.*proper prior"),
        (scaled, "'z' is under poutine.scale"),
        (masked, "'z' is under poutine.mask"),
        (fails, "fails at a draw from its prior: no such thing"),
    ],
)
def test_refused_with_the_reason(model, match):
    with pytest.raises(ModelError, match=match):
        Prior(LogJoint(model, backend="eager"))


def test_draws_at_the_edge_of_a_support_are_refused():
    def edge():
        pyro.sample("z", dist.LogNormal(0.0, 2000.0))  # overflows

    with pytest.raises(ModelError, match="at infinity on the unconstrained axis"):
        Prior(LogJoint(edge)).sample(100, generator())


def overflows(y):
    """An ordinary curve that some draws of a heavy-tailed prior take beyond all numbers."""
    rate = pyro.sample("rate", dist.HalfCauchy(1.0))
    curve = (rate * torch.arange(1.0, 4.0) * 100.0).exp() - (rate * 300.0).exp()
    pyro.sample("y", dist.Normal(curve, 1.0).to_event(1), obs=y)


def test_draws_that_have_no_likelihood_are_draws_of_the_prior():
    log_joint = LogJoint(overflows, (torch.tensor([-1.0, -1.0, 0.0]),), backend="graph")
    rate = log_joint.constrain(Prior(log_joint).sample(600, generator()))["rate"]
    assert stats.kstest(rate, stats.halfcauchy.cdf).pvalue > 1e-4
    assert float(rate.max()) > 10.0  # where the curve is infinity less infinity
