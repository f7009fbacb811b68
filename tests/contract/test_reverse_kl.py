"""ReverseKL: two roads with one meaning, exact values, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_mf._errors import CaptureWarning, GuideMismatchError, ModelError, NonFiniteError
from pyro_mf.families.normal import Normal
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ReverseKL
from tests.cases import MODELS

ENTROPIES = ["closed_form", "stl", "monte_carlo"]
X = torch.tensor([0.5, -1.0, 2.0, 1.2], dtype=torch.float64)


def conjugate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def set_up(model: Any, *args: Any, **kwargs: Any) -> AutoMeanField:
    guide = AutoMeanField(model, **kwargs)
    guide.setup(*args)
    return guide


def grads(loss: Tensor, guide: Any) -> dict[str, Tensor]:
    names, params = zip(*guide.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.fixture
def fixed_noise(monkeypatch):
    """Make guides of both kinds draw from one given noise, in the order of the flat vector."""

    def fix(noise: Tensor) -> None:
        monkeypatch.setattr(Normal, "noise", lambda *_, **__: noise)
        flat = itertools.chain.from_iterable(itertools.repeat(noise.reshape(-1).tolist()))

        def standard_normal(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
            taken = list(itertools.islice(flat, math.prod(shape)))
            return torch.tensor(taken, dtype=dtype, device=device).reshape(shape)

        monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)

    return fix


# -- two roads, one meaning -----------------------------------------------------------------------


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_captured_and_general_road_agree_on_the_same_noise(
    name, entropy, fixed_noise, monkeypatch
) -> None:
    case = MODELS[name]
    args = case.args()
    guide = set_up(case.model, *args, init_scale=0.3)
    minibatch = torch.randperm(10)
    monkeypatch.setattr("torch.randperm", lambda *_, **__: minibatch)
    num_particles = 1 if case.is_subsampled else 2  # each particle of the general road subsamples
    loss = ReverseKL(num_particles, entropy=entropy, backend="graph")
    captured_size = sum(s.size for s in _layout_of_call(loss, case.model, guide, args).sites)
    fixed_noise(torch.randn(num_particles, captured_size))
    captured = loss.differentiable_loss(case.model, guide, *args)
    captured_grads = grads(captured, guide)
    with poutine.scale(scale=1.0):  # inside a handler, so the general road
        general = loss.differentiable_loss(case.model, guide, *args)
    assert loss._captured[0].num_captures == 1
    torch.testing.assert_close(captured, general.detach(), rtol=1e-8, atol=1e-8)
    for key, value in grads(general, guide).items():
        torch.testing.assert_close(captured_grads[key], value, rtol=1e-6, atol=1e-8)


def _layout_of_call(loss: ReverseKL, model: Any, guide: Any, args: Any) -> Any:
    loss.differentiable_loss(model, guide, *args)
    return loss._captured[0]._graphs[0].program.prototype.layout


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_every_backend_gives_the_same_loss_and_gradient(backend, fixed_noise) -> None:
    fixed_noise(torch.randn(3, 1))
    guide = set_up(conjugate, X)
    expected = ReverseKL(3, backend="graph").differentiable_loss(conjugate, guide, X)
    other = ReverseKL(3, backend=backend).differentiable_loss(conjugate, guide, X)
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(grads(other, guide), grads(expected, guide))


# -- exact values ---------------------------------------------------------------------------------


def posterior_guide() -> AutoMeanField:
    guide = set_up(conjugate, X)
    precision = 1.0 + len(X)
    guide.locs.loc = X.sum() / precision
    guide.scales.loc = torch.tensor(precision).rsqrt()
    return guide


def log_evidence() -> Tensor:
    covariance = torch.eye(len(X)) + torch.ones(len(X), len(X))
    return torch.distributions.MultivariateNormal(torch.zeros(len(X)), covariance).log_prob(X)


@pytest.mark.parametrize("entropy", ["stl", "monte_carlo"])
def test_at_the_posterior_every_draw_gives_the_log_evidence(entropy) -> None:
    guide = posterior_guide()
    for _ in range(3):
        value = ReverseKL(1, entropy=entropy).loss(conjugate, guide, X)
        assert value == pytest.approx(-float(log_evidence()), abs=1e-9)


def test_at_the_posterior_sticking_the_landing_has_gradient_zero() -> None:
    guide = posterior_guide()
    zero = grads(ReverseKL(2, entropy="stl").differentiable_loss(conjugate, guide, X), guide)
    assert all(float(g.abs().max()) < 1e-10 for g in zero.values())
    # Negative control: the other estimators are zero there only on average.
    other = grads(ReverseKL(2).differentiable_loss(conjugate, guide, X), guide)
    assert max(float(g.abs().max()) for g in other.values()) > 1e-3


def test_gaussian_target_has_the_known_optimum_and_gap(fixed_noise) -> None:
    # METHODS: variances 1 / A_ii and KL(q||p) = -1/2 log det of the correlation matrix of A.
    covariance = torch.tensor([[2.75, 0.71, -2.46], [0.71, 1.51, -1.79], [-2.46, -1.79, 3.59]])
    precision = torch.linalg.inv(covariance)

    def model() -> None:
        mean = torch.tensor([1.0, -2.0, 0.5])
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    guide = set_up(model)
    guide.locs.z = torch.tensor([1.0, -2.0, 0.5])
    guide.scales.z = precision.diagonal().rsqrt()
    # These six draws have the moments of N(0, I) up to the second, so a quadratic is integrated
    # exactly and the loss has no Monte Carlo error at all.
    fixed_noise(math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)]))
    loss = ReverseKL(6).differentiable_loss(model, guide)
    scale = precision.diagonal().rsqrt()
    gap = -0.5 * torch.linalg.slogdet(scale[:, None] * precision * scale)[1]
    torch.testing.assert_close(loss, gap)  # the evidence is 1
    assert all(float(g.abs().max()) < 1e-12 for g in grads(loss, guide).values())
    guide.scales.z = covariance.diagonal().sqrt()  # negative control: the marginal sds
    worse = ReverseKL(6).differentiable_loss(model, guide)
    assert float(worse.detach()) > float(gap) + 1.0


def test_constrained_latent_agrees_with_the_closed_form_expectation() -> None:
    # Gamma(2, 1) prior, Poisson counts, q log-normal: all expectations are closed.
    counts = torch.tensor([1.0, 0.0])

    def model(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    guide = set_up(model, counts)
    mu, sigma = torch.tensor(-0.1), torch.tensor(0.45)
    guide.locs.rate, guide.scales.rate = mu, sigma
    mean_rate = (mu + sigma**2 / 2).exp()
    prior = mu - mean_rate  # log Gamma(2, 1) is log rate - rate
    likelihood = counts.sum() * mu - len(counts) * mean_rate - torch.lgamma(counts + 1).sum()
    elbo = prior + likelihood + mu + 0.5 * torch.log(2 * math.pi * math.e * sigma**2)
    loss = ReverseKL(1000)
    draws = torch.tensor([loss.loss(model, guide, counts) for _ in range(50)])
    error = draws.std() / len(draws) ** 0.5
    # z = 5: a false alarm in 1.7 million; sees errors of 5 * 0.004 = 0.02 nats.
    assert error < 0.01
    assert abs(draws.mean() + elbo) < 5 * error
    jacobian = float(mu)  # negative control: forgetting the Jacobian is far outside
    assert abs(draws.mean() + elbo - jacobian) > 5 * error


def test_minibatches_average_to_the_full_data(fixed_noise) -> None:
    def model(x: Tensor, index: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample=index) as i:
            local = pyro.sample("local", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(local, 1.0), obs=x[i])

    guide = set_up(model, X, torch.arange(4))
    guide.locs.local = torch.randn(4)
    loss = ReverseKL(1)
    noise = torch.randn(1, 5)
    fixed_noise(noise)
    full = loss.differentiable_loss(model, guide, X, torch.arange(4))
    full_grads = grads(full, guide)
    parts, part_grads = [], []
    for subset in itertools.combinations(range(4), 2):
        index = torch.tensor(subset)
        fixed_noise(noise[:, torch.cat([torch.tensor([0]), 1 + index])])
        part = loss.differentiable_loss(model, guide, X, index)
        part_grads.append(grads(part, guide))
        parts.append(part.detach())
    torch.testing.assert_close(torch.stack(parts).mean(), full.detach())
    for key, value in full_grads.items():
        mean = torch.stack([g[key] for g in part_grads]).mean(0)
        torch.testing.assert_close(mean, value)
    assert loss._captured[0].num_captures == 2  # one for each size of minibatch


# -- in SVI and as a module -----------------------------------------------------------------------


def test_svi_step_and_evaluate_loss_return_floats_and_leave_no_gradient() -> None:
    guide = AutoMeanField(conjugate)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), loss=ReverseKL(4))
    assert isinstance(svi.step(X), float)
    assert isinstance(svi.evaluate_loss(X), float)
    assert all(p.grad is None or not p.grad.any() for p in guide.parameters())
    losses = [svi.step(X) for _ in range(300)]
    assert sum(losses[-50:]) < sum(losses[:50])
    assert float(guide.median()["loc"]) == pytest.approx(float(X.sum()) / 5, abs=0.1)


def test_twenty_steps_are_one_capture() -> None:
    loss = ReverseKL(2)
    svi = SVI(conjugate, AutoMeanField(conjugate), pyro.optim.Adam({"lr": 0.01}), loss=loss)
    for step in range(20):
        svi.step(X + step)  # other data of the same shape
    assert loss._captured[0].num_captures == 1


def test_captured_loss_follows_the_data_that_it_is_given() -> None:
    guide = posterior_guide()
    loss = ReverseKL(1, entropy="stl")
    assert loss.loss(conjugate, guide, X) == pytest.approx(-float(log_evidence()))
    shifted = loss.loss(conjugate, guide, X + 3.0)
    assert shifted == pytest.approx(
        ReverseKL(1, entropy="stl", backend="eager").loss(conjugate, guide, X + 3.0), abs=30.0
    )
    assert shifted > -float(log_evidence()) + 5.0
    longer = torch.cat([X, X])  # another shape: a fresh capture
    loss.loss(conjugate, guide, longer)
    assert loss._captured[0].num_captures == 2


@pytest.mark.parametrize("local_params", [False, True])
def test_module_form_has_the_gradients_of_svi(local_params) -> None:
    with pyro.settings.context(module_local_params=local_params):
        guide = set_up(conjugate, X)
        module = ReverseKL(3)(conjugate, guide)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
        pyro.set_rng_seed(5)
        loss = module(X)
        loss.backward()
        from_module = [p.grad.clone() for p in guide.parameters()]
        optimiser.step()
        optimiser.zero_grad()
        guide = set_up(conjugate, X) if not local_params else AutoMeanField(conjugate).setup(X)
        pyro.set_rng_seed(5)
        ReverseKL(3).loss_and_grads(conjugate, guide, X)
        for a, p in zip(from_module, guide.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)


def test_same_seed_gives_the_same_bits() -> None:
    def run() -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        guide = AutoMeanField(conjugate)
        svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), loss=ReverseKL(4))
        return [svi.step(X) for _ in range(10)]

    assert run() == run()


class Decoder(PyroModule):
    """A model with parameters of three kinds: a module's, a PyroParam, a pyro.param."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.noise = PyroParam(torch.tensor(0.7), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(z[:, None]).squeeze(-1), self.noise), obs=x)


