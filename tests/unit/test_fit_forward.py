"""``fit`` by forward KL: which solver serves, what its result offers, what is refused."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf import AutoMeanField, CheckpointError, ConvergenceWarning, FitResult, ForwardKL, fit
from pyro_mf.fitting.choice import choose_solver
from pyro_mf.fitting.problem import read_problem
from pyro_mf.objectives import ReverseKL
from pyro_mf.solvers import stochastic

X = torch.tensor([0.3, -1.2, 0.8, 2.2, 0.4, 1.3], dtype=torch.float64)


def normal(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("twice", 2 * loc.expand(len(x)))
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


@pytest.fixture(scope="module")
def result():
    with torch.random.fork_rng(), pyro.validation_enabled(False):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return fit(normal, (X,), objective=ForwardKL())
        finally:
            torch.set_default_dtype(before)


class TestChoice:
    def choose(self, objective, solver="auto", guide=None, **options):
        problem = read_problem(normal, (X,), guide=guide, objective=objective)
        return choose_solver(problem, solver, **options)

    def test_draws_are_made_before_the_fit_where_they_can_be(self):
        assert self.choose(ForwardKL()).solver == "moment_matching"
        assert self.choose(ForwardKL(estimator="hmc")).source == "hmc"
        assert self.choose(ForwardKL(estimator="smc")).source == "smc"

    @pytest.mark.parametrize("estimator", ["imh", "msc", "snis", "prior"])
    def test_other_estimators_make_theirs_step_by_step(self, estimator):
        choice = self.choose(ForwardKL(estimator=estimator))
        assert choice.solver == "stochastic"
        assert "step by step" in choice.reason

    def test_it_can_be_asked_for_by_name_and_so_can_the_stochastic_solver(self):
        assert self.choose(ForwardKL(), "moment_matching").solver == "moment_matching"
        assert self.choose(ForwardKL(), "stochastic").solver == "stochastic"

    def test_a_density_without_gradient_goes_to_the_stochastic_solver(self):
        def rounded():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.detach(), 1.0), obs=torch.tensor(1.0))

        problem = read_problem(rounded, objective=ForwardKL())
        assert choose_solver(problem).solver == "stochastic"
        assert choose_solver(problem, has_draws=True).solver == "moment_matching"

    @pytest.mark.parametrize(
        ("objective", "solver", "words"),
        [
            (ReverseKL(), "moment_matching", r"it is for objective=ForwardKL\(\)"),
            (None, "moment_matching", r"it is for objective=ForwardKL\(\)"),
            (ForwardKL(), "deterministic", r"it is for objective=ReverseKL\(\)"),
            (ForwardKL(estimator="imh"), "moment_matching", "step by step"),
        ],
    )
    def test_a_solver_that_cannot_serve_is_refused(self, objective, solver, words):
        with pytest.raises(ValueError, match=words):
            self.choose(objective, solver)

    @pytest.mark.parametrize("objective", [None, ReverseKL(), ForwardKL(estimator="imh")])
    def test_draws_are_for_moment_matching_alone(self, objective):
        with pytest.raises(ValueError, match="draws= is for moment matching"):
            fit(normal, (X,), objective=objective, draws={"loc": X})

    def test_restarts_are_refused(self):
        with pytest.raises(ValueError, match="its chains start in many places"):
            fit(normal, (X,), objective=ForwardKL(), num_restarts=2)


class TestResult:
    def test_report_names_draws_and_bounds(self, result):
        text = str(result)
        assert "moment_matching: forward KL, full data" in text
        assert "EUBO" in text
        assert "log evidence" in text
        assert "linear response" not in text
        assert "sd_draws" in text

    def test_bounds_are_in_order(self, result):
        bounds = result.evidence
        assert result.elbo < bounds.lower + 4 * bounds.lower_se
        assert bounds.lower - 4 * bounds.lower_se < bounds.upper + 4 * bounds.upper_se
        assert bounds.upper <= result.eubo
        assert result.eubo_se > 0.0

    def test_a_reverse_fit_has_a_lower_bound_only(self):
        reverse = fit(normal, (X,))
        assert reverse.evidence == (
            reverse.elbo,
            reverse.elbo_se,
            math.inf,
            pytest.approx(math.nan, nan_ok=True),
        )
        assert math.isnan(reverse.eubo)
        assert reverse.draws is None
        for take in (lambda: reverse.sample(2, draws=True), lambda: reverse.to_arviz(draws=True)):
            with pytest.raises(ValueError, match="has no draws of the posterior"):
                take()

    def test_summary_has_the_moments_of_the_draws(self, result):
        table = result.summary(deterministic=True)
        assert table.attrs["believe"] == "sd_draws"
        draws = result.draws
        assert table.loc["loc", "mean_draws"] == pytest.approx(float(draws.mean[0]))
        assert table.loc["loc", "sd_draws"] == pytest.approx(float(draws.sd[0]))
        # On the model's own axis, where the factor's lognormal has a mean of its own.
        scale = draws.weights @ draws.z[:, 1].exp()
        assert table.loc["scale", "mean_draws"] == pytest.approx(float(scale))
        assert table.loc["twice[0]", "sd_draws"] == pytest.approx(2 * float(draws.sd[0]))

    def test_draws_can_be_taken(self, result):
        taken = result.sample(5000, draws=True)
        error = 5 / 5000**0.5  # five standard errors, besides that of the draws themselves
        sd = float(result.draws.sd[0])
        assert abs(float(taken["loc"].mean() - result.draws.mean[0])) < error * sd
        assert torch.equal(taken["loc"], result.sample(5000, draws=True)["loc"])
        with pytest.raises(ValueError, match="exclude each other"):
            result.sample(2, draws=True, linear_response=True)

    def test_draws_convert(self, result):
        data = result.to_arviz(draws=True)
        assert data["posterior"]["loc"].shape[0] == (4 if result.draws.source != "hmc" else 64)
        assert "log_likelihood" in list(
            data.children if hasattr(data, "children") else data.groups()
        )

    def test_linear_response_is_refused_with_the_reason(self, result):
        with pytest.raises(ArithmeticError, match="widens the factors of a fit by reverse KL"):
            result.linear_response()

    def test_it_is_saved_whole(self, result, tmp_path):
        path = tmp_path / "fit.pt"
        result.save(path)
        loaded = FitResult.load(path, normal, (X,))
        assert loaded.solver == "moment_matching"
        assert loaded.evidence == result.evidence
        assert (loaded.eubo, loaded.eubo_se) == (result.eubo, result.eubo_se)
        for name in ("z", "log_weights", "log_density", "mean_error", "sd_error"):
            assert torch.equal(getattr(loaded.draws, name), getattr(result.draws, name))
        assert dict(loaded.draws.diagnostics) == dict(result.draws.diagnostics)
        assert torch.equal(loaded.sample(3, draws=True)["loc"], result.sample(3, draws=True)["loc"])

    @pytest.mark.parametrize("part", ["z", "source", "mean_error"])
    def test_a_file_with_other_draws_is_refused(self, result, tmp_path, part):
        path = tmp_path / "fit.pt"
        result.save(path)
        content = torch.load(path, weights_only=True)
        content["restarts"][0]["forward"]["draws"][part] = torch.zeros(3)
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="something else in its place"):
            FitResult.load(path, normal, (X,))


def test_draws_of_ones_own_are_the_optimum():
    guide = AutoMeanField(normal)
    draws = fit(normal, (X,), objective=ForwardKL()).sample(4000, draws=True)
    own = fit(normal, (X,), guide=guide, objective=ForwardKL(), draws=draws)
    loc, scale = (p.detach() for p in guide.flat_params())
    assert own.guide is guide
    assert own.draws.source == "given"
    assert torch.allclose(loc, torch.stack([draws["loc"].mean(), draws["scale"].log().mean()]))
    assert torch.allclose(scale[0], draws["loc"].std(correction=0))


def test_draws_of_another_posterior_are_told():
    draws = {"loc": torch.randn(4000), "scale": torch.randn(4000).exp()}
    with pytest.warns(ConvergenceWarning, match="they are not draws of this posterior"):
        fit(normal, (X,), objective=ForwardKL(), draws=draws)


def test_a_stochastic_fit_to_bad_draws_has_not_converged(monkeypatch):
    def prior():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    options = {"objective": ForwardKL(16, estimator="snis"), "tolerance": 0.5}
    assert fit(prior, **options).converged
    monkeypatch.setattr(ForwardKL, "fault", "the weights are too uneven")
    with pytest.warns(ConvergenceWarning, match="But the weights are too uneven"):
        assert fit(prior, **options).stop_reason == "budget"


def multinormal(size, rho):
    covariance = (1 - rho) * torch.eye(size) + rho
    return lambda: pyro.sample("z", dist.MultivariateNormal(torch.zeros(size), covariance))


ESTIMATORS = ["imh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("msc", "snis"))]


class TestEstimatorsThatCannotWork:
    """With many correlated latents proposals of the guide do not reach the posterior."""

    @pytest.fixture(autouse=True)
    def look_often(self, monkeypatch):
        monkeypatch.setattr(stochastic, "_LOOK", 50)  # so that 500 steps of faults are too many

    @pytest.mark.filterwarnings("ignore::pyro_mf.EstimatorWarning")
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_they_are_not_followed_to_the_end(self, estimator):
        with pytest.warns(ConvergenceWarning, match=r"of no use for 450: .*estimator='hmc'"):
            result = fit(multinormal(20, 0.9), objective=ForwardKL(16, estimator=estimator))
        assert result.stop_reason == "budget"
        assert len(result.losses) < 1000
        assert "draws have been of no use" in result.message
        assert bool(torch.isfinite(result.guide.scale).all())

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_control_those_that_work_are_left_alone(self, estimator):
        objective = ForwardKL(16, estimator=estimator)
        result = fit(multinormal(2, 0.5), objective=objective, tolerance=0.3)
        assert result.converged, result.message

    @pytest.mark.slow
    def test_control_chains_of_their_own_work_where_proposals_of_the_guide_do_not(self):
        options = {"objective": ForwardKL(16, estimator="hmc"), "tolerance": 0.3}
        result = fit(multinormal(20, 0.9), solver="stochastic", **options)
        assert result.converged, result.message
        assert bool((result.guide.scale.log().abs() < 0.3).all())


def test_what_did_not_converge_warns():
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        result = fit(normal, (X,), objective=ForwardKL(estimator="hmc"), max_gradients=80)
    assert "NOT CONVERGED" in str(result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(normal, (X,), objective=ForwardKL())


def test_single_precision_and_progress(capsys):
    def single(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=torch.float32), 3.0))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)

    result = fit(single, (X.float(),), objective=ForwardKL(), progress=True)
    loc, scale = (p.detach() for p in result.guide.flat_params())
    assert loc.dtype == torch.float32
    precision = len(X) + 1 / 9.0
    assert abs(float(loc) - float(X.sum()) / precision) < 0.1 * precision**-0.5
    assert abs(float(scale) * precision**0.5 - 1) < 0.1
    assert "reading the model" in capsys.readouterr().err  # what is too fast is not drawn
