"""The verdict: green only for what is right, red only for what is wrong, amber for the rest."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_mf as mf
from pyro_mf._errors import GuideMismatchError, GuideNotSetUpError, ModelError
from pyro_mf.diagnostics.check import worst
from pyro_mf.diagnostics.drift import FALSE_ALARM, measure_drift
from pyro_mf.diagnostics.errors import MarginalErrors, marginal_errors
from pyro_mf.kernels import Metric
from pyro_mf.kernels.weighted import WeightedDraws

X = torch.tensor([1.0, 2.0, 3.0])  # the posterior of loc is N(1.5, 0.5)


def conjugate(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def correlated():
    """Two latents with correlation 0.9, each with sd one, and their sum with sd 1.95."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.9 * a, math.sqrt(1 - 0.81)))


def with_sum():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.9 * a, math.sqrt(1 - 0.81)))
    pyro.deterministic("total", a + b)


def two_modes():
    modes = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4])), modes))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("nine", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def guide_at(model, loc, scale, *args):
    guide = mf.AutoMeanField(model)
    guide.setup(*args)
    guide.set_flat_params((torch.tensor(loc), torch.tensor(scale)))
    return guide


# -- what is right is green, and what is wrong is red --------------------------------------------


def test_the_posterior_itself_is_green():
    found = mf.diagnose(guide_at(conjugate, [1.5], [0.5], X), conjugate, (X,))
    assert found.status == "green"
    row = found.parameters.loc["loc"]
    assert row["status"] == "green"
    assert abs(row["mean_error"]) < 4 * row["mean_error_se"]
    assert abs(row["sd_ratio"] - 1.0) < 4 * row["sd_ratio_se"]
    assert found["reference"].status == "green"
    assert found["drift"].values["mean_bound"] == 0.0
    assert not found.advice


def test_no_seed_calls_the_posterior_wrong():
    """Limits are ten standard errors from the truth; left are the alarms of other checks."""

    def independent():
        pyro.sample("x", dist.Normal(torch.arange(10.0), torch.logspace(-2, 2, 10)).to_event(1))

    guide = guide_at(independent, list(map(float, range(10))), torch.logspace(-2, 2, 10).tolist())
    assert {mf.diagnose(guide, independent, seed=seed).status for seed in range(8)} == {"green"}


@pytest.mark.parametrize(
    ("loc", "scale", "column", "expected"),
    [
        (2.0, 0.5, "mean_error", 1.0),
        (1.5, 0.25, "sd_ratio", 0.5),
        (1.5, 1.0, "sd_ratio", 2.0),
    ],
)
def test_a_wrong_guide_is_red_by_as_much_as_it_is_wrong(loc, scale, column, expected):
    found = mf.diagnose(guide_at(conjugate, [loc], [scale], X), conjugate, (X,))
    assert found.status == "red"
    row = found.parameters.loc["loc"]
    assert row["status"] == "red"
    assert abs(row[column] - expected) < 4 * row[f"{column}_se"]
    assert found.advice


@pytest.mark.parametrize(("factor", "status"), [(0.85, "green"), (0.752, "amber"), (0.65, "red")])
def test_near_the_limit_it_is_amber(factor, status):
    found = mf.diagnose(guide_at(conjugate, [1.5], [0.5 * factor], X), conjugate, (X,))
    assert found.status == status


def test_mean_field_is_red_and_linear_response_green_where_latents_depend_on_each_other():
    result = mf.fit(correlated)
    narrow, mended = result.diagnose(), result.diagnose(linear_response=True)
    assert (narrow.status, mended.status) == ("red", "green")
    expected = math.sqrt(1 - 0.81)
    row = narrow.parameters.loc["a"]
    assert abs(row["sd_ratio"] - expected) < 4 * row["sd_ratio_se"]
    assert "linear_response=True" in narrow.advice[0]
    assert mended.reference is narrow.reference  # made once for both
    assert "verdict         red" in str(result)
    assert "green" in str(result)


def test_deterministic_sites_are_judged_by_the_joint():
    result = mf.fit(with_sum, objective=mf.ForwardKL())
    found = result.diagnose()
    statuses = found.parameters["status"]
    assert statuses["a"] == statuses["b"] == "green"
    assert statuses["total"] == found.status == "red"
    row = found.parameters.loc["total"]
    expected = math.sqrt(2.0) / math.sqrt(2.0 + 1.8)
    assert abs(row["sd_ratio"] - expected) < 4 * row["sd_ratio_se"]


def test_right_marginals_of_a_wrong_joint_come_with_a_word_on_it():
    result = mf.fit(correlated, objective=mf.ForwardKL())
    found = result.diagnose()
    assert found.status == "green"
    assert any("functions of several parameters" in line for line in found.advice)
    assert found["evidence"].values["eubo"] > found["evidence"].values["elbo"]
    assert result.diagnose(draws=True).status == "green"


def test_draws_are_judged_by_others():
    result = mf.fit(correlated, objective=mf.ForwardKL())
    draws = result.posterior_draws()
    forward = replace(result.outcome.forward, draws=replace(draws, z=draws.z + 2.0))
    optimum = replace(result.restarts[0], outcome=replace(result.outcome, forward=forward))
    assert replace(result, restarts=(optimum,), verdicts={}).diagnose(draws=True).status == "red"


# -- what cannot be known is not green -------------------------------------------------------------


def test_one_of_two_modes_is_not_green():
    result = mf.fit(two_modes)
    found = result.diagnose()
    assert found.status == "red"
    assert abs(found.parameters.loc["x", "mean_error"]) > 0.5


def test_right_moments_of_the_wrong_shape_are_amber():
    result = mf.fit(two_modes, objective=mf.ForwardKL())
    found = result.diagnose()
    row = found.parameters.loc["x"]
    assert abs(row["sd_ratio"] - 1.0) < 0.1
    assert row["wasserstein"] > 0.25
    assert found.status == "amber"
    assert any("shape" in line for line in found.advice)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [None, mf.ForwardKL()])