def test_learnable_model_parameters_get_the_gradients_of_stock_pyro(fixed_noise) -> None:
    fixed_noise(torch.randn(1, 4))
    model = Decoder()
    guide = set_up(model, X)
    Trace_ELBO().loss_and_grads(model, guide, X)
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    assert len(expected) == 3
    for p in (*model.parameters(), *guide.parameters()):
        p.grad = None
    ReverseKL(1).loss_and_grads(model, guide, X)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[key])


def test_svi_optimises_the_parameters_of_the_model() -> None:
    model = Decoder()
    before = copy.deepcopy(dict(model.named_parameters()))
    svi = SVI(model, AutoMeanField(model), pyro.optim.Adam({"lr": 0.05}), loss=ReverseKL(2))
    for _ in range(5):
        svi.step(X)
    for key, p in model.named_parameters():
        assert not torch.equal(p, before[key]), key


def test_loading_other_parameters_into_the_store_is_noticed() -> None:
    def model(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("loc", dist.Normal(0.0, width))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1), obs=x)

    guide, loss = set_up(model, X), ReverseKL(1)
    guide.scales.loc = torch.tensor(1e-9)
    first = loss.loss(model, guide, X)
    pyro.get_param_store()["width"] = torch.tensor(math.e)  # a new leaf tensor
    assert loss.loss(model, guide, X) - first == pytest.approx(1.0, abs=1e-6)


