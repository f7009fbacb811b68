"""Forward KL by moment matching: exact marginals, and no confident wrong answer."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from benchmarks.forward_problems import eight_schools
from pyro_mf import AutoMeanField
from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.prior import Prior
from pyro_mf.solvers import chains, posterior_sampler
from pyro_mf.solvers.moment_matching import fit_given, solve_moments

CORRELATION = torch.tensor([[1.0, 0.9, 0.3], [0.9, 1.0, 0.2], [0.3, 0.2, 1.0]], dtype=torch.float64)
SDS = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
COVARIANCE = SDS[:, None] * CORRELATION * SDS
MEAN = torch.tensor([5.0, 0.0, -3.0], dtype=torch.float64)
TOTAL_CORRELATION = -0.5 * float(torch.logdet(CORRELATION))
LOG_EVIDENCE = 2.0  # of the Gaussian with a constant in front


def gaussian():
    pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))
    pyro.factor("constant", torch.tensor(LOG_EVIDENCE))


def bimodal():
    halves = dist.Categorical(torch.ones(2))
    components = dist.Normal(torch.tensor([-2.0, 2.0]), 0.5)
    pyro.sample("x", dist.MixtureSameFamily(halves, components))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("row", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def funnel_by_factors():
    """The same density, of which nobody sees what scales what."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (9,)))
    pyro.factor("rows", dist.Normal(0.0, (v / 2).exp()).log_prob(x).sum())


