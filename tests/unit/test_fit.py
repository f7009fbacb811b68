"""``fit``: exact answers on Gaussian posteriors, determinism, bad input, and what it warns of."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf._errors import ConvergenceWarning, GuideMismatchError, ModelError, ModesWarning
from pyro_mf.families import Normal
from pyro_mf.fitting import FitResult, fit
from pyro_mf.fitting import starts as starts_module
from pyro_mf.fitting.restarts import Optimum, describe_modes
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ReverseKL
from pyro_mf.solvers.outcome import Outcome


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    x[:, 1] += x[:, 0]  # correlated, so that mean field and posterior differ
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + 0.3
    return x.to(dtype), y.to(dtype)


def exact(x, y):
    """Mean, precision and log evidence of the regression."""
    precision = x.T @ x + torch.eye(3) / 4.0
    mean = torch.linalg.solve(precision, x.T @ y)
    marginal = dist.MultivariateNormal(torch.zeros(len(y)), torch.eye(len(y)) + 4.0 * x @ x.T)
    return mean, precision, float(marginal.log_prob(y))


def normal(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def two_heights(x):
    """Two modes, one of them lower by log(4)."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    heights = torch.tensor([0.8, 0.2]).log()
    modes = dist.Normal(torch.tensor([0.0, 1.5]), 0.2)
    pyro.factor("modes", (heights + modes.log_prob(z)).logsumexp(0))


THREE = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)


@pytest.fixture(scope="module")
def fitted():
    torch.set_default_dtype(torch.float64)
    try:
        return fit(regression, data())
    finally:
        torch.set_default_dtype(torch.float32)


class TestGaussianPosterior:
    def test_optimum_linear_response_and_elbo_have_closed_forms(self, fitted):
        mean, precision, evidence = exact(*data())
        assert fitted.converged
        assert fitted.solver == "deterministic"
        torch.testing.assert_close(fitted.guide.loc.detach(), mean, atol=1e-5, rtol=0)
        sd = precision.diagonal().rsqrt()
        # Draws of different coordinates are not quite uncorrelated, hence the tolerance.
        torch.testing.assert_close(fitted.guide.scale.detach(), sd, atol=0, rtol=0.1)
        covariance = fitted.linear_response().covariance
        torch.testing.assert_close(covariance, torch.linalg.inv(precision), atol=1e-8, rtol=1e-5)
        divergence = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
        assert abs(fitted.elbo - (evidence - divergence)) < 5 * fitted.elbo_se + 1e-6
        # Linear response is the posterior, so its ELBO is the evidence, without noise.
        assert fitted.response.elbo == pytest.approx(evidence, abs=1e-5)
        assert fitted.summary().attrs == {"believe": "sd_lr"}

    def test_report_says_what_happened(self, fitted):
        text = str(fitted)
        for part in ("'regression': converged", "ELBO", "deterministic", "gradients", "beta [3]"):
            assert part in text
        assert max(map(len, text.splitlines())) <= 100
        assert repr(fitted).startswith("FitResult(regression: converged, ELBO ")

    def test_seconds_are_of_phases(self, fitted):
        assert {"prepare", "linear response"} < set(fitted.seconds)
        assert all(s >= 0 for s in fitted.seconds.values())
        assert fitted.num_gradients > 0

    def test_draws_of_linear_response_have_its_covariance(self, fitted):
        num, z = 20_000, 5.0  # sees an error of 5 % in a variance
        draws = fitted.sample(num, linear_response=True, seed=1)["beta"]
        covariance = fitted.linear_response().covariance
        found = torch.cov(draws.T)
        variances = covariance.diagonal()
        error = ((variances[:, None] * variances + covariance.square()) / num).sqrt()
        assert bool(((found - covariance).abs() < z * error).all())
        plain = torch.cov(fitted.sample(num, seed=1)["beta"].T)  # control: no correlation
        assert not bool(((plain - covariance).abs() < z * error).all())