# -- any other guide ------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("entropy", ENTROPIES)
def test_general_road_is_exact_at_the_posterior_with_stock_guides(stock, entropy) -> None:
    precision = 1.0 + len(X)
    guide = stock(conjugate, init_loc_fn=lambda _: X.sum() / precision, init_scale=precision**-0.5)
    guide(X)
    values = torch.tensor([ReverseKL(1, entropy=entropy).loss(conjugate, guide, X)] * 2)
    if entropy != "closed_form" or stock is AutoDiagonalNormal:
        tolerance = 1e-6 if entropy != "closed_form" else 5.0
        torch.testing.assert_close(values, -log_evidence().expand(2), atol=tolerance, rtol=0.0)
    if entropy == "stl":
        loss = ReverseKL(1, entropy="stl").differentiable_loss(conjugate, guide, X)
        assert all(float(g.abs().max()) < 1e-6 for g in grads(loss, guide).values())


def test_hand_written_guide_with_enumerated_model(fixed_noise) -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.2))
        base = dist.Normal(loc, torch.tensor(0.5))
        pyro.sample("p", dist.TransformedDistribution(base, [dist.transforms.SigmoidTransform()]))

    auto = set_up(model, X)
    auto.locs.p, auto.scales.p = torch.tensor(0.2), torch.tensor(0.5)
    fixed_noise(torch.randn(2, 1))
    by_hand = ReverseKL(2).loss(model, guide, X)
    assert by_hand == pytest.approx(ReverseKL(2).loss(model, auto, X), abs=1e-9)


