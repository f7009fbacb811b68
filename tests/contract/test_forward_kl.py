"""ForwardKL in stock SVI: its estimators, what it keeps and saves, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

from pyro_mf._errors import (
    CheckpointError,
    DifferentDataWarning,
    EstimatorWarning,
    GuideMismatchError,
    ModelError,
    NonFiniteError,
)
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ForwardKL

X = torch.tensor([0.5, -1.0, 2.0, 1.2], dtype=torch.float64)
CHAINS = ["hmc", "imh", "msc", "snis", "smc"]
COVARIANCE = [[1.0, 0.8], [0.8, 2.0]]


def conjugate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def correlated() -> None:
    mean = torch.tensor([1.0, -2.0])
    pyro.sample("z", dist.MultivariateNormal(mean, torch.tensor(COVARIANCE)))


def train(model: Any, guide: Any, loss: ForwardKL, steps: int, *args: Any, lr: float = 0.03) -> Any:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), loss=loss)
    return [svi.step(*args) for _ in range(steps)]


def averaged(
    model: Any, loss: ForwardKL, *args: Any, steps: int, last: int, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Locations and scales of a fitted guide, averaged over the last steps."""
    guide = AutoMeanField(model, **kwargs)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    locs, scales = [], []
    for step in range(steps):
        svi.step(*args)
        if step >= steps - last:
            locs.append(guide.loc.detach().clone())
            scales.append(guide.scale.detach().clone())
    return torch.stack(locs).mean(0), torch.stack(scales).mean(0)


# -- optima ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "steps", "tolerance"),
    [("hmc", 250, 0.07), pytest.param("imh", 500, 0.12, marks=pytest.mark.slow)],
)
def test_gaussian_target_gets_its_marginal_sds(estimator, steps, tolerance) -> None:
    loss = ForwardKL(64, estimator=estimator)
    loc, scale = averaged(correlated, loss, steps=steps, last=steps // 2, init_scale=1.0)
    sds = torch.tensor(COVARIANCE).diagonal().sqrt()
    # 64 chains over `last` steps; the tolerance is 4 errors of the slower mixing chain, about, and
    # the conditional sds, where reverse KL ends, are 18 % away.
    assert bool(((loc - torch.tensor([1.0, -2.0])).abs() < tolerance * sds).all())
    assert bool(((scale / sds).log().abs() < tolerance).all())
    conditional = torch.linalg.inv(torch.tensor(COVARIANCE)).diagonal().rsqrt()
    assert float((conditional / sds).log().abs().min()) > tolerance + 0.05


def skewed() -> None:
    z = pyro.sample("z", dist.Normal(0.5, 2.0))
    pyro.factor("skew", torch.special.log_ndtr(5.0 * (z - 0.5) / 2.0))


# Without a heavy-tailed share of proposals "imh" and "msc" fill the right tail in thousands of
# steps only: q is narrower than the target there, so that the weights are unbounded.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "count", "defensive", "mean", "sd"),
    [
        ("hmc", 32, 0.0, 2.0648, 1.2456),
        ("imh", 32, 0.1, 2.0648, 1.2456),
        ("msc", 10, 0.1, 2.0648, 1.2456),
        ("snis", 10, 0.0, 2.053, 1.199),
        ("snis", 2, 0.0, 2.041, 1.084),
    ],
)
@pytest.mark.filterwarnings("ignore::pyro_mf._errors.EstimatorWarning")
def test_skew_normal_of_markovian_score_climbing(estimator, count, defensive, mean, sd) -> None:
    loss = ForwardKL(count, estimator=estimator, defensive=defensive)
    guide = AutoMeanField(skewed, init_scale=1.0)
    svi = SVI(skewed, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    locs, scales = [], []
    for step in range(5000):
        svi.step()
        if step >= 1000:
            locs.append(float(guide.loc.detach()))
            scales.append(float(guide.scale.detach()))
    # 4000 steps of independent draws know mean and sd to 0.003 at 32 of them, to 0.014 at 2; z = 3,
    # and a factor of 2 for chains that remember.
    error = 0.02 if count == 32 else 0.04
    assert np.mean(locs) == pytest.approx(mean, abs=error)
    assert np.mean(scales) == pytest.approx(sd, abs=error)


def test_smc_covers_both_modes() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        modes = torch.stack([dist.Normal(m, 0.5).log_prob(z) for m in (-2.0, 2.0)])
        pyro.factor("modes", torch.logsumexp(modes, 0) - dist.Normal(0.0, 3.0).log_prob(z))

    loc, scale = averaged(model, ForwardKL(64, estimator="smc"), steps=120, last=80, init_scale=2.0)
    # N(0, 4.25): four thousand particles and more, modes in runs' shares.
    assert abs(float(loc)) < 0.3
    assert float(scale) == pytest.approx(math.sqrt(4.25), abs=0.1)


def test_wake_theta_maximises_the_evidence() -> None:
    def model(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, width))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = 3.0 * torch.randn(40)
    loss = ForwardKL(32)
    values = train(model, AutoMeanField(model, init_scale=1.0), loss, 150, x, lr=0.1)
    best = float((x.square().mean() - 1.0).sqrt())  # maximum likelihood: var x = width^2 + 1
    assert float(pyro.param("width").detach()) == pytest.approx(best, rel=0.05)
    assert all(isinstance(v, float) for v in values)