class TestReproducible:
    def test_same_seed_same_bits_and_generators_untouched(self):
        before = torch.get_rng_state()
        first, second = (fit(normal, (THREE,), seed=4) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert first.elbo == second.elbo
        assert torch.equal(first.guide.loc, second.guide.loc)
        assert first.losses == second.losses

    @pytest.mark.usefixtures("few_evaluations")
    def test_stochastic_too(self):
        before = torch.get_rng_state()
        quick = {"solver": "stochastic", "max_gradients": 100}
        with pytest.warns(ConvergenceWarning):
            first = fit(normal, (THREE,), **quick)
        with pytest.warns(ConvergenceWarning):
            second = fit(normal, (THREE,), **quick)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first.guide.loc, second.guide.loc)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_is_that_of_the_data(self, dtype):
        def model(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        result = fit(model, (THREE.to(dtype),))
        assert result.guide.loc.dtype == dtype
        assert result.sample(3)["z"].dtype == dtype
        assert result.sample(3, linear_response=True)["z"].dtype == dtype
        assert result.summary().loc["z", "mean"] == pytest.approx(0.3, abs=1e-4)

    def test_a_guide_is_trained_in_place(self):
        guide = AutoMeanField(normal)
        result = fit(normal, (THREE,), guide=guide)
        assert result.guide is guide
        assert guide.median()["z"].item() == pytest.approx(0.3, abs=1e-5)

    def test_two_fits_do_not_share_parameters(self):
        first = fit(normal, (THREE,))
        fit(normal, (THREE + 5.0,))
        assert first.guide.median()["z"].item() == pytest.approx(0.3, abs=1e-5)


class TestRestarts:
    def test_one_mode_gives_no_warning_and_all_optima(self):
        result = fit(normal, (THREE,), num_restarts=3)
        assert [o.seed for o in result.restarts] == [0, 1, 2]
        assert all(o.outcome.converged for o in result.restarts)
        assert result.elbo == max(o.elbo for o in result.restarts)
        assert result.num_gradients == sum(o.outcome.num_gradients for o in result.restarts)
        assert "restarts" in str(result)

    @pytest.mark.parametrize(
        ("second", "loc", "told"),
        [
            (-1.0, 0.5, None),
            (-1.3, 0.5, None),  # within the errors of the ELBOs
            (-1.0, 2.5, "1 of 2 starts ended elsewhere at the same ELBO, with 'z' up to 2.5 sds"),
            (-3.0, 0.5, "1 of 2 starts ended at a lower ELBO than the best: -3.00 ± 0.1 against"),
            (math.nan, 9.0, None),  # no optimum at all
        ],
    )
    def test_optima_differ_by_elbo_or_by_place(self, second, loc, told):
        guide = AutoMeanField(normal).setup(THREE)
        params = [(torch.tensor([x]), torch.tensor([1.0])) for x in (0.0, loc)]
        optima = tuple(
            Optimum(i, Outcome(elbo, 0.1, "converged", "", (), 1, {}), params[i])
            for i, elbo in enumerate((-1.0, second))
        )
        found = describe_modes(optima, guide)
        assert found is None if told is None else told in found

    def test_the_best_of_different_optima_is_the_result(self):
        with pytest.warns(ModesWarning, match="lower ELBO than the best"):
            result = fit(two_heights, (None,), num_restarts=6)
        assert result.guide.median()["z"].item() == pytest.approx(0.0, abs=0.05)
        assert torch.equal(result.guide.loc.detach(), result.restarts[result.best].params[0])

    def test_a_start_that_fails_is_noted(self, monkeypatch):
        monkeypatch.setattr(starts_module, "solve_from_many", fakes({1: ModelError("no start")}))
        result = fit(normal, (THREE,), num_restarts=3)
        assert len(result.restarts) == 2
        assert "start 2 of 3 failed: no start" in result.notes

    @pytest.mark.parametrize(
        "ends", [dict.fromkeys(range(3), ModelError("bad")), {2: ZeroDivisionError("bad")}]
    )
    def test_what_is_wrong_with_all_or_with_us_is_raised(self, monkeypatch, ends):
        monkeypatch.setattr(starts_module, "solve_from_many", fakes(ends))
        with pytest.raises((ModelError, ZeroDivisionError), match="bad"):
            fit(normal, (THREE,), num_restarts=3)

    def test_divergence_is_the_last_resort(self, monkeypatch):
        monkeypatch.setattr(starts_module, "solve_from_many", fakes({0: "diverged"}))
        assert fit(normal, (THREE,), num_restarts=2).best == 1

    def test_of_the_stochastic_solver_one_after_another(self, monkeypatch):
        starts = []

        def solve(model, guide, args, kwargs, *, seed, **rest):
            starts.append((seed, guide.loc.item(), guide.scale.item()))
            return outcome("interrupted" if seed == 7 else "converged")

        monkeypatch.setattr(starts_module, "solve_stochastic", solve)
        with pytest.warns(ModesWarning):  # this one moves from none of its starts
            result = fit(normal, (THREE,), num_restarts=5, seed=5, solver="stochastic")
        assert [seed for seed, *_ in starts] == [5, 6, 7]  # until Ctrl-C
        assert starts[0][1] == 0.0
        assert len({loc for _, loc, _ in starts}) == 3
        assert {round(scale, 6) for *_, scale in starts} == {0.1}
        assert result.stop_reason == "converged"  # the first start's


def outcome(reason):
    return Outcome(-1.0, 0.1, reason, "because", (1.0,), 1, {}, refusal="a fake has none")


def fakes(ends):
    """Several starts that end at once: with a stop reason or an error by number."""

    def solve(log_joint, guide, seeds, *, reports, **budget):
        params = tuple(p.detach() for p in guide.flat_params())
        given = [ends.get(k, "converged") for k in range(len(seeds))]
        return [e if isinstance(e, Exception) else (outcome(e), params) for e in given]

    return solve


def fake(reason):
    """A solver that ends at once."""
    return lambda *args, **rest: outcome(reason)


class TestNotConverged:
    def test_warns_once_and_says_so(self, monkeypatch):
        monkeypatch.setattr(starts_module, "solve_deterministic", fake("budget"))
        with pytest.warns(ConvergenceWarning, match="did not converge: because") as caught:
            result = fit(normal, (THREE,))
        assert len(caught) == 1
        assert not result.converged
        assert "NOT CONVERGED" in str(result)

    def test_diverged(self, monkeypatch):
        monkeypatch.setattr(starts_module, "solve_deterministic", fake("diverged"))
        with pytest.warns(ConvergenceWarning, match="diverged: because"):
            result = fit(normal, (THREE,))
        assert "DIVERGED" in str(result)

    def test_interrupted_is_no_surprise(self, monkeypatch):
        monkeypatch.setattr(starts_module, "solve_deterministic", fake("interrupted"))
        assert "INTERRUPTED" in str(fit(normal, (THREE,)))

    def test_budget_reaches_the_solver(self):
        with pytest.warns(ConvergenceWarning):
            result = fit(normal, (THREE,), solver="stochastic", max_gradients=40)
        assert result.num_gradients <= 40
        assert result.stop_reason == "budget"


@pytest.mark.usefixtures("few_evaluations")
class TestResume:
    def test_two_halves_are_the_whole(self):
        def steps(num):
            return {"solver": "stochastic", "max_gradients": num}

        with pytest.warns(ConvergenceWarning):
            whole = fit(normal, (THREE,), guide=AutoMeanField(normal), **steps(120))
        pyro.clear_param_store()
        with pytest.warns(ConvergenceWarning):
            half = fit(normal, (THREE,), guide=AutoMeanField(normal), **steps(60))
        with pytest.warns(ConvergenceWarning):
            both = half.resume(max_gradients=60)
        assert both.losses == whole.losses
        assert torch.equal(both.guide.loc, whole.guide.loc)
        assert both.num_gradients == whole.num_gradients
        assert both.seconds["optimise"] > half.seconds["optimise"]

    def test_the_deterministic_solver_starts_anew(self, fitted):
        with pytest.raises(ValueError, match="only the stochastic solver goes on"):
            fitted.resume()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"model": 3}, TypeError, "model must be a Pyro model, a callable; got int"),
            ({"model_args": THREE}, TypeError, "model_args must be a tuple .* got Tensor"),
            ({"model_args": "x"}, TypeError, "model_args must be a tuple; got 'x'"),
            ({"model_kwargs": (1,)}, TypeError, "model_kwargs must be a mapping"),
            ({"solver": "newton"}, ValueError, "'stochastic', 'moment_matching'; got 'newt"),
            ({"objective": "elbo"}, TypeError, "objective must be an instance of pyro.infer.ELBO"),
            ({"objective": ReverseKL}, TypeError, "got the class ReverseKL"),
            ({"num_restarts": 0}, ValueError, "num_restarts must be at least 1; got 0"),
            ({"num_restarts": 1.5}, TypeError, "num_restarts must be an integer"),
            ({"seed": None}, TypeError, "seed must be an integer; got None"),
            ({"seed": True}, TypeError, "seed must be an integer; got True"),
            ({"max_gradients": 0}, ValueError, "max_gradients must be at least 1"),
            ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
            ({"tolerance": "low"}, TypeError, "tolerance must be a number"),
            ({"guide": AutoMeanField}, TypeError, "got AutoMeanField"),
            ({"guide": THREE}, TypeError, "guide must be a guide for the model"),
            ({"family": "gaussian"}, ValueError, "Unknown family 'gaussian'"),
            ({"guide": AutoMeanField(normal), "family": "normal"}, ValueError, "has its own"),
        ],
    )
    def test_is_refused_at_the_door(self, arguments, error, words):
        given = {"model": normal, "model_args": (THREE,)} | arguments
        with pytest.raises(error, match=words):
            fit(**given)

    def test_guide_of_another_model(self):
        other = AutoMeanField(regression).setup(*data())
        with pytest.raises(GuideMismatchError, match=r"latent sites \['beta'\], this model has"):
            fit(normal, (THREE,), guide=other)

    def test_guide_for_data_of_another_size(self):
        def local(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        with pytest.raises(GuideMismatchError, match="has size 3, but the guide was set up for"):
            fit(local, (THREE,), guide=AutoMeanField(local).setup(torch.zeros(5)))

    def test_restarts_of_a_stock_guide(self):
        guide = pyro.infer.autoguide.AutoNormal(normal)
        with pytest.raises(ValueError, match="num_restarts=2 needs an AutoMeanField"):
            fit(normal, (THREE,), guide=guide, num_restarts=2)

    def test_nothing_to_infer(self):
        def observed(x):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

        with pytest.raises(ModelError, match="no latent site"):
            fit(observed, (THREE,))

    def test_only_discrete_latents(self):
        def coin(x):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x[0])

        with pytest.raises(ModelError, match=r"no continuous latent site, only \['k'\]"):
            fit(coin, (THREE,))


