"""The ELBO of a mixture of mean fields: exact identities, then what its optimum finds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

import pyro_mf as mf
from pyro_mf.density.blocks import Blocks
from pyro_mf.families import Normal
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.families.stratified import weighted_draws
from pyro_mf.guides import AutoMeanFieldMixture, log_importance_weights
from pyro_mf.solvers.meter import Meter
from pyro_mf.solvers.mixture_elbo import MixtureELBO
from pyro_mf.solvers.outcome import silent
from tests.cases import MODELS


def target(size, log_density):
    """A density with evidence 1 as a Pyro model."""

    def model():
        real = dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (size,))
        z = pyro.sample("z", real)
        pyro.factor("density", log_density(z))

    return model


def two_modes(z):
    """A product of bimodal laws: 2^D modes in D dimensions."""
    modes = [dist.Normal(loc, 0.5).log_prob(z) for loc in (-2.0, 2.0)]
    return (torch.logaddexp(*modes) - math.log(2.0)).sum(-1)


def correlated(z):
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    return dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(z)


def uneven(z):
    """Two modes of different weight, width and place."""
    wide = math.log(0.8) + dist.Normal(-3.0, 1.0).log_prob(z).sum(-1)
    return torch.logaddexp(wide, math.log(0.2) + dist.Normal(4.0, 0.3).log_prob(z).sum(-1))


def set_up(model, num, *args):
    """A guide with parameters that are not the defaults."""
    guide = AutoMeanFieldMixture(model, num, init_scale=0.5).setup(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def gradients_of(objective, model, guide, *args):
    guide.zero_grad()
    loss = objective.differentiable_loss(model, guide, *args)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in guide.parameters()]


ENTROPIES = ("closed_form", "stl", "monte_carlo")
eight = MODELS["real in a plate"]


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_one_component_is_a_mean_field(entropy):
    args, losses, gradients = eight.args(), [], []
    one = AutoMeanFieldMixture(eight.model, 1, init_scale=0.4).setup(*args)
    plain = mf.AutoMeanField(eight.model, init_scale=0.4).setup(*args)
    for guide in (one, plain):
        torch.manual_seed(3)
        loss, found = gradients_of(mf.ReverseKL(8, entropy=entropy), eight.model, guide, *args)
        losses.append(loss)
        gradients.append([g.reshape(-1) for g in found[:2]])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    z = plain.sample_unconstrained(4)
    torch.testing.assert_close(one.log_prob_unconstrained(z), plain.log_prob_unconstrained(z))


def test_one_component_is_fitted_as_a_mean_field():
    args = eight.args()
    one = mf.fit(eight.model, args, guide=AutoMeanFieldMixture(eight.model, 1), progress=False)
    plain = mf.fit(eight.model, args, progress=False)
    assert one.elbo == pytest.approx(plain.elbo, abs=1e-9)
    torch.testing.assert_close(one.guide.loc[:, 0], plain.guide.loc)
    torch.testing.assert_close(one.guide.scale[:, 0], plain.guide.scale)


def test_equal_components_are_one_normal():
    loc, scale = torch.randn(3), torch.rand(3) + 0.1
    params = (loc[:, None].expand(3, 4), scale[:, None].expand(3, 4), torch.randn(4))
    u = torch.randn(5, 3)
    expected = Normal().log_prob((loc, scale), u)
    torch.testing.assert_close(FactorisedMixture(4).log_prob(params, u), expected)


def test_the_order_of_components_does_not_matter():
    family, order = FactorisedMixture(3), torch.tensor([2, 0, 1])
    loc, scale, logits = torch.randn(4, 3), torch.rand(4, 3) + 0.2, torch.randn(3)
    moved = (loc[:, order], scale[:, order], logits[order])
    u, noise = torch.randn(6, 4), torch.randn(5, 3, 4)
    torch.testing.assert_close(family.log_prob((loc, scale, logits), u), family.log_prob(moved, u))

    def elbo(params, noise):
        z, weights = family.strata(params, noise)
        return (weights * (two_modes(z) - family.joint_log_prob(params, z))).sum()

    torch.testing.assert_close(elbo((loc, scale, logits), noise), elbo(moved, noise[:, order]))


def test_weighted_draws_of_a_plain_family_are_its_draws():
    params, noise = (torch.randn(3), torch.rand(3)), torch.randn(4, 3)
    draws, weights = weighted_draws(Normal(), params, noise)
    torch.testing.assert_close(draws, Normal().transform(params, noise))
    torch.testing.assert_close(weights, torch.full((4,), 0.25))


def test_at_the_posterior_log_weights_are_constant():
    """So ELBO and evidence are the same number at every draw, and sticking the landing is exact."""
    model = target(2, uneven)
    guide = AutoMeanFieldMixture(model, 2).setup()
    loc, scale = torch.tensor([[-3.0, 4.0]] * 2), torch.tensor([[1.0, 0.3]] * 2)
    guide.set_flat_params((loc, scale, torch.tensor([0.8, 0.2]).log()))
    log_weights = log_importance_weights(model, guide, num_draws=50)
    torch.testing.assert_close(log_weights, torch.zeros(50), atol=1e-12, rtol=0.0)
    loss, gradients = gradients_of(mf.ReverseKL(2, entropy="stl"), model, guide)
    assert abs(loss) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("entropy", ["closed_form", "monte_carlo"])
def test_gradient_is_that_of_the_loss(entropy):
    """Against central differences, in every stored parameter, weights included."""
    args = eight.args()
    guide = set_up(eight.model, 3, *args)
    objective = mf.ReverseKL(4, entropy=entropy)

    def loss():
        torch.manual_seed(1)
        return objective.loss(eight.model, guide, *args)

    torch.manual_seed(1)
    _, gradients = gradients_of(objective, eight.model, guide, *args)
    for parameter, gradient in zip(guide.parameters(), gradients, strict=True):
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), 4):
            old = flat[i].item()
            flat[i] = old + 1e-5
            above = loss()
            flat[i] = old - 1e-5
            difference = (above - loss()) / 2e-5
            flat[i] = old
            assert gradient.reshape(-1)[i].item() == pytest.approx(difference, abs=1e-6, rel=1e-6)


def test_solvers_gradient_is_that_of_its_value():
    model = target(2, two_modes)
    elbo = MixtureELBO(Blocks(mf.LogJoint(model)), 3, 8, seed=0, meter=Meter(10_000, silent))
    x = torch.randn(2 * 2 * 3 + 3)
    _, gradient = elbo.value_and_gradient(x)
    steps = 1e-5 * torch.eye(len(x))
    difference = [
        (elbo.value_and_gradient(x + s)[0] - elbo.value_and_gradient(x - s)[0]) / 2e-5
        for s in steps
    ]
    torch.testing.assert_close(gradient, torch.tensor(difference), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("entropy", ENTROPIES)
def test_both_roads_are_one(entropy):
    """The captured road against Pyro's own, on the same noise: loss and all gradients."""
    args = eight.args()
    guide = set_up(eight.model, 2, *args)
    objective = mf.ReverseKL(1, entropy=entropy)
    torch.manual_seed(7)
    loss, gradients = gradients_of(objective, eight.model, guide, *args)
    guide.zero_grad()
    torch.manual_seed(7)
    with poutine.block():  # other handlers around lead to the general road
        traced = objective.differentiable_loss(eight.model, guide, *args)
    traced.backward()
    torch.testing.assert_close(traced.detach(), loss)
    torch.testing.assert_close([p.grad for p in guide.parameters()], gradients)