def test_a_funnel_is_never_green(objective):
    with pytest.warns(mf.ConvergenceWarning) if objective else nullcontext():
        result = mf.fit(funnel, objective=objective)
    found = result.diagnose()
    assert found.status != "green"
    assert not (found.parameters["status"] == "green").any()


def test_a_spent_budget_is_amber_and_says_so():
    result = mf.fit(correlated, objective=mf.ForwardKL())
    found = mf.diagnose(result.guide, correlated, max_gradients=1)
    assert found.status == "amber"
    assert found.parameters["mean_error"].isna().all()
    assert "no draws of the posterior" in found.headline


def test_an_interrupt_returns_what_is_known(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    guide = guide_at(conjugate, [1.5], [0.5], X)
    monkeypatch.setattr("pyro_mf.diagnostics.diagnose.draw_reference", interrupted)
    found = mf.diagnose(guide, conjugate, (X,))
    assert found.status == "amber"
    assert "interrupted" in found.headline
    assert found["drift"].values["mean_bound"] == 0.0


def test_what_did_not_converge_counts_only_where_nothing_better_is_known():
    with pytest.warns(mf.ConvergenceWarning):
        result = mf.fit(correlated, max_gradients=3)
    assert result.stop_reason == "budget"
    assert result.diagnose()["solver"].status is None  # the marginals were measured
    assert result.diagnose(max_gradients=1)["solver"].status is None
    assert replace(result, verdicts={}).diagnose(max_gradients=1)["solver"].status == "amber"


def test_discrete_factors_are_not_covered():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(loc + 4.0 * label, 1.0), obs=x)

    result = mf.fit(model, (torch.tensor([0.1, -0.2, 4.2, 3.9]),), family={"label": "bernoulli"})
    found = result.diagnose()
    assert found.status != "green"
    assert found["discrete sites"].status == "amber"


# -- what a reader of the verdict would fall for ---------------------------------------------------


def in_wrong_joint(site):
    def model():
        covariance = torch.tensor([[1.0, 0.98], [0.98, 1.0]])
        b = pyro.sample("b", dist.MultivariateNormal(torch.tensor([0.4, 0.0]), covariance))
        pyro.deterministic("of_both", site(b))

    return model


@pytest.mark.parametrize("site", [lambda b: b[0] > b[1], lambda b: (b[0] > b[1]).long()])
def test_booleans_and_integers_are_judged(site):
    """P(b[0] > b[1]) is 0.977, and 0.61 where the two are independent."""
    found = mf.fit(in_wrong_joint(site), objective=mf.ForwardKL()).diagnose()
    assert found.status == found.parameters.loc["of_both", "status"] == "red"


def test_a_site_that_is_nan_at_some_draws_is_not_left_out():
    model = in_wrong_joint(lambda b: (b[0] - b[1] + 0.3).log())
    found = mf.fit(model, objective=mf.ForwardKL()).diagnose()
    assert found.parameters.loc["of_both", "status"] == "amber"
    assert found.status != "green"