class Encoder(PyroModule):
    """An amortised guide whose exact answer it can represent."""

    def __init__(self, *, takes_observations: bool) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.0))
        self.log_scale = torch.nn.Parameter(torch.tensor(0.0))
        self.forward = self.given if takes_observations else self.called

    def called(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))

    def given(self, x: Tensor, observations: Any = None) -> None:
        x = x if observations is None else observations["x"]
        self.called(x)


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("takes_observations", [False, True])
def test_prior_fits_the_posterior_map_of_an_amortised_guide(takes_observations) -> None:
    guide = Encoder(takes_observations=takes_observations)
    model = local if not takes_observations else lambda x: local(x * 1.0)  # no argument as it is
    loss = ForwardKL(8, estimator="prior")
    far = torch.full((16,), 50.0)  # the data that are given do not matter, but for their shape
    train(model, guide, loss, 100, far, lr=0.05)
    # z | x ~ N(0.8 x, 0.2); 8 * 16 simulations a step: errors of about 0.01; z = 5.
    assert float(guide.slope.detach()) == pytest.approx(0.8, abs=0.05)
    assert float(guide.log_scale.detach().exp()) == pytest.approx(math.sqrt(0.2), abs=0.05)
    assert loss.diagnostics.num_evaluations == 100 * 8


def test_amortised_guide_learns_from_chains_too() -> None:
    guide = Encoder(takes_observations=False)
    loss = ForwardKL(8)
    x = 1.5 * torch.randn(60)
    train(local, guide, loss, 80, x, lr=0.1)
    assert loss.diagnostics.estimator == "hmc"
    assert float(guide.slope.detach()) == pytest.approx(0.8, abs=0.08)
    assert float(guide.log_scale.detach().exp()) == pytest.approx(math.sqrt(0.2), abs=0.06)


# -- in SVI and as a module -----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", CHAINS)
def test_step_returns_a_float_and_leaves_no_gradient(estimator) -> None:
    guide, loss = AutoMeanField(conjugate), ForwardKL(16, estimator=estimator)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    assert isinstance(svi.step(X), float)
    assert isinstance(svi.evaluate_loss(X), float)
    assert all(p.grad is None or not p.grad.any() for p in guide.parameters())
    assert loss.estimator == estimator
    found = loss.diagnostics
    assert found.estimator == estimator
    assert found.reason == "asked for"
    assert found.num_evaluations > 0
    assert (found.num_gradients > 0) == (estimator in {"hmc", "smc"})


def test_evaluating_the_loss_does_not_move_the_chains() -> None:
    guide, loss = AutoMeanField(conjugate), ForwardKL(8)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    svi.step(X)
    before = loss.diagnostics.num_gradients
    assert svi.evaluate_loss(X) == svi.evaluate_loss(X)
    assert loss.diagnostics.num_gradients == before


def test_module_form_has_the_gradients_of_svi() -> None:
    guide = AutoMeanField(conjugate).setup(X)
    pyro.set_rng_seed(5)
    loss = ForwardKL(8)(conjugate, guide)(X)
    loss.backward()
    from_module = [p.grad.clone() for p in guide.parameters()]
    for p in guide.parameters():
        p.grad = None
    pyro.set_rng_seed(5)
    value = ForwardKL(8).loss_and_grads(conjugate, guide, X)
    assert value == pytest.approx(float(loss.detach()))
    for a, p in zip(from_module, guide.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_same_seed_gives_the_same_bits_and_other_draws_do_not_matter() -> None:
    def run(noise: bool) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        svi = SVI(
            conjugate, AutoMeanField(conjugate), pyro.optim.Adam({"lr": 0.05}), loss=ForwardKL(8)
        )
        losses = []
        for _ in range(5):
            losses.append(svi.step(X))
            if noise:
                torch.randn(3)
        return losses

    assert run(False) == run(True)


def test_float32_models_work() -> None:
    x = X.float()

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), x.new_ones(())))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, x.new_ones(())), obs=x)

    guide = AutoMeanField(model)
    train(model, guide, ForwardKL(8), 5, x)
    assert guide.loc.dtype == torch.float32