def test_guide_without_reparameterised_draws_is_refused() -> None:
    def model() -> None:
        pyro.sample("k", dist.Bernoulli(0.3))

    def guide() -> None:
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(ModelError, match="'k' .*no reparameterised draws"):
        ReverseKL().loss(model, guide)


def test_guide_without_a_latent_of_the_model_is_refused() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(GuideMismatchError, match=r"\['loc'\] of the model have no sample"):
        ReverseKL().loss(conjugate, guide, X)


def test_guide_for_another_model_is_refused() -> None:
    def other(x: Tensor) -> None:
        pyro.sample("location", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(1), obs=x)

    guide = set_up(other, X)
    with pytest.raises(GuideMismatchError, match=r"latent sites \['location'\].*\['loc'\]"):
        ReverseKL().loss(conjugate, guide, X)


def test_local_latents_of_another_number_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = set_up(model, X)
    with pytest.raises(GuideMismatchError, match="plate 'data' .*size 2.*set up for size 4"):
        ReverseKL().loss(model, guide, X[:2])


# -- faults in the middle of training -------------------------------------------------------------


def brittle(x: Tensor, poison: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    pyro.factor("culprit", poison * loc)


@pytest.mark.filterwarnings(r"ignore:Encountered \+inf")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("stock", [False, True])
def test_non_finite_loss_names_the_site_and_keeps_the_parameters(poison, stock) -> None:
    guide = AutoNormal(brittle) if stock else AutoMeanField(brittle)
    svi = SVI(brittle, guide, pyro.optim.Adam({"lr": 0.05}), loss=ReverseKL(2))
    for _ in range(3):
        svi.step(X, torch.tensor(0.0))
    before = copy.deepcopy(guide.state_dict())
    with pytest.raises(NonFiniteError, match="'culprit'.*last finite values"):
        svi.step(X, torch.tensor(poison))
    for key, value in guide.state_dict().items():
        assert torch.equal(value, before[key])
    assert math.isfinite(svi.step(X, torch.tensor(0.0)))


def test_gradient_that_is_not_finite_though_the_loss_is_names_the_site() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("corner", (0.0 * loc).sqrt())  # zero, with an infinite slope times zero
        pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    guide = set_up(model, X)
    with pytest.raises(NonFiniteError, match="gradient.*'corner'"):
        ReverseKL(1).loss_and_grads(model, guide, X)
    assert all(p.grad is None for p in guide.parameters())


@pytest.mark.parametrize("stock", [False, True])
def test_a_matrix_that_cannot_be_factorised_keeps_the_parameters(stock) -> None:
    def model(size: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        covariance = length * torch.eye(2) - size * torch.ones(2, 2)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.zeros(2))

    guide = AutoNormal(model) if stock else AutoMeanField(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=ReverseKL(2))
    svi.step(torch.tensor(0.0))
    before = copy.deepcopy(guide.state_dict())
    match = "covariance_matrix" if stock else "cannot be factorised.*after site 'length'"
    with pytest.raises(ValueError if stock else NonFiniteError, match=match):
        svi.step(torch.tensor(9.0))
    for key, value in guide.state_dict().items():
        assert torch.equal(value, before[key])


def test_control_flow_on_data_is_captured_anew_and_then_left_to_eager() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0 if x.sum() > 0 else 9.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide = set_up(model, X)
    guide.scales.loc = torch.tensor(1e-9)
    loss = ReverseKL(1)

    def expected(x: Tensor) -> float:
        return ReverseKL(1, backend="eager").loss(model, guide, x)

    assert loss.loss(model, guide, X) == pytest.approx(expected(X), abs=1e-6)
    assert loss.loss(model, guide, -X) == pytest.approx(expected(-X), abs=1e-6)
    with pytest.warns(
        CaptureWarning, match="control flow depends on the values.*run by eager Pyro"
    ):
        loss.loss(model, guide, X + 1.0)
    assert loss.loss(model, guide, -X - 1.0) == pytest.approx(expected(-X - 1.0), abs=1e-6)


def test_what_the_model_closes_over_may_be_rebound() -> None:
    scale = 1.0

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    guide, loss = set_up(model, X), ReverseKL(1)
    guide.scales.loc = torch.tensor(1e-9)
    first = loss.loss(model, guide, X)
    scale = math.e
    assert loss.loss(model, guide, X) - first == pytest.approx(1.0, abs=1e-6)


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "4"])
def test_bad_num_particles_is_refused(bad) -> None:
    with pytest.raises((TypeError, ValueError), match="num_particles must be"):
        ReverseKL(bad)


