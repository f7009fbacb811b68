"""``fit`` with factors of discrete sites: alone, and beside continuous ones."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf import FitResult, ReverseKL, fit
from pyro_mf._errors import CheckpointError, ModelError
from pyro_mf.fitting.choice import choose_solver
from pyro_mf.fitting.problem import read_problem
from pyro_mf.objectives.labelled import LabelledJoint

HOUSE = {"window": "bernoulli", "room": "categorical"}


ROOMS = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)


def house(x):
    window = pyro.sample("window", dist.Bernoulli(0.4))
    with pyro.plate("nights", len(x)):
        room = pyro.sample("room", dist.Categorical(ROOMS[window.long()]))
        pyro.sample("x", dist.Normal(room.to(x), 1.0), obs=x)


HEARD = (torch.tensor([0.3, 1.2, 2.0], dtype=torch.float64),)


def clusters(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(loc + 2.0 * k, 1.0), obs=x)


DATA = (torch.tensor([-0.4, 0.3, 2.6, 0.9], dtype=torch.float64),)


@pytest.fixture(scope="module")
def alone():
    torch.set_default_dtype(torch.float64)
    return fit(house, HEARD, family=HOUSE)


@pytest.fixture(scope="module")
def mixed():
    torch.set_default_dtype(torch.float64)
    return fit(clusters, DATA, family={"k": "bernoulli"})


def loss_of(model, result, num_particles=1):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ReverseKL(num_particles).loss(model, result.guide, *result.problem.model_args)


def test_one_label_has_its_exact_posterior():
    def door(heard):
        cat = pyro.sample("cat", dist.Bernoulli(torch.tensor(1 / 3)))
        with pyro.plate("tries", len(heard)):
            pyro.sample("heard", dist.Bernoulli(0.2 + 0.4 * cat), obs=heard)

    heard = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    result = fit(door, (heard,), family="bernoulli")
    joint = torch.tensor([2 / 3 * 0.2**4 * 0.8**4, 1 / 3 * 0.6**4 * 0.4**4])
    assert result.converged
    torch.testing.assert_close(result.guide.probs("cat").detach(), joint / joint.sum())
    assert result.elbo == pytest.approx(math.log(joint.sum()))


def test_models_of_labels_alone_are_fitted_without_steps(alone):
    assert (alone.solver, alone.stop_reason) == ("deterministic", "converged")
    assert alone.elbo == pytest.approx(-loss_of(house, alone), abs=1e-9)
    assert alone.elbo_se == 0.0
    text = str(alone)
    assert "4 discrete elements: window, room [3]" in text
    assert "there are no continuous latents" in text


def test_summary_has_the_probabilities_of_every_value(alone):
    table = alone.summary()
    assert list(table.columns) == ["P(0)", "P(1)", "P(2)"]
    rooms = table.loc[[f"room[{i}]" for i in range(3)]].to_numpy()
    np.testing.assert_allclose(rooms, alone.guide.probs("room").detach())
    assert math.isnan(table.loc["window", "P(2)"])


def test_draws_of_labels_alone(alone):
    draws = alone.sample(4000, seed=3)
    assert draws["room"].shape == (4000, 3)
    probs = alone.guide.probs("room").detach()
    hits = torch.nn.functional.one_hot(draws["room"].long(), 3).double().mean(0)
    # 4.5 standard errors of a frequency
    assert bool(((hits - probs).abs() < 4.5 * (probs * (1 - probs) / 4000).sqrt()).all())
    torch.testing.assert_close(alone.sample(4000, seed=3), draws)


@pytest.mark.parametrize("name", ["alone", "mixed"])
def test_arviz_has_labels_and_the_elbo_that_belongs_to_them(name, request):
    result = request.getfixturevalue(name)
    converted = result.to_arviz(num_draws=100)
    site = "room" if name == "alone" else "k"
    assert converted["posterior"][site].shape[:2] == (1, 100)
    found = converted["vi_fit"]
    error = math.hypot(float(found["elbo_mcse"]), result.elbo_se)
    assert abs(float(found["elbo"]) - result.elbo) < 4.5 * error


@pytest.mark.parametrize("name", ["alone", "mixed"])
def test_saved_fits_come_back(name, request, tmp_path):
    result = request.getfixturevalue(name)
    model, args = result.problem.model, result.problem.model_args
    result.save(tmp_path / "fit.pt")
    back = FitResult.load(tmp_path / "fit.pt", model, args)
    for site in result.guide.discrete_sites:
        assert torch.equal(back.guide.probs(site.name), result.guide.probs(site.name))
    assert back.elbo == result.elbo
    assert back.summary().equals(result.summary())
    other = clusters if model is house else house
    with pytest.raises(CheckpointError, match="another model"):
        FitResult.load(tmp_path / "fit.pt", other, args)


def test_restarts_keep_the_labels_of_the_best():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(house, HEARD, family=HOUSE, num_restarts=4)
    assert len(result.restarts) == 4
    assert result.elbo == max(optimum.elbo for optimum in result.restarts)
    assert result.elbo == pytest.approx(-loss_of(house, result), abs=1e-9)
    assert {len(optimum.params) for optimum in result.restarts} == {4}


def test_a_model_without_factors_says_how_to_have_them():
    with pytest.raises(ModelError, match="family={'window'"):
        fit(house, HEARD)


def test_labels_that_cannot_be_summed_over_go_to_the_stochastic_solver():
    def counted(x):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(k.sum(-1), 1.0), obs=x)

    problem = read_problem(counted, (torch.tensor(1.0),), family="bernoulli")
    choice = choose_solver(problem)
    assert choice.solver == "stochastic"
    assert "cannot be summed over" in choice.reason
    with pytest.raises(ValueError, match="cannot be summed over"):
        choose_solver(problem, "deterministic")


# -- labels beside continuous latents ------------------------------------------------------------


def test_continuous_factors_and_labels_are_at_the_optimum_of_each_given_the_other(mixed):
    """Closed forms: the model is conjugate given the labels, and the ELBO quadratic in loc."""
    (x,) = DATA
    assert (mixed.solver, mixed.converged) == ("deterministic", True)
    p = mixed.guide.probs("k").detach()[:, 1]
    loc, scale = mixed.guide.loc.item(), mixed.guide.scale.item()
    precision = 1 / 4 + len(x)
    # Labels are set at other draws than loc was, 1024 of a net: good to a thousandth or so.
    assert loc == pytest.approx(float((x - 2 * p).sum()) / precision, abs=5e-3)
    assert scale == pytest.approx(precision**-0.5, rel=1e-2)
    odds = math.log(0.3 / 0.7) + 2 * (x - loc) - 2
    torch.testing.assert_close(p, torch.sigmoid(odds), atol=2e-3, rtol=0)


def test_elbo_is_that_of_the_objective_and_below_the_evidence(mixed):
    (x,) = DATA
    again = -loss_of(clusters, mixed, 200)
    assert mixed.elbo == pytest.approx(again, abs=0.25)  # 200 draws of sd about 0.7: 4.5 errors
    grid = torch.linspace(-8, 8, 4001)
    by_label = torch.stack([x - grid[:, None], x - grid[:, None] - 2])
    each = -by_label.square() / 2 + torch.tensor([0.7, 0.3]).log()[:, None, None]
    joint = each.logsumexp(0).sum(-1) - grid.square() / 8 - 2.5 * math.log(2 * math.pi)
    evidence = float((joint - math.log(2.0)).logsumexp(0) + math.log(16 / 4000))
    assert evidence - 1.5 < mixed.elbo < evidence + 4.5 * mixed.elbo_se


def test_no_small_change_of_labels_raises_the_elbo(mixed):
    """A negative control on the exact ELBO given loc's factor."""
    joint = LabelledJoint(mixed.log_joint, ["k"])
    z = mixed.guide.sample_unconstrained(24)

    def elbo(shift):
        logits = mixed.guide.discrete_params()[0].detach() + shift
        factor = torch.distributions.Bernoulli(logits=logits)
        values, _ = joint.value_and_grad(z, joint.probs({"k": factor}))
        return float(values.mean() + factor.entropy().sum())

    best = elbo(0.0)
    assert all(elbo(shift) < best for shift in (-1.0, 1.0))
    assert elbo(3.0) < best - 0.5


def test_labelled_joint_agrees_with_the_model_at_every_value():
    from pyro_mf.density import LogJoint

    joint = LabelledJoint(LogJoint(clusters, DATA), ["k"])
    z, k = torch.tensor([[0.3], [-1.0]]), torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]])
    for row, labels, found in zip(z, k, joint.at(z, {"k": k}), strict=True):
        known = pyro.poutine.condition(clusters, {"loc": row[0], "k": labels})
        trace = pyro.poutine.trace(known).get_trace(*DATA)
        assert float(found) == pytest.approx(float(trace.log_prob_sum()))


def test_mixed_summary_and_draws(mixed):
    table = mixed.summary()
    assert list(table.index) == ["loc", *(f"k[{i}]" for i in range(4))]
    assert math.isnan(table.loc["loc", "P(1)"])
    assert table.loc["k[2]", "P(1)"] == pytest.approx(mixed.guide.probs("k")[2, 1].item())
    assert {n: tuple(v.shape) for n, v in mixed.sample(5).items()} == {"loc": (5,), "k": (5, 4)}
    assert "4 discrete elements: k [4]" in str(mixed)