# -- chains are kept, saved and keyed -------------------------------------------------------------


def resumed(estimator: str, way: str) -> tuple[list[float], list[float]]:
    """Losses of eight steps in one go, and of the last four after a restart."""

    def start() -> tuple[AutoMeanField, SVI, ForwardKL]:
        pyro.clear_param_store()
        guide, loss = AutoMeanField(conjugate).setup(X), ForwardKL(16, estimator=estimator)
        return guide, SVI(conjugate, guide, pyro.optim.SGD({"lr": 0.01}), loss=loss), loss

    pyro.set_rng_seed(1)
    _, svi, _ = start()
    whole = [svi.step(X) for _ in range(8)]
    pyro.set_rng_seed(1)
    guide, svi, loss = start()
    for _ in range(4):
        svi.step(X)
    saved = {k: v.clone() for k, v in guide.state_dict().items()}
    if way == "state_dict":
        buffer = io.BytesIO()
        torch.save(loss.state_dict(), buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        guide, svi, loss = start()
        loss.load_state_dict(state)
    else:
        copied = pickle.loads(pickle.dumps(loss)) if way == "pickle" else copy.deepcopy(loss)
        guide, svi, _ = start()
        svi = SVI(conjugate, guide, pyro.optim.SGD({"lr": 0.01}), loss=copied)
    guide.load_state_dict(saved)
    torch.randn(100)
    return whole[4:], [svi.step(X) for _ in range(4)]


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("estimator", CHAINS)
def test_training_goes_on_to_the_bit(estimator, way) -> None:
    if way != "state_dict" and estimator not in {"hmc", "imh"}:
        pytest.skip("copies go through state_dict")
    whole, rest = resumed(estimator, way)
    assert whole == rest


def test_loaded_chains_of_other_data_are_not_used() -> None:
    loss = ForwardKL(8, estimator="imh")
    train(conjugate, AutoMeanField(conjugate), loss, 3, X)
    other = ForwardKL(8, estimator="imh")
    other.load_state_dict(loss.state_dict())
    other.loss(conjugate, AutoMeanField(conjugate), X + 1.0)
    assert other.diagnostics.num_steps == 1
    assert len(other._saved) == 1  # they wait for their own data


def test_loaded_chains_of_another_density_are_not_used() -> None:
    def wider(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 2.0), obs=x)

    loss = ForwardKL(8, estimator="imh")
    train(conjugate, AutoMeanField(conjugate), loss, 3, X)
    other = ForwardKL(8, estimator="imh")
    other.load_state_dict(loss.state_dict())
    with pytest.warns(DifferentDataWarning, match="another density"):
        other.loss(wider, AutoMeanField(wider), X)
    assert other.diagnostics.num_steps == 1


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"expected what ForwardKL\.state_dict"):
        ForwardKL().load_state_dict({"loc": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="are 8 at a time.*num_particles=16"):
        ForwardKL(16).load_state_dict(ForwardKL(8).state_dict())


def test_each_set_of_data_has_chains_of_its_own() -> None:
    loss, guide = ForwardKL(8, estimator="imh"), AutoMeanField(conjugate, init_scale=1.0)
    loss.differentiable_loss(conjugate, guide, X)
    loss.differentiable_loss(conjugate, guide, X + 1.0)
    assert len(loss._pairs) == 2
    for _ in range(3):
        loss.differentiable_loss(conjugate, guide, X.clone())  # the same numbers
    assert len(loss._pairs) == 2
    assert loss.diagnostics.num_steps == 4
    x = X.clone()
    loss.differentiable_loss(conjugate, guide, x)
    x += 2.0  # in place
    loss.differentiable_loss(conjugate, guide, x)
    assert len(loss._pairs) == 3
    assert loss.diagnostics.num_steps == 1


def test_chains_stay_with_their_numbers_when_tensors_change_in_place() -> None:
    loss, guide = ForwardKL(8, estimator="hmc"), AutoMeanField(conjugate, init_scale=1.0)
    x = X.clone()
    loss.differentiable_loss(conjugate, guide, x)
    x += 100.0
    for _ in range(5):  # the first chains again, whose tensor holds other numbers now
        loss.differentiable_loss(conjugate, guide, X.clone())
    z, _ = loss._pairs[-1]._estimator.draws
    assert len(loss._pairs) == 1
    assert float(z.abs().max()) < 10.0


def test_chains_are_used_again_after_a_call_inside_handlers() -> None:
    loss, guide = ForwardKL(8), AutoMeanField(conjugate, init_scale=1.0)
    used = []
    for is_inside in (False, True, False, True):
        with poutine.scale(scale=2.0) if is_inside else nullcontext():
            loss.loss(conjugate, guide, X)
        used.append(loss.diagnostics.estimator)
    assert used == ["hmc", "snis", "hmc", "snis"]
    assert len(loss._pairs) == 2


def test_a_rebound_closure_variable_starts_new_chains() -> None:
    width = 1.0

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, width))

    loss, guide = ForwardKL(8), AutoMeanField(model)
    loss.loss(model, guide)
    width = 10.0
    loss.loss(model, guide)
    assert len(loss._pairs) == 2