def test_unknown_entropy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="closed_form, stl, .*Did you mean 'monte_carlo'"):
        ReverseKL(entropy="montecarlo")


def test_bad_data_are_refused_at_the_first_step() -> None:
    svi = SVI(conjugate, AutoMeanField(conjugate), pyro.optim.Adam({"lr": 0.01}), loss=ReverseKL())
    with pytest.raises(ModelError, match="'x' .*1 NaN"):
        svi.step(torch.tensor([0.0, float("nan")]))


def test_objective_can_be_pickled_and_copied_after_use() -> None:
    loss = ReverseKL(2)
    guide = set_up(conjugate, X)
    loss.loss(conjugate, guide, X)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert other.num_particles == 2
        assert math.isfinite(other.loss(conjugate, guide, X))


def test_hooks_on_parameters_run_and_frozen_ones_stay() -> None:
    guide = set_up(conjugate, X)
    seen = []
    guide.get_parameter("loc_unconstrained").register_hook(seen.append)
    guide.get_parameter("scale_unconstrained").requires_grad_(False)
    ReverseKL(2).loss_and_grads(conjugate, guide, X)
    assert torch.equal(seen[0], guide.get_parameter("loc_unconstrained").grad)
    assert guide.get_parameter("scale_unconstrained").grad is None


def test_gradients_add_up_until_they_are_zeroed() -> None:
    guide = set_up(conjugate, X)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        ReverseKL(2).loss_and_grads(conjugate, guide, X)
        found.append(guide.get_parameter("loc_unconstrained").grad.clone())
    torch.testing.assert_close(found[1], 2.0 * found[0])
