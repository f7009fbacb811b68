"""What a ``FitResult`` offers, for every kind of latent site; nearly all without a solver."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch.distributions import MultivariateNormal

from pyro_mf._errors import LinearResponseError
from pyro_mf.compare import compare_posteriors
from pyro_mf.convert import from_pyro_svi, generations
from pyro_mf.convert.guide_draws import draw_guide
from pyro_mf.fitting import fit
from pyro_mf.fitting.problem import read_problem
from pyro_mf.fitting.response import Response
from pyro_mf.fitting.restarts import Optimum, current_params
from pyro_mf.fitting.result import FitResult
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.outcome import Outcome
from tests.cases import MODELS

FULL = [name for name, case in MODELS.items() if not case.is_subsampled]


def make_result(name, num_restarts=1):
    """A result with made-up parameters and a made-up covariance."""
    case = MODELS[name]
    problem = read_problem(case.model, case.args())
    guide = problem.guide.setup(*problem.model_args)
    size = guide.layout.size
    generator = torch.Generator().manual_seed(1)
    root = 0.1 * torch.randn(size, size, generator=generator) + 0.2 * torch.eye(size)
    optima = []
    for k in range(num_restarts):
        loc = 0.3 * torch.randn(size, generator=generator) + k
        guide.set_flat_params((loc, torch.linspace(0.1, 0.2, size)))
        outcome = Outcome(-3.0 - k, 0.1, "converged", "made up", (3.0,), 7, {"optimise": 0.1})
        optima.append(Optimum(k, outcome, current_params(guide)))
    guide.set_flat_params(optima[0].params)
    response = Response(LinearResponse(optima[0].params[0], root @ root.T), "", -2.0, 0.1)
    return FitResult(
        problem, "deterministic", "made up", 0, tuple(optima), 0, {"optimise": 0.1}, (), response
    )


@pytest.mark.parametrize("name", FULL)
class TestEveryKindOfSite:
    def test_summary_agrees_with_draws(self, name):
        result = make_result(name)
        table = result.summary()
        num, z = 4000, 6.0
        for linear, suffix in ((False, ""), (True, "_lr")):
            draws = result.sample(num, linear_response=linear, seed=5)
            flat = torch.cat([v.reshape(num, -1) for v in draws.values()], 1).double().numpy()
            assert table.index.is_unique
            error = np.sqrt(2.0) * flat.std(0) / np.sqrt(num)  # the table's may be draws as well
            assert (abs(table[f"mean{suffix}"] - flat.mean(0)) <= z * error + 1e-9).all()
            assert np.allclose(table[f"sd{suffix}"], flat.std(0), rtol=0.25, atol=1e-9)
            if not linear:
                inside = (flat > table["5%"].to_numpy()) & (flat < table["95%"].to_numpy())
                moving = flat.std(0) > 1e-9
                assert (abs(inside.mean(0) - 0.9)[moving] < z * np.sqrt(0.09 / num) * 1.5).all()

    def test_linear_response_guide_has_its_density(self, name):
        result = make_result(name)
        guide = result.linear_response_guide()
        args, layout = result.problem.model_args, result.layout
        draws = draw_guide(guide, args, {}, layout, 20, 0)
        found = result.linear_response()
        truth = MultivariateNormal(found.loc, found.covariance).log_prob(draws.z)
        assert draws.why_no_log_q == ""
        torch.testing.assert_close(draws.log_q, truth, rtol=1e-6, atol=1e-6)

    def test_file(self, name, tmp_path):
        result = make_result(name)
        result.save(tmp_path / "fit.pt")
        loaded = FitResult.load(tmp_path / "fit.pt", MODELS[name].model, MODELS[name].args())
        assert torch.equal(loaded.guide.loc, result.guide.loc)
        assert str(loaded) == str(result)


@pytest.mark.parametrize("name", [n for n, case in MODELS.items() if case.is_subsampled])
def test_minibatch_models_have_all_but_linear_response(name, tmp_path):
    case = MODELS[name]
    problem = read_problem(case.model, case.args())
    problem.guide.setup(*problem.model_args)
    outcome = Outcome(-3.0, 0.1, "converged", "made up", (3.0,), 7, {})
    optimum = Optimum(0, outcome, current_params(problem.guide))
    result = FitResult(problem, "stochastic", "made up", 0, (optimum,), 0, {})
    table = result.summary()
    assert [f"z[{i}]" for i in range(10)] == list(table.index[1:])
    assert table["sd_lr"].isna().all()
    assert "needs the full data" in table.attrs["linear_response"]
    assert table.attrs["believe"] == "sd"
    assert result.sample(7)["z"].shape == (7, 10)
    with pytest.raises(LinearResponseError, match="needs the full data"):
        result.linear_response_guide()
    result.save(tmp_path / "fit.pt")
    loaded = FitResult.load(tmp_path / "fit.pt", case.model, case.args())
    assert torch.equal(loaded.guide.loc, result.guide.loc)


class TestSummary:
    def test_real_and_positive_sites_are_exact(self):
        result = make_result("real in a plate")
        loc, scale = result.restarts[0].params
        table = result.summary()
        assert list(table.index) == ["mu", "tau", "theta[0]", "theta[1]", "theta[2]"]
        assert np.allclose(table.loc["mu", ["mean", "sd"]], [loc[0], scale[0]])
        mean = (loc[1] + scale[1] ** 2 / 2).exp()
        sd = mean * (scale[1].square().exp() - 1).sqrt()
        assert np.allclose(table.loc["tau", ["mean", "sd"]].tolist(), [mean, sd])
        low = (loc[1] - 1.6448536 * scale[1]).exp()
        assert np.isclose(table.loc["tau", "5%"], low)

    def test_deterministic_sites_are_added_on_request(self):
        def model(x):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2.0 * z)

        problem = read_problem(model, (None,))
        problem.guide.setup(None)
        outcome = Outcome(0.0, 0.1, "converged", "", (), 1, {}, refusal="none made")
        optimum = Optimum(0, outcome, current_params(problem.guide))
        result = FitResult(problem, "deterministic", "", 0, (optimum,), 0, {})
        assert list(result.summary().index) == ["z"]
        table = result.summary(deterministic=True)
        assert list(table.index) == ["z", "twice"]
        assert np.isclose(table.loc["twice", "sd"], 0.2, rtol=0.05)
        assert table.attrs == {"believe": "sd", "linear_response": "none made"}


class TestArviz:
    def test_a_result_converts(self):
        result = make_result("real in a plate")
        for linear in (False, True):
            data = result.to_arviz(linear_response=linear, num_draws=200)
            posterior = generations.dataset(data, "posterior")
            assert posterior.sizes["draw"] == 200
            assert posterior.attrs["solver"] == "deterministic"
            assert posterior.attrs["sampling_time"] == pytest.approx(0.1)
            stats = generations.dataset(data, "sample_stats")
            assert np.isfinite(stats["log_weight"]).all()

    def test_one_chain_per_optimum(self):
        result = make_result("real in a plate", num_restarts=3)
        before = current_params(result.guide)
        data = result.to_arviz(num_draws=500, prior=50)
        mu = generations.dataset(data, "posterior")["mu"]
        assert mu.sizes == {"chain": 3, "draw": 500}
        assert list(mu["chain"].values) == [0, 1, 2]
        for chain, optimum in enumerate(result.restarts):
            loc, scale = (float(p[0]) for p in optimum.params)
            error = 5.0 * scale / np.sqrt(500)
            assert abs(float(mu[chain].mean()) - loc) < error
        assert generations.dataset(data, "sample_stats")["lp"].shape == (3, 500)
        assert generations.dataset(data, "prior")["mu"].shape == (1, 50)
        assert all(map(torch.equal, before, current_params(result.guide)))

    @pytest.mark.parametrize("given", [{"num_chains": 2}, {"like": "other"}])
    def test_chains_that_are_asked_for_are_of_the_best(self, given):
        result = make_result("real in a plate", num_restarts=3)
        if "like" in given:
            given = {"like": make_result("real in a plate").to_arviz(num_chains=2)}
        mu = generations.dataset(result.to_arviz(**given), "posterior")["mu"]
        loc, scale = (float(p[0]) for p in result.restarts[0].params)
        assert mu.sizes["chain"] == 2
        assert float(abs(mu.mean("draw") - loc).max()) < 5 * scale / np.sqrt(1000)

    def test_comparison_takes_a_result_and_its_linear_response(self):
        result = make_result("real in a plate")
        baseline = result.to_arviz(linear_response=True, num_chains=2, seed=7)
        report = compare_posteriors(
            baseline, {"reverse": result, "lr": result.to_arviz(linear_response=True)}
        )
        ratio = report.table["sd_ratio"].unstack("fit")
        assert np.allclose(ratio["lr"], 1.0, atol=0.15)
        assert not np.allclose(ratio["reverse"], 1.0, atol=0.15)


class TestLinearResponseGuide:
    def test_predictive_and_second_guide(self):
        result = make_result("real in a plate")
        guide, other = result.linear_response_guide(), result.linear_response_guide()
        other.scale = torch.full_like(other.scale, 5.0)
        args = result.problem.model_args
        draws = Predictive(MODELS["real in a plate"].model, guide=guide, num_samples=300)(*args)
        assert draws["theta"].shape == (300, 3)
        sd = float(result.linear_response().sd[0])
        assert float(draws["mu"].std()) == pytest.approx(sd, rel=0.25)  # not the other's 5

    def test_an_old_guide_of_the_users_is_left_alone(self):
        result = make_result("real in a plate")
        mine = pyro.infer.autoguide.AutoMultivariateNormal(result.problem.model)
        mine(*result.problem.model_args)
        before = pyro.param("AutoMultivariateNormal.scale").clone()
        result.linear_response_guide()
        assert torch.equal(pyro.param("AutoMultivariateNormal.scale"), before)

    def test_converts_by_itself(self):
        result = make_result("discrete summed out")
        args, model = result.problem.model_args, result.problem.model
        data = from_pyro_svi(result.linear_response_guide(), args, model=model, num_draws=100)
        assert np.isfinite(generations.dataset(data, "sample_stats")["log_weight"]).all()


def test_linear_response_of_chosen_sites():
    def chain(size):
        def model():
            level = pyro.sample("level", dist.Normal(0.0, 2.0))
            steps = dist.Normal(torch.zeros(size), 1.0).to_event(1)
            noise = pyro.sample("noise", steps)
            pyro.sample("sum", dist.Normal(level + noise.sum() / size, 0.1), obs=torch.tensor(1.0))

        return model

    small, large = fit(chain(5)), fit(chain(450))
    part = small.linear_response(["noise", "level"])
    whole = small.linear_response()
    assert part.loc[-1] == whole.loc[0]
    torch.testing.assert_close(part.covariance[:5, :5], whole.covariance[1:, 1:])
    with pytest.raises(ValueError, match="sites must be a list of some of"):
        small.linear_response(["nose"])
    with pytest.raises(LinearResponseError, match="name them"):
        large.linear_response()
    assert large.summary()["sd_lr"].isna().all()
    # Normal prior and Normal data: variance 1 / (1/4 + 1 / (0.01 + 1/450)) of the level
    variance = 1.0 / (0.25 + 1.0 / (0.01 + 1.0 / 450))
    found = large.linear_response(["level"])
    assert float(found.sd[0]) == pytest.approx(variance**0.5, rel=1e-5)