def test_data_that_change_at_every_step_are_warned_of() -> None:
    loss, guide = ForwardKL(4, estimator="imh"), AutoMeanField(conjugate, init_scale=1.0)
    for step in range(2):
        loss.loss(conjugate, guide, X + step)
    with pytest.warns(EstimatorWarning, match="data changed at 3 of 3 steps"):
        loss.loss(conjugate, guide, X + 99.0)


def test_new_guides_and_models_get_new_chains() -> None:
    loss = ForwardKL(4, estimator="imh")
    for guide in (AutoMeanField(conjugate), AutoMeanField(conjugate)):
        loss.loss(conjugate, guide, X)
    assert len(loss._pairs) == 2


# -- the choice of an estimator -------------------------------------------------------------------


def no_gradient(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with torch.no_grad():
        likelihood = -0.5 * (x - loc).square().sum()
    pyro.factor("likelihood", likelihood)


def test_default_is_hmc_and_says_why() -> None:
    loss = ForwardKL(8)
    loss.loss(conjugate, AutoMeanField(conjugate), X)
    assert loss.estimator is None
    assert loss.diagnostics.estimator == "hmc"
    assert "has a gradient" in loss.diagnostics.reason


def test_model_whose_gradient_is_hidden_gets_proposals_of_the_guide() -> None:
    loss = ForwardKL(8)
    loss.loss(no_gradient, AutoMeanField(no_gradient), X)
    assert loss.diagnostics.estimator == "imh"
    assert "contradicts its values" in loss.diagnostics.reason
    with pytest.raises(ModelError, match="follows the gradient.*estimator='imh'"):
        ForwardKL(8, estimator="hmc").loss(no_gradient, AutoMeanField(no_gradient), X)


def test_discrete_latents_are_summed_out_where_the_guide_leaves_them_out() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)

    loss = ForwardKL(8)
    loss.loss(model, AutoMeanField(model), X)
    assert loss.diagnostics.estimator == "hmc"


def test_latent_with_infinite_support_is_left_to_importance_sampling() -> None:
    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("k", dist.Poisson(rate))

    x = torch.tensor(2.0)
    loss = ForwardKL(25)
    train(model, guide, loss, 30, x, lr=0.05)
    assert "'k' is discrete and cannot be summed out" in loss.diagnostics.reason
    k = torch.arange(40.0, dtype=torch.float64)
    posterior = torch.softmax(dist.Poisson(3.0).log_prob(k) + dist.Normal(k, 1.0).log_prob(x), 0)
    # The optimum of a Poisson is the posterior mean, 0.8 below the start; Adam's noise is 0.1.
    assert float(pyro.param("rate").detach()) == pytest.approx(
        float((posterior * k).sum()), abs=0.3
    )


def subsampled(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])


@pytest.mark.parametrize("estimator", [None, "snis"])
def test_global_latents_of_a_minibatch_are_refused_with_the_reason(estimator) -> None:
    with pytest.raises(ModelError, match=r"subsamples plate 'data'.*\['loc'\] is not.*ReverseKL"):
        ForwardKL(4, estimator=estimator).loss(subsampled, AutoMeanField(subsampled), X)


@pytest.mark.parametrize("estimator", ["hmc", "imh", "msc", "smc"])
def test_chains_on_minibatches_are_refused(estimator) -> None:
    with pytest.raises(ModelError, match=f"'{estimator}' needs.*subsamples plate 'data'"):
        ForwardKL(4, estimator=estimator).loss(subsampled, AutoMeanField(subsampled), X)


