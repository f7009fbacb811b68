"""Which solver serves which problem, and that a missing gradient is found."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from statsmodels.datasets import statecrime

from pyro_mf._errors import ConvergenceWarning, ModelError
from pyro_mf.fitting import differentiable, fit
from pyro_mf.fitting import starts as starts_module
from pyro_mf.fitting.choice import choose_solver
from pyro_mf.fitting.differentiable import describe_jump, describe_missing_gradient
from pyro_mf.fitting.problem import read_problem
from pyro_mf.fitting.score import score_objective, without_pathwise
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ReverseKL
from pyro_mf.solvers.outcome import Outcome
from tests.cases import MODELS

X = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64)


def normal(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def learnable(x):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hand_written(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(loc, 1.0))


def through_numpy(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        loc = torch.as_tensor(np.asarray(z.detach()))
        pyro.sample("x", dist.Normal(loc, 0.1), obs=x)


def detached(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w + z.detach(), 0.1), obs=x)


def with_jumps(x):
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((3.0 * z).round() / 3.0 + 0.1 * z, 1.0), obs=x)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError("no derivative is implemented")


def without_backward(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(NoBackward.apply(z), 1.0), obs=x)


def choose(model, args=(X,), solver="auto", **given):
    return choose_solver(read_problem(model, args, **given), solver)


@pytest.mark.parametrize("name", MODELS)
def test_every_full_model_is_deterministic_and_every_minibatch_is_not(name):
    case = MODELS[name]
    choice = choose(case.model, case.args())
    if case.is_subsampled:
        assert choice.solver == "stochastic"
        assert choice.reason == "plate 'data' is subsampled"
    else:
        assert choice.solver == "deterministic", choice.reason


@pytest.mark.parametrize(
    ("model", "given", "reason"),
    [
        (learnable, {}, "the model has learnable parameters, such as 'scale'"),
        (normal, {"objective": pyro.infer.Trace_ELBO()}, "the objective is Trace_ELBO"),
        (normal, {"guide": hand_written}, r"the guide \(hand_written\) is not an AutoMeanField"),
        (
            normal,
            {"guide": AutoMeanField(normal, create_plates=lambda x: pyro.plate("data", 10, 5))},
            "the guide subsamples plates of its own",
        ),
        (through_numpy, {}, "not differentiable: along a random direction its slope is"),
        (detached, {}, "not differentiable: along a random direction its slope is"),
        (with_jumps, {}, "not differentiable: along a way on which its mean changes by"),
        (without_backward, {}, "not differentiable: automatic differentiation fails .*no derivat"),
    ],
)
def test_what_the_deterministic_solver_cannot_do_goes_to_the_other(model, given, reason):
    pyro.clear_param_store()
    choice = choose(model, **given)
    assert choice.solver == "stochastic"
    with pytest.raises(ValueError, match="solver='deterministic' cannot serve: .*" + reason):
        choose(model, solver="deterministic", **given)


def test_own_settings_of_the_reverse_kl_do_not_matter():
    assert choose(normal, objective=ReverseKL(num_particles=3)).solver == "deterministic"


def test_each_can_be_asked_for():
    assert choose(normal, solver="deterministic").solver == "deterministic"
    choice = choose(normal, solver="stochastic")
    assert (choice.solver, choice.reason) == ("stochastic", "asked for")


def test_a_model_at_fault_is_refused_and_not_passed_on():
    with pytest.raises(ModelError, match="does not fit|fails|argument"):
        choose(normal, ())


@pytest.mark.usefixtures("few_evaluations")
def test_result_names_solver_and_reason():
    with pytest.warns(ConvergenceWarning):
        result = fit(learnable, (X,), max_gradients=30)
    assert "stochastic: the model has learnable parameters, such as 'scale'" in str(result)


@pytest.mark.usefixtures("few_evaluations")
def test_stock_guide_on_minibatches_has_a_report():
    case = MODELS["subsampled plate"]
    guide = pyro.infer.autoguide.AutoNormal(case.model, create_plates=lambda x: plate)
    plate = pyro.plate("data", 10, subsample_size=4, dim=-1)
    with pytest.warns(ConvergenceWarning):
        result = fit(case.model, case.args(), guide=guide, max_gradients=10)
    assert "those of the guide, AutoNormal" in str(result)


def smooth(scale):
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((z * scale).sum(), 0.1), obs=x)

    return model


def relu(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Laplace(torch.relu(z).sum(), 0.01), obs=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [smooth(1.0), smooth(1e4), smooth(1e-4), relu])
def test_smooth_models_have_their_gradient_at_any_scale(model, dtype):
    torch.set_default_dtype(dtype)
    try:
        log_joint = read_problem(model, (X.to(dtype).repeat(300),)).log_joint
        assert describe_missing_gradient(log_joint) is None
        assert describe_jump(log_joint) is None
    finally:
        torch.set_default_dtype(torch.float64)


def murders(x, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 50.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 5.0).expand([1]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(5.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("state", len(y)):
        pyro.sample("rate", dist.StudentT(df, intercept + x @ slopes, scale), obs=y)


def test_a_way_too_long_for_two_rules_that_agree_by_chance_has_no_jump(monkeypatch):
    data = statecrime.load_pandas().data
    x, y = (torch.tensor(data[name].to_numpy()) for name in ("poverty", "murder"))
    log_joint = read_problem(murders, ((x - x.mean())[:, None], y)).log_joint
    assert describe_jump(log_joint) is None
    monkeypatch.setattr(differentiable, "_NUM_POINTS", 5)
    assert describe_jump(log_joint) is not None  # which is the chance that finer rules rule out


class TestScore:
    """A model without a gradient is fitted by the score function, never by a wrong gradient."""

    def test_its_gradient_has_the_right_mean(self):
        def gradients(model, guide, objective):
            objective.loss_and_grads(model, guide, X)
            return torch.stack([leaf.grad for leaf in leaves])

        guide = AutoMeanField(normal).setup(X)
        leaves = guide.flat_leaves()
        many = pyro.infer.Trace_ELBO(num_particles=4000, vectorize_particles=True)
        exact = gradients(normal, guide, many)
        for leaf in leaves:
            leaf.grad = None
        objective = score_objective()
        parts = []
        for _ in range(100):
            parts.append(gradients(normal, without_pathwise(guide), objective))
            for leaf in leaves:
                leaf.grad = None
        found = torch.stack(parts)
        error = found.std(0) / len(parts) ** 0.5
        assert bool((error > 0).all())
        z = 5.0
        assert bool(((found.mean(0) - exact).abs() < z * error).all())

    def test_fit_uses_it(self, monkeypatch):
        seen = []

        def solve(model, guide, args, kwargs, *, objective, **rest):
            site = pyro.poutine.trace(guide).get_trace(*args).nodes["z"]
            seen.append((type(objective), site["fn"].has_rsample, site["value"].requires_grad))
            return Outcome(-1.0, 0.1, "converged", "", (1.0,), 1, {})

        monkeypatch.setattr(starts_module, "solve_stochastic", solve)
        result = fit(through_numpy, (X,))
        assert seen == [(pyro.infer.Trace_ELBO, False, False)]
        assert "score gradients" in result.reason

    @pytest.mark.slow
    def test_fit_of_a_model_in_numpy(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = fit(through_numpy, (X + 0.5,), max_gradients=1500)
        assert result.guide.loc.item() == pytest.approx(0.5, abs=0.05)
        assert result.guide.scale.item() == pytest.approx(1001**-0.5, rel=0.3)
