"""Exact identities of ForwardKL: what is scored, its optimum at exact moments, wake-theta."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ForwardKL
from pyro_mf.objectives.forward_estimators import Draws
from pyro_mf.objectives.forward_pair import cross_entropy, make_scorer
from pyro_mf.objectives.forward_scoring import FlatScorer, TracedScorer
from tests.cases import MODELS

X = torch.tensor([0.5, -1.0, 2.0, 1.2], dtype=torch.float64)
FULL = sorted(name for name, case in MODELS.items() if not case.is_subsampled)


def conjugate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def set_up(model: Any, *args: Any, **kwargs: Any) -> AutoMeanField:
    return AutoMeanField(model, **kwargs).setup(*args)


def grads(loss: Tensor, guide: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(guide.parameters()), retain_graph=True))


@pytest.mark.parametrize("name", FULL)
def test_flat_and_traced_road_score_the_same_draws_alike(name) -> None:
    case = MODELS[name]
    args = case.args()
    guide = set_up(case.model, *args, init_scale=0.3)
    log_joint = LogJoint(case.model, args)
    like = torch.empty(0)
    scorers = (
        FlatScorer(guide, log_joint.layout),
        TracedScorer(guide, log_joint.layout, args, {}, like),
    )
    z = 0.5 * torch.randn(3, log_joint.size)
    weights = torch.tensor([0.2, 0.5, 0.3])
    flat, traced = (cross_entropy(scorer, z, weights) for scorer in scorers)
    torch.testing.assert_close(flat, traced, rtol=1e-8, atol=1e-8)
    for a, b in zip(grads(flat, guide), grads(traced, guide), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    torch.manual_seed(1)
    first = scorers[0].sample(1)
    torch.manual_seed(1)
    assert first.shape == scorers[1].sample(1).shape


@pytest.mark.parametrize("estimator", ["hmc", "imh", "msc", "snis"])
def test_loss_is_minus_the_mean_of_log_q_at_the_draws(estimator) -> None:
    guide = set_up(conjugate, X, init_scale=0.7)
    loss = ForwardKL(8, estimator=estimator)
    value = loss.differentiable_loss(conjugate, guide, X)
    z, weights = loss._pairs[0]._estimator.draws
    assert not z.requires_grad
    expected = -(weights * dist.Normal(guide.loc, guide.scale).log_prob(z).sum(-1)).sum()
    torch.testing.assert_close(value, expected)
    for a, b in zip(grads(value, guide), grads(expected, guide), strict=True):
        torch.testing.assert_close(a, b)
    assert float(weights.sum()) == pytest.approx(1.0)


def test_exact_moments_make_the_marginal_variances_the_exact_optimum() -> None:
    # METHODS 3.3: forward variances are the diagonal of the covariance.
    covariance = torch.tensor([[2.75, 0.71, -2.46], [0.71, 1.51, -1.79], [-2.46, -1.79, 3.59]])
    mean = torch.tensor([1.0, -2.0, 0.5])

    def model() -> None:
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    guide = set_up(model)
    scorer = make_scorer(guide, LogJoint(model), (), {})
    noise = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)])  # moments of N(0, I)
    z = mean + noise @ torch.linalg.cholesky(covariance).T
    weights = torch.full((6,), 1 / 6)
    guide.locs.z, guide.scales.z = mean, covariance.diagonal().sqrt()
    loss = cross_entropy(scorer, z, weights)
    assert all(float(g.abs().max()) < 1e-12 for g in grads(loss, guide))
    # Cross-entropy less the posterior's entropy is minus half the log determinant of correlations.
    scale = covariance.diagonal().rsqrt()
    correlation = scale[:, None] * covariance * scale
    entropy = torch.distributions.MultivariateNormal(mean, covariance).entropy()
    gap = -0.5 * torch.linalg.slogdet(correlation)[1]
    torch.testing.assert_close(loss - entropy, gap)
    guide.scales.z = torch.linalg.inv(covariance).diagonal().rsqrt()  # negative control: reverse
    assert bool(cross_entropy(scorer, z, weights) > loss + 1.0)


def hand_written(x: Tensor) -> None:
    loc = pyro.param("l", torch.tensor(0.1))
    scale = pyro.param("s", torch.tensor(0.6), constraint=constraints.positive)
    pyro.sample("rate", dist.LogNormal(loc, scale))


def counts_model(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_hand_written_guide_is_scored_on_the_unconstrained_space_as_ours_is() -> None:
    counts = torch.tensor([1.0, 0.0])
    ours = set_up(counts_model, counts)
    ours.locs.rate, ours.scales.rate = torch.tensor(0.1), torch.tensor(0.6)
    log_joint = LogJoint(counts_model, (counts,))
    z = torch.linspace(-2.0, 2.0, 5)[:, None]
    scores = [
        make_scorer(guide, log_joint, (counts,), {}).log_prob(z) for guide in (ours, hand_written)
    ]
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(scores[0], dist.Normal(0.1, 0.6).log_prob(z[:, 0]))


def test_both_roads_of_importance_sampling_agree_at_the_posterior() -> None:
    # At q = posterior all weights are equal, so the loss is the mean over the draws on both.
    guide = set_up(conjugate, X)
    guide.locs.loc, guide.scales.loc = X.sum() / 5, torch.tensor(5.0).rsqrt()
    flat = ForwardKL(16, estimator="snis")
    with torch.no_grad():
        flat.loss(conjugate, guide, X)
    assert flat.diagnostics.ess == pytest.approx(16.0)
    with pyro.poutine.scale(scale=1.0):  # inside a handler, so model and guide are run
        traced = ForwardKL(16, estimator="snis")
        traced.loss(conjugate, guide, X)
    assert traced.diagnostics.ess == pytest.approx(16.0)
    assert "ScaleMessenger" in traced.diagnostics.reason


def test_minibatches_of_local_latents_have_weights_of_their_own() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = set_up(model, X)
    guide.locs.z, guide.scales.z = X / 2, torch.tensor(0.5).sqrt()
    loss = ForwardKL(4)
    loss.loss(model, guide, X)
    log_weights = loss._pairs[0]._runs.log_weights
    assert log_weights.shape == (4, 2)
    # The posterior of each element is known: log weights are its evidence, whatever the draw.
    torch.testing.assert_close(log_weights, log_weights[:1].expand(4, 2))
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X)
    assert all(float((evidence - w).abs().min()) < 1e-9 for w in log_weights[0])


def test_minibatches_average_to_the_full_data(monkeypatch) -> None:
    def model(x: Tensor, index: Tensor) -> None:
        with pyro.plate("data", 4, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = set_up(model, X, torch.arange(4))
    guide.locs.z, guide.scales.z = X / 2, torch.tensor(0.5).sqrt()
    loss = ForwardKL(400, estimator="snis")

    def losses(index: tuple[int, ...], count: int) -> float:
        args = (X, torch.tensor(index))
        return sum(loss.loss(model, guide, *args) for _ in range(count)) / count

    # Each element's cross-entropy at its posterior is that of a Gaussian, 1/2 log(2 pi e / 2).
    exact = 4 * 0.5 * math.log(2 * math.pi * math.e / 2)
    for index in ((0, 1), (2, 3)):
        # z = 5 of the sd of 400 chi-square halves per element, two elements counted twice.
        assert abs(losses(index, 1) - exact) < 5 * 2 * math.sqrt(2 * 0.5 / 400)
    assert abs(losses((0, 1), 1) - exact / 2) > 1.0  # negative control: without the plate's scale


class _Fixed:
    """Draws with the exact posterior mean and variance."""

    is_chain = True

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def advance(self, *, target_changed: bool) -> Draws:
        assert target_changed
        return self.draws

    acceptance, num_evaluations, num_gradients = math.nan, 0, 0


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2)])
def test_wake_theta_is_the_exact_gradient_of_the_evidence(weights) -> None:
    # z ~ N(theta, 1), x ~ N(z, s): log p(x) = log N(x; theta, 1 + s^2).
    def model(x: Tensor) -> None:
        theta = pyro.param("theta", torch.tensor(0.4))
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, noise), obs=x)

    x = torch.tensor(1.3)
    guide = set_up(model, x)
    loss = ForwardKL(2, estimator="imh")
    loss.loss(model, guide, x)
    theta, noise = torch.tensor(0.4), torch.tensor(0.5)
    mean = (theta + x / noise**2) / (1 + 1 / noise**2)
    sd = (1 + 1 / noise**2).rsqrt()
    w = torch.tensor(weights)
    points = torch.stack([(w[1] / w[0]).sqrt(), -(w[0] / w[1]).sqrt()])  # moments 0 and 1
    loss._pairs[0]._estimator = _Fixed(Draws((mean + sd * points)[:, None], w))
    loss.loss_and_grads(model, guide, x)
    store = pyro.get_param_store()
    found = [store._params[name].grad for name in ("theta", "noise")]
    leaves = [theta.clone().requires_grad_(), noise.log().requires_grad_()]
    evidence = dist.Normal(leaves[0], (1 + leaves[1].exp() ** 2).sqrt()).log_prob(x)
    expected = torch.autograd.grad(-evidence, leaves)
    torch.testing.assert_close(found, list(expected))


def test_wake_theta_of_the_traced_road_is_that_of_its_weights() -> None:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        k = pyro.sample("k", dist.Bernoulli(p))
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.tensor(0.5), constraint=constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(q))

    x = torch.tensor(1.5)
    joint = [math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x)]
    joint.append(math.log(0.3) + dist.Normal(2.0, 1.0).log_prob(x))
    posterior = float(torch.softmax(torch.stack(joint), 0)[1])
    loss = ForwardKL(2000)
    value = loss.loss_and_grads(model, guide, x)
    assert loss.diagnostics.estimator == "snis"
    assert value == pytest.approx(math.log(2.0), abs=1e-9)  # log q is log 1/2 at every draw
    store = pyro.get_param_store()
    # By the logit of q: q - posterior; by that of p: p - posterior. z = 5 of 2000 equal draws.
    error = 5 * 0.5 / math.sqrt(2000)
    assert float(store._params["q"].grad) == pytest.approx(0.5 - posterior, abs=error)
    assert float(store._params["p"].grad) == pytest.approx(0.3 - posterior, abs=error)


def test_draws_carry_no_gradient_to_the_guide() -> None:
    # P4 of stock wake-phi: a gradient through the Jacobian at the guide's own draws. Here a
    # location's gradient is that of log q alone.
    counts = torch.tensor([1.0, 0.0])
    loss = ForwardKL(4, estimator="snis")
    for guide in (hand_written, set_up(counts_model, counts)):
        with pyro.poutine.scale(scale=1.0):
            value = loss.differentiable_loss(counts_model, guide, counts)
        assert bool(torch.isfinite(value))
    z, weights = torch.tensor([[0.3], [-0.4]]), torch.tensor([0.5, 0.5])
    scorer = make_scorer(hand_written, LogJoint(counts_model, (counts,)), (counts,), {})
    cross_entropy(scorer, z, weights).backward()
    grad = pyro.get_param_store()._params["l"].grad
    assert float(grad) == pytest.approx(float((0.1 - z.mean()) / 0.6**2))