@pytest.mark.slow
def test_minibatches_of_local_latents_reach_the_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    loss = ForwardKL(6)
    loc, scale = averaged(model, loss, X, steps=140, last=70, init_scale=0.7)
    assert "subsamples plate 'data'" in loss.diagnostics.reason
    # 70 steps of 6 draws, each element in half of them, and Adam's own noise: errors of 0.08.
    assert float((loc - X / 2).abs().max()) < 0.3
    assert float((scale / math.sqrt(0.5)).log().abs().max()) < 0.3


def test_chains_inside_effect_handlers_are_refused() -> None:
    guide = AutoMeanField(conjugate)
    with poutine.scale(scale=0.5), pytest.raises(ModelError, match="inside effect handlers"):
        ForwardKL(4, estimator="hmc").loss(conjugate, guide, X)


# -- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [AutoNormal, AutoDiagonalNormal])
def test_guides_that_cannot_score_given_values_are_refused(stock) -> None:
    with pytest.raises(ModelError, match=r"'loc' is a point \(Delta\).*AutoMeanField"):
        ForwardKL(4).loss(conjugate, stock(conjugate), X)


def test_guides_with_other_sites_are_refused() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    def auxiliary(x: Tensor) -> None:
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("loc", dist.Normal(noise, 1.0))

    def wide(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    for bad in (guide, auxiliary):
        with pytest.raises(GuideMismatchError, match="under its own name"):
            ForwardKL(4).loss(conjugate, bad, X)
    with pytest.raises(GuideMismatchError, match=r"shape \(\) in the model and \(3,\)"):
        ForwardKL(4).loss(conjugate, wide, X)
    with pytest.raises(GuideMismatchError, match="another model|latent sites"):
        ForwardKL(4).loss(conjugate, AutoMeanField(correlated).setup(), X)


def brittle(x: Tensor, edge: Tensor, beyond: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("culprit", torch.where(loc > edge, loc, beyond))


@pytest.mark.parametrize("estimator", CHAINS)
def test_density_that_is_nowhere_finite_is_an_error(estimator) -> None:
    guide = AutoMeanField(brittle)
    nowhere = (torch.tensor(math.inf), torch.tensor(math.nan))
    with pytest.raises((NonFiniteError, ModelError)):
        ForwardKL(8, estimator=estimator).loss(brittle, guide, X, *nowhere)


# The gradients of a density that is cut off do not average to zero, as smc notes.
@pytest.mark.filterwarnings("ignore:the particles of estimator='smc'")
@pytest.mark.parametrize("estimator", CHAINS)
def test_draws_without_density_are_never_used(estimator) -> None:
    guide = AutoMeanField(brittle, init_scale=1.0)
    loss = ForwardKL(16, estimator=estimator)
    svi = SVI(brittle, guide, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    # Draws from the prior run the model itself, whose validation stops at NaN.
    beyond = torch.tensor(-math.inf if estimator == "smc" else math.nan)
    for _ in range(20):
        assert math.isfinite(svi.step(X, torch.tensor(-0.5), beyond))
    z, weights = loss._pairs[0]._estimator.draws
    assert bool((z[weights > 0] > -0.5).all())


def test_log_q_that_is_not_finite_keeps_the_parameters() -> None:
    def guide(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(0.1))
        base = dist.Uniform(-width, width, validate_args=False)
        pyro.sample("loc", base)

    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.1}), loss=ForwardKL(8))
    with pytest.raises(NonFiniteError, match="log q is not finite at .* draws from the posterior"):
        svi.step(X)
    assert float(pyro.param("width").detach()) == pytest.approx(0.1)


def test_chains_that_never_move_are_warned_of() -> None:
    guide = AutoMeanField(conjugate, init_loc_fn=lambda _: torch.tensor(50.0), init_scale=0.01)
    loss = ForwardKL(8, estimator="imh")
    for _ in range(199):
        loss.differentiable_loss(conjugate, guide, X)
    with pytest.warns(EstimatorWarning, match=r"only [0-9.]+% of the proposals.*estimator='hmc'"):
        loss.differentiable_loss(conjugate, guide, X)
    loss.differentiable_loss(conjugate, guide, X)  # once


