"""What a captured objective could get wrong without a word, and does not."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_mf._errors import CaptureWarning, ImproperWarning, ModelError
from pyro_mf.baselines import run_nuts
from pyro_mf.density import LogJoint
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ReverseKL

X = torch.tensor([0.5, -1.0, 2.0, 1.2], dtype=torch.float64)


def narrow(model: Any, *args: Any) -> AutoMeanField:
    """A guide that hardly varies, so that losses can be compared without noise."""
    guide = AutoMeanField(model)
    guide.setup(*args)
    for site in guide.layout.sites:
        setattr(guide.scales, site.name, torch.tensor(1e-9))
    return guide


def truth(model: Any, guide: Any, *args: Any) -> float:
    """The loss of a new objective that captures nothing."""
    return ReverseKL(1, backend="eager").loss(model, guide, *args)


# -- shapes --------------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


def test_a_column_of_data_against_a_row_of_means_is_refused() -> None:
    assert math.isfinite(float(LogJoint(regression, (X, X))(torch.zeros(1))))
    with pytest.raises(ModelError, match='site "y", invalid log_prob shape.*plate'):
        LogJoint(regression, (X, X[:, None]))


def test_batch_dimensions_that_no_plate_declares_are_refused() -> None:
    def latent() -> None:
        pyro.sample("m", dist.Normal(torch.zeros(3), 1.0))

    def observed(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    for model, args in ((latent, ()), (observed, (X,))):
        with pytest.raises(ModelError, match="invalid log_prob shape"):
            LogJoint(model, args)


# -- gradients that are not parameters' in Pyro's sense ------------------------------------------


def test_gradients_reach_an_argument_and_an_unregistered_module() -> None:
    net = torch.nn.Linear(1, 1)

    def model(h: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(h[:, None]).squeeze(-1) + z, 1.0).to_event(1), obs=X)

    guide = narrow(model, X)
    h = X.clone().requires_grad_(True)
    wanted = (h, *net.parameters())
    with pytest.warns(CaptureWarning, match="require gradients and are not parameters of Pyro"):
        loss = ReverseKL(1).differentiable_loss(model, guide, h)
    got = torch.autograd.grad(loss, wanted)
    stock = torch.autograd.grad(Trace_ELBO().differentiable_loss(model, guide, h), wanted)
    for a, b in zip(got, stock, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        assert float(a.abs().max()) > 1e-3


# -- state that changes --------------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor


def test_an_object_as_argument_may_change() -> None:
    def model(batch: Batch) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(batch.x.shape).to_event(1), obs=batch.x)

    batch = Batch(X)
    guide, loss = narrow(model, batch), ReverseKL(1)
    before = loss.loss(model, guide, batch)
    batch.x = X + 3.0
    after = loss.loss(model, guide, batch)
    assert after > before + 5
    assert after == pytest.approx(truth(model, guide, batch), abs=1e-6)


def test_what_no_key_shows_is_found_by_the_spot_checks(monkeypatch) -> None:
    def model(x: Tensor) -> None:
        offset = float(os.environ.get("PYRO_MF_TEST_OFFSET", "0"))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + offset, 1.0).expand(x.shape).to_event(1), obs=x)

    guide, loss = narrow(model, X), ReverseKL(1)
    loss.loss(model, guide, X)
    monkeypatch.setenv("PYRO_MF_TEST_OFFSET", "5")
    expected = truth(model, guide, X)
    with pytest.warns(CaptureWarning, match="model has changed since its graph was captured"):
        losses = [loss.loss(model, guide, X) for _ in range(4)]
    assert losses[-1] == pytest.approx(expected, abs=1e-6)


def test_a_branch_on_data_through_numpy_follows_the_data() -> None:
    def model(x: Tensor) -> None:
        shift = 5.0 if x.numpy().mean() > 4 else 0.0
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 1.0).expand(x.shape).to_event(1), obs=x)

    guide, loss = narrow(model, X), ReverseKL(1)
    for x in (X, X + 5.0):
        got = loss.loss(model, guide, x)
        assert got == pytest.approx(truth(model, guide, x), abs=1e-6)


def test_a_model_that_changes_itself_is_left_to_pyro() -> None:
    norm = torch.nn.BatchNorm1d(1)
    norm.requires_grad_(False)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = norm(x[:, None]).squeeze(-1) + z
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    guide, loss = AutoMeanField(model), ReverseKL(1)
    with pytest.warns(CaptureWarning, match="changes its own state when it runs"):
        loss.loss(model, guide, X)
    batches = int(norm.num_batches_tracked)
    for _ in range(3):
        loss.loss(model, guide, X)
    # As in Pyro: one run for the plates and one for the estimate.
    assert int(norm.num_batches_tracked) - batches <= 6


def test_indices_drawn_inside_the_model_reach_the_same_elements_of_the_guide() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 40, subsample=torch.randperm(40)[:8]) as index:
            e = pyro.sample("e", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(e, 0.3), obs=x[index])

    x = torch.linspace(-4.0, 4.0, 40)
    guide = AutoMeanField(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=ReverseKL(1))
    with pytest.warns(CaptureWarning, match="draws the indices of its minibatch by itself"):
        svi.step(x)
    for _ in range(300):
        svi.step(x)
    correlation = torch.corrcoef(torch.stack([guide.locs.e.detach(), x]))[0, 1]
    assert float(correlation) > 0.95  # noise of one over the other gives about zero


def test_an_argument_that_always_changes_ends_in_eager_pyro_with_a_warning() -> None:
    def model(x: Tensor, beta: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 + beta).expand(x.shape).to_event(1), obs=x)

    guide, loss = narrow(model, X, 0.0), ReverseKL(1)
    with pytest.warns(CaptureWarning, match="nearly every call would need a new graph"):
        losses = [loss.loss(model, guide, X, 0.1 * i) for i in range(15)]
    for i, value in enumerate(losses):
        assert value == pytest.approx(truth(model, guide, X, 0.1 * i), abs=1e-6)


# -- data that change ----------------------------------------------------------------------------


def counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(rate / (1 + rate)), obs=y)


@pytest.mark.parametrize("bad", [3.0, 0.5, float("nan")])
def test_bad_data_in_a_later_minibatch_are_refused(bad) -> None:
    guide = AutoMeanField(counts)
    svi = SVI(counts, guide, pyro.optim.Adam({"lr": 0.01}), loss=ReverseKL(2))
    svi.step(torch.tensor([1.0, 0.0]))
    before = guide.locs.rate.clone()
    with pytest.raises(ModelError, match="observed site 'y' .*1 values that are NaN or outside"):
        svi.step(torch.tensor([1.0, bad]))
    assert torch.equal(guide.locs.rate, before)


def test_data_outside_the_support_are_seen_behind_to_event() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Bernoulli(p).expand(y.shape).to_event(1), obs=y)

    with pytest.raises(ModelError, match="'y' .*1 values are outside its support"):
        LogJoint(model, (torch.tensor([0.0, 2.0]),))


def test_looking_at_a_distribution_does_not_switch_off_its_checks() -> None:
    shared = dist.Normal(torch.zeros(2), 1.0, validate_args=True).to_event(1)

    def model() -> None:
        pyro.sample("z", shared)

    LogJoint(model)(torch.zeros(2))
    with pytest.raises(ValueError, match="within the support"):
        shared.log_prob(torch.tensor([0.0, float("nan")]))


def categorical(c: Tensor) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(c)):
        pyro.sample("c", dist.Categorical(p), obs=c)


def point_mass() -> None:
    pyro.sample("z", dist.Delta(torch.tensor(1.0)))


def gathers(x: Tensor, index: Tensor) -> None:
    with pyro.plate("data", 4, subsample=index) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


MESSAGES: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "category out of range": (categorical, (torch.tensor([0, 3]),), "'c' .*cannot score its data"),
    "index out of range": (
        gathers,
        (X, torch.tensor([1, 9])),
        "fails .*'z'.*out of (range|bounds)",
    ),
    "data of the wrong length": (regression, (X, X[:3]), "'y' .*shape .*must match"),
    "data as a list": (regression, (X, [1.0, 2.0, 3.0, 4.0]), "'y'.*list"),
    "a latent Delta": (point_mass, (), "'z' is a Delta.*pyro.deterministic"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_errors_are_one_sentence_with_the_site(name) -> None:
    model, args, match = MESSAGES[name]
    with pytest.raises(ModelError, match=match) as caught:
        ReverseKL().loss(model, AutoMeanField(model), *args)
    assert "Trace Shapes" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_loss_can_be_had_in_inference_mode() -> None:
    guide, loss = narrow(counts, torch.ones(2)), ReverseKL(1)
    expected = loss.loss(counts, guide, torch.ones(2))
    with torch.inference_mode():
        assert ReverseKL(1).loss(counts, guide, torch.ones(2)) == pytest.approx(expected, abs=1e-6)


def test_entropy_must_be_a_name_or_an_estimator() -> None:
    with pytest.raises(TypeError, match="closed_form, stl, monte_carlo, or an object.*got None"):
        ReverseKL(entropy=None)  # type: ignore[arg-type]


def test_latents_on_which_nothing_depends_are_pointed_out() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=torch.tensor([1, 0, 1, 1]).bool())

    guide = AutoMeanField(model)
    with pytest.warns(ImproperWarning, match=r"does not depend on 3 .*'x_unobserved\[0\]'"):
        ReverseKL(1).loss(model, guide, X)
    with pytest.raises(ModelError, match=r"does not depend on 3 .*'x_unobserved\[0\]'"):
        run_nuts(model, (X,), num_samples=10, warmup_steps=10)