def test_score_gradient_of_stock_objectives_agrees():
    """``Trace_ELBO`` draws from the mixture itself; 600 estimates, z = 5."""
    model = target(1, two_modes)
    guide = set_up(model, 2)
    ours = gradients_of(mf.ReverseKL(20_000), model, guide)[1]
    objective = pyro.infer.Trace_ELBO()
    found = []
    for _ in range(600):
        guide.zero_grad()
        objective.loss_and_grads(model, guide)
        found.append(torch.cat([p.grad.reshape(-1) for p in guide.parameters()]))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    z = (found.mean(0) - torch.cat([g.reshape(-1) for g in ours])) / error
    assert z.abs().max() < 5.0


# -- optima ----------------------------------------------------------------------------------------


def fit(model, num, **kwargs):
    guide = AutoMeanFieldMixture(model, num)
    return mf.fit(model, guide=guide, progress=False, **kwargs)


def modes_of(result):
    """Signs of the components' locations, one row each, with the components' weights added up."""
    guide = result.guide
    found = {}
    for loc, weight in zip(guide.loc.T.sign().tolist(), guide.weights.tolist(), strict=True):
        found[tuple(loc)] = found.get(tuple(loc), 0.0) + weight
    return found


@pytest.mark.parametrize(("size", "num"), [(1, 2), (2, 4)])
def test_enough_components_find_all_modes(size, num):
    """The evidence is 1; components of the modes' own widths leave a KL of 1e-4 by overlap."""
    result = fit(target(size, two_modes), num)
    assert result.converged
    assert modes_of(result) == pytest.approx({key: 1.0 / num for key in modes_of(result)}, abs=0.01)
    assert len(modes_of(result)) == num
    assert abs(result.elbo) < 0.01
    torch.testing.assert_close(
        result.guide.loc.abs(), torch.full((size, num), 2.0), atol=0.02, rtol=0.0
    )
    torch.testing.assert_close(
        result.guide.scale, torch.full((size, num), 0.5), atol=0.02, rtol=0.0
    )