def swapped_labels(y):
    weight = pyro.sample("weight", dist.Beta(5.0, 5.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    logits = dist.Normal(loc, 1.0).log_prob(y[:, None])
    logits = logits + torch.stack([weight.log(), (-weight).log1p()])
    pyro.factor("y", logits.logsumexp(-1).sum())


def solve(model, *args, **options):
    guide = AutoMeanField(model).setup(*args)
    outcome = solve_moments(LogJoint(model, args, backend="graph"), guide, **options)
    return outcome, *(p.detach() for p in guide.flat_params())


def largest_error(outcome):
    draws = outcome.forward.draws
    return float(torch.maximum(draws.mean_error, draws.sd_error).max())


@pytest.mark.parametrize("method", [None, "importance", "hmc", "smc"])
def test_a_gaussian_has_its_own_marginals_and_its_evidence_between_the_bounds(method):
    outcome, loc, scale = solve(gaussian, method=method)
    assert outcome.converged, outcome.message
    draws = outcome.forward.draws
    assert draws.source == (method or "importance")
    # Four standard errors, which the tolerance keeps below 0.1; 6 numbers are looked at.
    assert bool(((loc - MEAN).abs() / SDS <= 4 * draws.mean_error + 1e-3).all())
    assert bool(((scale / SDS).log().abs() <= 4 * draws.sd_error + 1e-3).all())
    assert largest_error(outcome) <= (0.025 if method == "smc" else 0.0125)
    forward = outcome.forward
    gap = forward.eubo - LOG_EVIDENCE
    assert abs(gap - TOTAL_CORRELATION) <= 4 * forward.eubo_se + 0.02
    assert outcome.elbo < LOG_EVIDENCE < forward.eubo
    lower, lower_se, upper, upper_se = forward.bounds
    assert lower - 4 * lower_se - 1e-6 <= LOG_EVIDENCE <= upper + 4 * upper_se + 1e-6
    assert upper - lower < 0.1  # linear response is exact here, and the draws nearly are


def test_two_modes_are_both_in_the_marginal():
    outcome, loc, scale = solve(bimodal)
    assert outcome.converged, outcome.message
    draws = outcome.forward.draws
    assert abs(float(loc)) <= 4 * float(draws.mean_error) * math.sqrt(4.25) + 0.01
    assert abs(float(scale) - math.sqrt(4.25)) < 0.05 * math.sqrt(4.25)
    # KL(p || q) of a mixture whose modes hardly overlap: entropy of q less that of p.
    divergence = 0.5 * math.log(4.25 / 0.25) - math.log(2.0)
    forward = outcome.forward
    assert abs(forward.eubo - divergence) < 4 * forward.eubo_se + 0.02


def test_control_without_scouts_one_of_two_far_modes_is_taken_for_all(monkeypatch):
    y = torch.cat([torch.randn(40) - 2.5, torch.randn(40) + 2.5])
    outcome, _, scale = solve(swapped_labels, y, max_gradients=4000)
    assert not outcome.converged or float(scale[1:].min()) > 1.0
    assert any("another mode" in note for note in outcome.notes)
    nobody = torch.zeros(0, 3, dtype=torch.float64)
    monkeypatch.setattr(posterior_sampler, "send_scouts", lambda *_, **__: nobody)
    fooled, _, scale = solve(swapped_labels, y)
    assert fooled.converged
    assert float(scale[1:].max()) < 0.5


@pytest.mark.parametrize("model", [funnel, funnel_by_factors])
def test_a_funnel_is_not_said_to_have_converged(model):
    """Its rows have tails whose sd no number of draws tells."""
    outcome, _, _ = solve(model, max_gradients=2500)
    assert outcome.stop_reason == "budget"
    assert "k-hat" in " ".join((outcome.message, *outcome.notes))
    assert outcome.forward.draws.problems


def test_the_scale_of_a_funnel_is_known_where_it_is_seen_to_be_one():
    _, loc, scale = solve(funnel)
    assert abs(float(loc[0])) / 3.0 < 0.1  # four standard errors
    assert abs(math.log(float(scale[0]) / 3.0)) < 0.1


def test_a_model_that_fails_at_draws_of_its_prior_is_fitted_all_the_same():
    def fails_above_two(y):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        tril = torch.linalg.cholesky((2.0 - z) * torch.eye(1))
        pyro.sample("y", dist.Normal(z + 0.0 * tril.sum(), 0.1), obs=y)

    y = torch.tensor(-1.0)
    with pytest.raises(ModelError, match="fails at a draw from its prior"):
        Prior(LogJoint(fails_above_two, (y,))).sample(100, torch.Generator().manual_seed(0))
    outcome, loc, scale = solve(fails_above_two, y)
    assert outcome.converged
    exact = 1.0 / math.sqrt(1.0 / 9.0 + 100.0)
    assert float(scale) == pytest.approx(exact, rel=0.1)
    assert float(loc) == pytest.approx(-100.0 * exact**2, abs=0.1 * exact)


def test_same_seed_same_bits_and_the_global_generator_stays():
    state = torch.get_rng_state()
    first, loc, scale = solve(gaussian, seed=3)
    again, loc_again, scale_again = solve(gaussian, seed=3)
    assert torch.equal(loc, loc_again)
    assert torch.equal(scale, scale_again)
    assert first.forward.eubo == again.forward.eubo
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(loc, solve(gaussian, seed=4)[1])


def test_an_interrupt_keeps_the_chains_so_far():
    def stop(progress):
        if progress.phase.startswith("hmc, error"):
            raise KeyboardInterrupt

    outcome, loc, scale = solve(gaussian, method="hmc", tolerance=0.001, report=stop)
    assert outcome.stop_reason == "interrupted"
    assert len(outcome.forward.draws.z) >= 64 * 50
    assert bool(((loc - MEAN).abs() / SDS < 0.3).all())


def test_an_interrupt_before_any_draws_keeps_the_reverse_fit():
    def stop(progress):
        if progress.phase == "scouts":
            raise KeyboardInterrupt

    outcome, loc, scale = solve(gaussian, report=stop)
    assert outcome.stop_reason == "interrupted"
    assert outcome.forward is None
    assert torch.allclose(loc, MEAN, atol=1e-3)
    assert torch.allclose(scale, torch.linalg.inv(COVARIANCE).diagonal().rsqrt(), rtol=1e-3)


def test_a_budget_that_is_too_small_is_said():
    outcome, loc, _ = solve(gaussian, method="hmc", max_gradients=60)
    assert outcome.stop_reason == "budget"
    assert bool(torch.isfinite(loc).all())
    assert outcome.num_gradients <= 61


def test_chains_are_twice_as_precise_as_needed_while_that_is_cheap():
    cheap, *_ = solve(gaussian, method="hmc", tolerance=0.04)
    dear, *_ = solve(gaussian, method="hmc", tolerance=0.04, max_gradients=3000)
    assert cheap.converged
    assert dear.converged
    assert largest_error(cheap) <= 0.04 / 8 < largest_error(dear) <= 0.04 / 4
    assert dear.num_gradients < cheap.num_gradients


def test_an_improper_posterior_is_refused_as_by_the_reverse_fit():
    def improper():
        real = torch.distributions.constraints.real
        x = pyro.sample("x", dist.ImproperUniform(real, (), ()))
        pyro.factor("f", -0.5 * torch.relu(-x).square())

    outcome, *_ = solve(improper)
    assert outcome.stop_reason == "diverged"
    assert outcome.forward is None


class TestGivenDraws:
    def given(self, chains=4, length=500):
        tril = torch.linalg.cholesky(COVARIANCE)
        return MEAN + torch.randn(chains, length, 3, dtype=torch.float64) @ tril.T

    def fit(self, z):
        guide = AutoMeanField(gaussian).setup()
        outcome = fit_given(LogJoint(gaussian), guide, z)
        return outcome, *(p.detach() for p in guide.flat_params())

    def test_moments_are_those_of_the_draws(self):
        z = self.given()
        outcome, loc, scale = self.fit(z)
        assert outcome.converged, outcome.message
        flat = z.flatten(0, 1)
        assert torch.allclose(loc, flat.mean(0))
        assert torch.allclose(scale, flat.std(0, correction=0))
        forward = outcome.forward
        assert abs(forward.eubo - LOG_EVIDENCE - TOTAL_CORRELATION) <= 4 * forward.eubo_se + 0.02

    @pytest.mark.parametrize("num_stuck", [1, 3])
    def test_a_chain_in_another_place_is_seen(self, num_stuck):
        z = self.given(chains=8)
        z[:num_stuck] += 6 * SDS
        outcome, *_ = self.fit(z)
        assert outcome.stop_reason == "budget"
        assert "chains do not agree (R-hat" in outcome.message

    def test_a_chain_that_never_moves_is_seen(self):
        z = self.given(chains=64)
        z[3] = z[3, 0]
        outcome, *_ = self.fit(z)
        assert "1 of 64 chains never move" in outcome.message
        z = self.given(chains=64)
        z[3, :, 1] = 0.0  # in one latent alone
        outcome, *_ = self.fit(z)
        assert "1 of 64 chains never move" in outcome.message

    def test_draws_of_another_model_are_seen(self):
        def half():
            pyro.sample("x", dist.MultivariateNormal(MEAN, COVARIANCE))
            x = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(x > 0, 0.0, -math.inf))

        guide = AutoMeanField(half).setup()
        z = torch.cat([self.given(), torch.randn(4, 500, 1, dtype=torch.float64)], -1)
        outcome = fit_given(LogJoint(half), guide, z)
        assert "no finite density at" in outcome.message


def test_chains_that_have_run_long_must_agree_more_closely():
    offsets = 0.25 * torch.randn(64, 1, dtype=torch.float64)  # R-hat of about 1.03
    z = offsets + torch.randn(1000, 64, 1, dtype=torch.float64)
    draws = chains.ChainDraws(z, z[..., 0])
    assert 1.02 < draws.mixing.worst_rhat < 1.05
    assert not draws.problems(["x"])
    assert "above 1.02" in draws.problems(["x"], chains.MAX_LATE_RHAT)[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_chains_of_centred_eight_schools_do_not_converge_by_chance(seed):
    target = eight_schools(centered=True)
    outcome, loc, scale = solve(target.model, *target.args, method="hmc", seed=seed)
    names = LogJoint(target.model, target.args).layout.element_names()
    mean, sd = target.truth["tau"]
    tau = names.index("tau")
    ratio = float((scale[tau] / sd).log())
    assert not outcome.converged or abs(ratio) < 0.1, (ratio, float((loc[tau] - mean) / sd))