def exact_guide(scale):
    def model():
        pyro.sample("x", dist.LogNormal(0.0, scale))

    return model, model


@pytest.mark.parametrize(("scale", "status"), [(0.5, "green"), (2.5, "amber")])
def test_tails_too_heavy_for_an_sd_are_neither_right_nor_wrong(scale, status):
    model, guide = exact_guide(scale)
    found = {mf.diagnose(guide, model, seed=seed).status for seed in range(4)}
    assert found == {status}


def test_an_event_too_rare_for_the_draws_is_neither_right_nor_wrong():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("rare", x > 4.3)

    guide = guide_at(model, [0.0], [1.0])
    found = [mf.diagnose(guide, model, seed=seed) for seed in range(3)]
    assert all(f.status in ("green", "amber") for f in found)
    assert all(f.parameters.loc["x", "status"] == "green" for f in found)


def test_a_smaller_mode_elsewhere_is_not_overlooked():
    """The narrow one, at 20 in both directions, has 14 % of the mass."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        here = math.log(0.1) + dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
        there = math.log(0.9) + dist.Normal(20.0, 0.3).log_prob(x).sum(-1)
        pyro.factor("modes", torch.logaddexp(here, there))

    assert mf.fit(model).diagnose().status != "green"


def test_another_seed_is_a_second_opinion():
    result = mf.fit(correlated)
    first = result.diagnose()
    assert result.diagnose(linear_response=True).reference is first.reference
    assert result.diagnose(seed=1).reference is not first.reference


def test_a_class_is_no_guide():
    with pytest.raises(TypeError, match="the class AutoNormal"):
        mf.diagnose(AutoNormal, conjugate, (X,))


# -- guides that something else trained ------------------------------------------------------------


@pytest.mark.parametrize(("steps", "good"), [(3, False), (300, True)])
def test_a_stock_guide_is_judged_by_what_it_has_learned(steps, good):
    guide = AutoNormal(conjugate, init_scale=0.1)
    elbo = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(steps):
        svi.step(X)
    assert (mf.diagnose(guide, conjugate, (X,)).status == "green") is good


def test_a_point_is_red():
    guide = AutoDelta(conjugate)
    guide(X)
    found = mf.diagnose(guide, conjugate, (X,))
    assert found.status == "red"
    assert found.parameters.loc["loc", "sd"] == 0.0


def test_a_hand_written_guide_of_the_posterior_is_green():
    def guide(x):
        pyro.sample("loc", dist.Normal(1.5, 0.5))

    assert mf.diagnose(guide, conjugate, (X,)).status == "green"


def test_a_subsampled_model_is_judged_on_its_full_data():
    def subsampled(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=1) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    exact, wrong = (guide_at(subsampled, [1.5], [s], X) for s in (0.5, 0.2))
    assert mf.diagnose(exact, subsampled, (X,)).status == "green"
    assert mf.diagnose(wrong, subsampled, (X,)).status == "red"


# -- bad input -------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    guide = guide_at(conjugate, [1.5], [0.5], X)
    with pytest.raises(TypeError, match="callable"):
        mf.diagnose(3, conjugate, (X,))
    with pytest.raises(GuideNotSetUpError):
        mf.diagnose(mf.AutoMeanField(conjugate), conjugate, (X,))
    with pytest.raises(GuideMismatchError):
        mf.diagnose(guide, correlated)
    with pytest.raises(ValueError, match="max_gradients"):
        mf.diagnose(guide, conjugate, (X,), max_gradients=0)
    with pytest.raises(TypeError, match="seed"):
        mf.diagnose(guide, conjugate, (X,), seed=0.5)
    result = mf.fit(conjugate, (X,))
    with pytest.raises(ValueError, match="exclude"):
        result.diagnose(draws=True, linear_response=True)
    with pytest.raises(ValueError, match="no draws of the posterior"):
        result.diagnose(draws=True)


def test_a_minibatch_handed_in_is_refused():
    def handed(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ModelError, match="full data"):
        mf.diagnose(guide_at(handed, [1.5], [0.5], X), handed, (X,))


def test_a_guide_trained_on_other_data_is_red():
    found = mf.diagnose(guide_at(conjugate, [1.5], [0.5], X), conjugate, (X + 5.0,))
    assert found.status == "red"


# -- its parts -------------------------------------------------------------------------------------


def test_the_report_has_the_verdict_its_reasons_and_what_to_do():
    found = mf.diagnose(guide_at(conjugate, [2.5], [0.5], X), conjugate, (X,))
    text = str(found)
    assert text.startswith("RED")
    assert "What to do" in text
    assert "loc" in text
    with pytest.raises(KeyError, match="marginals"):
        found["nothing"]


def test_the_worst_of_nothing_is_green():
    assert worst([]) == worst([None]) == "green"
    assert worst(["amber", "red", None]) == "red"


def equal_weights(z):
    zeros = torch.zeros(len(z))
    return WeightedDraws(z, zeros, zeros, strata=1, units=len(z), khat=0.0, num_evaluations=0)


def test_errors_of_draws_against_themselves_are_zero():
    z = torch.randn(1000, 3)
    draws = equal_weights(z)
    found = marginal_errors(z, z, draws.weights, draws)
    assert found.mean_error.abs().max() < 1e-12
    assert (found.sd_ratio - 1.0).abs().max() < 1e-3  # S against S - 1
    assert found.shape.max() < 0.01  # quantiles are interpolated


def test_errors_of_moved_and_stretched_draws():
    z = torch.randn(1000, 2)
    draws = equal_weights(z)
    found = marginal_errors(2.0 * z + 3.0 * z.std(0), z, draws.weights, draws)
    expected = z.mean(0) / z.std(0, correction=0) + 3.0 * z.std(0) / z.std(0, correction=0)
    assert torch.allclose(found.mean_error, expected)
    assert (found.sd_ratio - 2.0).abs().max() < 2e-3
    shifted = marginal_errors(z + 0.5 * z.std(0), z, draws.weights, draws)
    assert (shifted.shape - 0.5).abs().max() < 0.01


def test_weights_count():
    z = torch.tensor([[0.0], [1.0], [5.0]])
    log_weights = torch.tensor([0.0, math.log(3.0), -math.inf])
    draws = WeightedDraws(z, log_weights, log_weights, 1, 3, khat=0.0, num_evaluations=0)
    claimed = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    found = marginal_errors(claimed, z, draws.weights, draws)
    assert float(found.mean_error) == pytest.approx(0.0)
    assert float(found.posterior_sd) == pytest.approx(math.sqrt(3.0) / 4.0)


@pytest.mark.parametrize(
    ("mean", "ratio", "se", "status"),
    [
        (0.10, 1.00, 0.05, "green"),
        (0.20, 1.00, 0.05, "amber"),
        (0.40, 1.00, 0.05, "red"),
        (0.00, 0.80, 0.02, "green"),
        (0.00, 0.74, 0.02, "amber"),
        (0.00, 0.60, 0.02, "red"),
        (0.00, 1.40, 0.02, "red"),
        (0.00, math.nan, 0.02, "amber"),
        (math.nan, 1.0, 0.02, "amber"),
    ],
)
def test_statuses_leave_two_standard_errors(mean, ratio, se, status):
    one = torch.ones(1)
    errors = (mean * one, se * one, ratio * one, se * one)
    found = MarginalErrors(one, one, one, *errors, 0.0 * one, -one, one > 0)
    assert found.statuses == [status]


def standard(z):
    return -0.5 * z.square().sum(-1), -z


def test_chains_do_not_drift_from_the_posterior_and_do_from_elsewhere():
    """The false-alarm rate is 1 % for all latents together; 3 of 40 have probability 0.008."""
    metric, alarms = Metric(torch.ones(10)), 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(128, 10, generator=generator)
        found = measure_drift(standard, z, metric, generator=generator)
        alarms += int((found.mean_bound > 0).any() | (found.log_sd_bound > 0).any())
    assert alarms / 40 <= 2 / 40
    assert FALSE_ALARM == 0.01
    narrow = measure_drift(standard, 0.3 * z, metric, generator=generator)
    assert (narrow.log_sd_bound > 0.5).all()
    assert (narrow.log_sd_bound < math.log(1 / 0.3) + 0.3).all()


def test_drift_is_none_where_there_is_no_density():
    def half(z):
        values, gradients = standard(z)
        return torch.where(z[:, 0] > 10.0, values, -torch.inf), gradients

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, 2, generator=generator)
    assert measure_drift(half, z, Metric(torch.ones(2)), generator=generator) is None
    with pytest.raises(ValueError, match="16"):
        measure_drift(standard, z[:5], Metric(torch.ones(2)), generator=generator)