def test_one_component_finds_one_mode():
    """The negative control."""
    result = fit(target(1, two_modes), 1)
    assert len(modes_of(result)) == 1
    exact = -math.log(2.0)
    assert result.elbo == pytest.approx(exact, abs=5.0 * result.elbo_se + 1e-3)


def test_fewer_components_than_modes_take_as_many_and_say_so():
    result = fit(target(2, two_modes), 2)
    assert len(modes_of(result)) == 2
    assert result.elbo == pytest.approx(-math.log(2.0), abs=0.01)
    assert "4 local optima of one mean field were found" in str(result).replace("\n", " ")


def test_weights_and_widths_of_uneven_modes():
    result = fit(target(2, uneven), 2)
    order = result.guide.loc[0].argsort()
    weights = result.guide.weights[order]
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.2]), atol=0.01, rtol=0.0)
    expected = torch.tensor([1.0, 0.3]).expand(2, 2)
    torch.testing.assert_close(result.guide.scale[:, order], expected, rtol=0.02, atol=0.0)
    assert abs(result.elbo) < 0.01


@pytest.mark.parametrize("num", [2, 4])
def test_more_components_than_modes_follow_correlation(num):
    """One mean field is 0.83 nats below the evidence; two components win 0.4, four win 0.7."""
    result = fit(target(2, correlated), num)
    assert result.elbo > {2: -0.45, 4: -0.17}[num]
    assert result.elbo < 3.0 * result.elbo_se


def test_surplus_components_do_no_harm():
    result = fit(target(1, two_modes), 4)
    assert len(modes_of(result)) == 2
    assert abs(result.elbo) < 0.01


@pytest.mark.parametrize("num", [2, 3])
def test_never_below_one_mean_field(num):
    """On a posterior of one mode with a funnel in it, over the same fresh draws."""
    one = mf.fit(eight.model, eight.args(), progress=False)
    guide = AutoMeanFieldMixture(eight.model, num)
    result = mf.fit(eight.model, eight.args(), guide=guide, progress=False)
    assert result.elbo >= one.elbo - 3.0 * math.hypot(one.elbo_se, result.elbo_se)
    [gain] = [note for note in result.notes if "above that of one mean field" in note]
    assert "the ELBO is -" not in gain


def test_same_seed_same_bits():
    first, second = (fit(target(1, two_modes), 3, seed=5) for _ in range(2))
    torch.testing.assert_close(
        first.guide.flat_params(), second.guide.flat_params(), rtol=0, atol=0
    )


def test_a_spent_budget_is_said_and_keeps_the_best():
    with pytest.warns(mf.ConvergenceWarning, match="did not converge"):
        result = fit(target(2, two_modes), 4, max_gradients=60)
    assert result.stop_reason == "budget"
    assert result.elbo > -1.6  # one mean field has -1.39


@pytest.mark.slow
def test_six_ways_to_label_three_clusters():
    """Each mode is worth a sixth of the evidence: log 6 nats above one mean field."""
    y = torch.cat([0.5 * torch.randn(40) + loc for loc in (-3.0, 0.0, 3.0)])

    def clusters(y):
        share = pyro.sample("share", dist.Dirichlet(torch.full((3,), 3.0)))
        with pyro.plate("cluster", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(y)):
            law = dist.MixtureSameFamily(dist.Categorical(share), dist.Normal(loc, scale))
            pyro.sample("y", law, obs=y)

    guide = AutoMeanFieldMixture(clusters, 6)
    result = mf.fit(clusters, (y,), guide=guide, progress=False)
    orders = {tuple(order) for order in guide.locs.loc.argsort(0).T.tolist()}
    assert len(orders) == 6
    torch.testing.assert_close(guide.weights, torch.full((6,), 1 / 6), atol=0.02, rtol=0.0)
    [gain] = [note for note in result.notes if "above that of one mean field" in note]
    assert float(gain.split()[3]) == pytest.approx(math.log(6.0), abs=0.05)