def test_chains_in_two_modes_are_warned_of(monkeypatch) -> None:
    monkeypatch.setattr("pyro_mf.objectives.forward_report._LOOKS", {20})
    monkeypatch.setattr("pyro_mf.objectives.forward_samplers._WARM_UP", 50)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        modes = torch.stack([dist.Normal(m, 0.7).log_prob(z) for m in (-7.0, 7.0)])
        pyro.factor("modes", torch.logsumexp(modes, 0))

    guide = AutoMeanField(model, init_scale=7.0)
    loss = ForwardKL(8, estimator="hmc")
    with pytest.warns(EstimatorWarning, match="do not agree: R-hat is .*several modes"):
        train(model, guide, loss, 20)
    assert loss.diagnostics.rhat > 1.2


def test_uneven_weights_are_warned_of(monkeypatch) -> None:
    monkeypatch.setattr("pyro_mf.objectives.forward_report._LOOKS", {60})

    def model() -> None:
        size = 12
        covariance = 0.1 * torch.eye(size) + 0.9 * torch.ones(size, size)
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(size), covariance))

    loss = ForwardKL(10, estimator="snis")
    with pytest.warns(EstimatorWarning, match="weights of estimator='snis' are too uneven"):
        train(model, AutoMeanField(model, init_scale=1.0), loss, 60, lr=0.01)
    assert loss.diagnostics.khat > 0.5


def test_smc_with_learnable_parameters_is_refused() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    with pytest.raises(ModelError, match="'smc' draws from the posterior once"):
        ForwardKL(8, estimator="smc").loss(model, AutoMeanField(model), X)


# -- the sleep phase ------------------------------------------------------------------------------


def refused_prior(model: Any, match: str, guide: Any = None, *args: Any) -> None:
    guide = guide or Encoder(takes_observations=False)
    with pytest.raises(ModelError, match=match):
        ForwardKL(2, estimator="prior").loss(model, guide, *(args or (X,)))


def test_prior_refuses_guides_and_models_that_it_would_be_wrong_for() -> None:
    refused_prior(local, "fitted to the prior", AutoMeanField(local))
    refused_prior(lambda x: local(x * 2.0), "not one of the arguments as it is.*'observations'")

    def with_factor(x: Tensor) -> None:
        local(x)
        pyro.factor("extra", torch.tensor(0.0))

    refused_prior(with_factor, "'extra' is a pyro.factor")

    def learnable(x: Tensor) -> None:
        pyro.param("unused", torch.tensor(1.0))
        local(x)

    refused_prior(learnable, r"learns nothing about the model's parameters \['unused'\]")
    ForwardKL(2, estimator="prior").loss(
        poutine.block(learnable, hide_types=["param"]), Encoder(takes_observations=False), X
    )

    def reads_data(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    refused_prior(reads_data, "'z' depends on the data that are given")

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    refused_prior(masked, "'x' is masked")
    refused_prior(poutine.scale(local, 0.5), "is under poutine.scale")

    def improper(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            support = constraints.real
            z = pyro.sample("z", dist.ImproperUniform(support, (), ()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    refused_prior(improper, "cannot be sampled.*proper prior")


def test_observations_reach_the_guide_as_pyros_own_sleep_phases_hand_them() -> None:
    seen: list[Any] = []

    def model(observations: Any) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=observations["x"])

    def guide(observations: Any) -> None:
        seen.append(observations["x"])
        slope = pyro.param("slope", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(slope * observations["x"], 1.0))

    loss = ForwardKL(3, estimator="prior")
    loss.loss_and_grads(model, guide, observations={"x": torch.tensor(99.0)})
    assert len(seen) == 3
    assert all(abs(float(x)) < 10 for x in seen)
    assert pyro.get_param_store()._params["slope"].grad is not None


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1, -1, 2.5, True, "4"])
def test_bad_num_particles_is_refused(bad) -> None:
    with pytest.raises((TypeError, ValueError), match="num_particles must be"):
        ForwardKL(bad)


def test_unknown_estimator_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"hmc, imh, msc, .*Did you mean 'snis'"):
        ForwardKL(estimator="sniss")


def test_defensive_share_is_checked_and_used() -> None:
    with pytest.raises(ValueError, match="defensive must be a share"):
        ForwardKL(defensive=1.0)
    loss = ForwardKL(8, estimator="imh", defensive=0.2)
    assert math.isfinite(loss.loss(conjugate, AutoMeanField(conjugate), X))


def test_bad_data_are_refused_at_the_first_step() -> None:
    with pytest.raises(ModelError, match="'x' .*1 NaN"):
        ForwardKL(4).loss(conjugate, AutoMeanField(conjugate), torch.tensor([0.0, math.nan]))