def test_family_object_makes_the_guide():
    assert fit(normal, (THREE,), family=Normal()).guide.family == Normal()


def test_result_is_frozen():
    result = fit(normal, (THREE,))
    assert isinstance(result, FitResult)
    with pytest.raises(AttributeError):
        result.seed = 3


def test_losses_are_of_every_iteration(fitted):
    assert len(fitted.losses) > 0
    assert np.isfinite(fitted.losses).all()
    assert math.isclose(min(fitted.losses), -fitted.elbo, abs_tol=10 * fitted.elbo_se + 1.0)


def test_handlers_around_fit_are_refused_and_around_the_model_honoured():
    with pyro.poutine.scale(scale=2.0), pytest.raises(ValueError, match="Wrap the model"):
        fit(normal, (THREE,))
    doubled = fit(pyro.poutine.scale(normal, 2.0), (THREE,))
    plain = fit(normal, (THREE,))
    assert doubled.elbo != pytest.approx(plain.elbo, abs=0.1)


def test_gradient_modes_around_fit_do_not_matter():
    expected = fit(normal, (THREE,)).guide.loc.detach()
    with torch.no_grad():
        assert torch.equal(fit(normal, (THREE,)).guide.loc, expected)
    with torch.inference_mode():
        result = fit(normal, (THREE,))
    assert result.solver == "deterministic"
    torch.testing.assert_close(result.guide.loc.detach(), expected)
