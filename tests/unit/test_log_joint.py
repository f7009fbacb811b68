"""LogJoint: inputs that may change, and everything that can be wrong at the door."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.capture import _Runner
from pyro_mf.density.program import Program
from pyro_mf.guides import AutoMeanField


def normal_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def closed_form(x: Tensor, z: Tensor) -> Tensor:
    normal = torch.distributions.Normal
    return normal(0.0, 1.0).log_prob(z[:, 0]) + normal(z, 1.0).log_prob(x).sum(-1)


X = [0.5, -1.0, 2.0]


def test_value_and_gradient_equal_the_closed_form() -> None:
    x, z = torch.tensor(X), torch.randn(5, 1)
    value, gradient = LogJoint(normal_model, (x,)).value_and_grad(z)
    torch.testing.assert_close(value, closed_form(x, z))
    torch.testing.assert_close(gradient, -z + (x - z).sum(-1, keepdim=True))


def test_call_is_differentiable_and_keeps_batch_dimensions() -> None:
    x = torch.tensor(X)
    z = torch.randn(2, 4, 1, requires_grad=True)
    log_joint = LogJoint(normal_model, (x,))
    out = log_joint(z)
    assert out.shape == (2, 4)
    (3.0 * out).sum().backward()
    expected = 3.0 * (-z + (x - z).sum(-1, keepdim=True))
    torch.testing.assert_close(z.grad, expected.detach())
    assert log_joint(torch.zeros(1)).shape == ()


def test_float32_is_kept() -> None:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        log_joint = LogJoint(normal_model, (torch.tensor(X),))
        z = log_joint.initial_points(2, seed=1)
        assert z.dtype == torch.float32
        assert log_joint(z).dtype == torch.float32
        assert log_joint.mode == "vmap"
    finally:
        torch.set_default_dtype(previous)


def test_parameters_are_inputs_and_get_read_anew() -> None:
    x, z = torch.tensor(X), torch.zeros(1, 1)

    def model(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, width))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    log_joint = LogJoint(model, (x,))
    before = log_joint(z)
    with torch.no_grad():
        pyro.param("width").unconstrained().fill_(2.0)
    after = log_joint(z)
    # At loc = 0 only the prior's normaliser changes: log width goes from 0 to 2.
    torch.testing.assert_close(before - after, torch.tensor([2.0]))


def test_a_parameter_that_was_replaced_in_the_store_is_noticed() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    log_joint = LogJoint(model)
    first = log_joint(torch.zeros(1))
    pyro.get_param_store()["loc"] = torch.tensor(2.0)  # a new leaf tensor
    torch.testing.assert_close(log_joint(torch.zeros(1)), first - 2.0)


def test_planned_calls_compile_at_once_where_they_pay_for_it(monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(_Runner, "_compile", lambda self, tensors: compiled.append(self))
    z = torch.zeros(1, 1)
    for planned, expected in ((0, False), (10, False), (10**9, True)):
        log_joint = LogJoint(normal_model, (torch.tensor(X),))
        log_joint.plan(planned)
        for _ in range(5):
            log_joint.value_and_grad(z)
        assert bool(compiled) == expected


def test_frozen_graph_serves_only_the_arguments_it_was_made_for() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0 if x.sum() > 0 else 9.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor(X)
    log_joint = LogJoint(model, (x,), backend="graph")
    assert log_joint.mode == "vmap"
    program = log_joint.program
    assert program.matches((x,), {})
    assert not program.matches((-x,), {})
    x += 1.0  # the same tensor, other values
    assert not program.matches((x,), {})


def test_rebinding_what_the_model_closes_over_makes_a_new_capture() -> None:
    scale = torch.tensor(1.0)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.tensor(X)
    program = Program(model, (x,), {})
    assert program.matches((x,), {})
    scale.fill_(2.0)
    assert not program.matches((x,), {})
    program = Program(model, (x,), {})
    scale = torch.tensor(2.0)
    assert not program.matches((x,), {})


def test_structure_that_differs_between_calls_is_refused() -> None:
    calls = []

    def model(x: Tensor) -> None:
        calls.append(1)
        pyro.sample("a" if len(calls) == 1 else "b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ModelError, match="latent site 'b', which its first execution did not"):
        LogJoint(model, (torch.tensor(0.0),))(torch.zeros(1, 1))


def test_initial_points_are_finite_and_reproducible() -> None:
    def model() -> None:
        # Half of the box has a negative argument of the square root: NaN there.
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("root", z.sqrt())

    log_joint = LogJoint(model)
    z = log_joint.initial_points(8, seed=3)
    assert z.shape == (8, 1)
    assert torch.isfinite(log_joint(z)).all()
    assert torch.equal(z, log_joint.initial_points(8, seed=3))


def test_initial_points_give_up_with_a_reason() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-torch.inf))

    with pytest.raises(ModelError, match="0 of 1 starting points"):
        LogJoint(model).initial_points(1, seed=0)


# -- bad input ----------------------------------------------------------------------------------


def no_latents(x: Tensor) -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def poisson_latent() -> None:
    pyro.sample("count", dist.Poisson(3.0))


def wishart_latent() -> None:
    pyro.sample("cov", dist.Wishart(torch.tensor(4.0), covariance_matrix=torch.eye(2)))


def bernoulli_data(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def subsampled(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as i:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[i])


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


NAN, INF = float("nan"), float("inf")

BAD: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "no latent site": (no_latents, (0.0,), "the model has no latent site"),
    "unbounded discrete latent": (poisson_latent, (), "'count' .*Poisson.* discrete.*unbounded"),
    "support without bijection": (wishart_latent, (), "'cov' .*no bijection"),
    "NaN in the data": (normal_model, ([0.0, NAN],), "'x' .*hold 1 NaN and 0 infinite"),
    "infinity in the data": (normal_model, ([0.0, INF],), "'x' .*0 NaN and 1 infinite"),
    "NaN in a covariate": (regression, ([NAN, 1.0], [0.0, 1.0]), "argument 0 holds 1 NaN"),
    "data outside the support": (bernoulli_data, ([0.0, 2.0],), "'y' .*cannot score its data"),
    "too few arguments": (regression, ([0.0],), "do not fit the model: missing a required"),
    "too many arguments": (normal_model, ([0.0], [1.0]), "do not fit the model: too many"),
    "subsampled plate": (subsampled, ([0.0, 1.0, 2.0],), "subsamples plate 'data'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_at_the_door(name: str) -> None:
    model, args, match = BAD[name]
    with pytest.raises(ModelError, match=match):
        LogJoint(model, tuple(torch.tensor(a) for a in args))


def test_masked_missing_values_are_fine() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.nan_to_num())

    z = torch.randn(2, 1)
    log_joint = LogJoint(model, (torch.tensor([0.5, NAN]),))
    torch.testing.assert_close(log_joint(z), closed_form(torch.tensor([0.5]), z))


def test_wrong_shape_of_z_is_refused() -> None:
    log_joint = LogJoint(normal_model, (torch.tensor(X),))
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 1\).*'loc'.*got shape \(2,\)"):
        log_joint(torch.zeros(2))


def test_arguments_that_are_not_a_tuple_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model_args must be a tuple.*got Tensor.*write \(x,\)"):
        LogJoint(normal_model, torch.tensor(X))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, graph"):
        LogJoint(normal_model, (torch.tensor(X),), backend="jit")  # type: ignore[arg-type]


def test_numpy_arguments_count_by_value() -> None:
    def model(x: np.ndarray) -> None:
        normal_model(torch.as_tensor(x))

    x = np.array(X)
    program = Program(model, (x,), {})
    assert program.matches((x.copy(),), {})
    x[0] = 9.0
    assert not program.matches((x,), {})


# -- evaluate -----------------------------------------------------------------------------------


def test_evaluate_gives_pointwise_likelihood_and_deterministics() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.deterministic("log_rate", rate.log())
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x, z = torch.tensor([1.0, 3.0]), torch.randn(4, 1)
    out = LogJoint(model, (x,)).evaluate(z)
    rate = z.exp()
    torch.testing.assert_close(out.latents["rate"], rate[:, 0])
    torch.testing.assert_close(out.deterministics["log_rate"], z[:, 0])
    poisson = torch.distributions.Poisson(rate).log_prob(x)
    torch.testing.assert_close(out.log_likelihood["x"], poisson)
    prior = torch.distributions.Gamma(2.0, 1.0).log_prob(rate[:, 0])
    torch.testing.assert_close(out.log_prior, prior)
    torch.testing.assert_close(out.log_abs_det, z[:, 0])
    assert [p.name for p in out.plates["x"]] == ["data"]
    assert torch.equal(out.observed["x"], x)


def test_evaluate_sums_out_discrete_latents_pointwise() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(3.0 * z, 1.0), obs=x)

    x, z = torch.tensor([0.0, 3.0, 1.0]), torch.randn(4, 1)
    out = LogJoint(model, (x,)).evaluate(z)
    p = z.sigmoid()
    density = torch.distributions.Normal
    each = torch.logsumexp(
        torch.stack(
            [(1 - p).log() + density(0.0, 1.0).log_prob(x), p.log() + density(3.0, 1.0).log_prob(x)]
        ),
        0,
    )
    torch.testing.assert_close(out.log_likelihood["x"], each)


def test_support_that_depends_on_another_latent_is_refused() -> None:
    def model() -> None:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(torch.tensor(0.0), width))

    with pytest.raises(ModelError, match="support of latent site 'z' depends on other latent"):
        LogJoint(model)


def test_bounds_that_come_with_the_minibatch_are_refused() -> None:
    def model(upper: Tensor) -> None:
        with pyro.plate("data", 10, subsample_size=2) as index:
            pyro.sample("z", dist.Uniform(torch.zeros(2), upper[index]))

    with pytest.raises(ModelError, match="'z' .*bounds that come with the minibatch"):
        Program(model, (torch.ones(10),), {})


def test_bounds_that_come_with_the_data_are_fine() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.Uniform(torch.tensor(0.0), x.max()))
        pyro.sample("x", dist.Normal(0.0, scale).expand(x.shape).to_event(1), obs=x)

    x = torch.tensor(X)
    log_joint = LogJoint(model, (x,))
    assert float(log_joint.constrain(torch.zeros(1))["scale"]) == pytest.approx(1.0)
    assert log_joint.mode == "vmap"


@pytest.mark.parametrize("is_event", [False, True])
def test_a_mixture_has_the_support_of_its_components(is_event) -> None:
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3, 2)),
        dist.LogNormal(torch.tensor([-2.0, 2.0]).expand(3, 2), 0.5),
    )

    def model():
        if is_event:
            pyro.sample("x", mixture.to_event(1))
        else:
            with pyro.plate("row", 3):
                pyro.sample("x", mixture)

    z = torch.randn(5, 3)
    expected = (mixture.log_prob(z.exp()) + z).sum(-1)
    assert torch.allclose(LogJoint(model)(z), expected)
    assert bool((AutoMeanField(model)()["x"] > 0).all())


def test_a_plate_that_a_loop_visits_in_part_is_refused():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x), subsample_size=2):
            pyro.sample(f"x{i}", dist.Normal(loc, 1.0), obs=x[i])

    with pytest.raises(ModelError, match="subsamples plate 'data'"):
        LogJoint(model, (torch.ones(3),))
