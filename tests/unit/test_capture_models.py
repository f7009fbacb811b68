"""Every model that is hard to capture means the same in every tier as in eager Pyro."""

from __future__ import annotations

import warnings

import pytest
import torch

from pyro_mf._errors import CaptureWarning
from pyro_mf.density import LogJoint
from tests.capture_models import CaptureCase, cases

NAMES = sorted(cases())
CAPTURED = [n for n in NAMES if n not in ("control_flow_on_latents", "random_numbers_inside")]


def make(name: str) -> CaptureCase:
    return cases()[name]()


def points(log_joint: LogJoint, num: int = 3) -> torch.Tensor:
    return 0.3 * torch.randn(num, log_joint.size)


@pytest.mark.parametrize("name", CAPTURED)
def test_is_captured_in_the_expected_mode_and_equals_eager(name: str) -> None:
    case = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fall-back
        captured = LogJoint(case.model, case.args, backend="graph")
        assert captured.mode == case.mode
    assert captured.program.function.is_frozen == case.is_frozen
    z = points(captured)
    value, gradient = captured.value_and_grad(z)
    eager = LogJoint(case.model, case.args, backend="eager")
    true_value, true_gradient = eager.value_and_grad(z)
    torch.testing.assert_close(value, true_value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(captured(z), true_value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CAPTURED)
def test_prior_likelihood_and_jacobian_add_up(name: str) -> None:
    case = make(name)
    log_joint = LogJoint(case.model, case.args, backend="graph")
    z = points(log_joint)
    out = log_joint.evaluate(z)
    if name == "enumerated_chain":  # observations share the discrete chain: no pointwise value
        assert out.log_likelihood == {}
        return
    scale = 0.25 if name == "scaled_likelihood" else 1.0  # pointwise values are unscaled
    likelihood = sum(scale * x.reshape(len(z), -1).sum(-1) for x in out.log_likelihood.values())
    total = out.log_prior + likelihood + out.log_abs_det
    torch.testing.assert_close(total, log_joint(z), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CAPTURED)
def test_constrain_and_unconstrain_are_inverse(name: str) -> None:
    case = make(name)
    log_joint = LogJoint(case.model, case.args, backend="eager")
    z = points(log_joint)
    values = log_joint.constrain(z)
    for site in log_joint.layout.sites:
        assert values[site.name].shape == (len(z), *site.shape)
        assert site.support.check(values[site.name]).all()
    torch.testing.assert_close(log_joint.layout.unconstrain(values), z, rtol=1e-6, atol=1e-6)


def test_control_flow_on_latents_falls_back_to_eager_and_says_why() -> None:
    case = make("control_flow_on_latents")
    log_joint = LogJoint(case.model, case.args)
    with pytest.warns(CaptureWarning, match=r"cannot be captured.*after site 'loc'.*control flow"):
        assert log_joint.mode == "eager"
    z = torch.tensor([[0.5], [-0.5]])  # one on each side of the branch
    (y,) = case.args
    loc = torch.tensor([1.0, -0.5])
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0])
    likelihood = torch.distributions.Normal(loc[:, None], 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(log_joint(z), prior + likelihood)


def test_randomness_inside_the_model_falls_back_to_eager_and_says_why() -> None:
    case = make("random_numbers_inside")
    with pytest.warns(CaptureWarning, match="log density is random"):
        assert LogJoint(case.model, case.args).mode == "eager"


@pytest.mark.parametrize("name", ["masked_plate", "registered_module_and_params"])
def test_compiled_equals_eager(name: str) -> None:
    case = make(name)
    compiled = LogJoint(case.model, case.args, backend="compile")
    z = points(compiled)
    for _ in range(2):
        value, gradient = compiled.value_and_grad(z)
    truth = LogJoint(case.model, case.args, backend="eager").value_and_grad(z)
    torch.testing.assert_close(value, truth[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, truth[1], rtol=1e-9, atol=1e-9)


def test_without_a_compiler_the_graph_serves_with_one_warning(monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    case = make("dirichlet_mixture")
    log_joint = LogJoint(case.model, case.args, backend="compile")
    z = points(log_joint)
    with pytest.warns(CaptureWarning, match="no C\\+\\+ compiler") as caught:
        values = [log_joint.value_and_grad(z)[0] for _ in range(3)]
    assert len(caught) == 1
    truth = LogJoint(case.model, case.args, backend="eager").value_and_grad(z)[0]
    for value in values:
        torch.testing.assert_close(value, truth)
