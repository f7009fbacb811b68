"""Hierarchies in units of their priors' scales: the same posterior, and draws of all of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_mf as mf
from benchmarks.forward_problems import eight_schools
from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.noncentred import Noncentred, find_noncentred
from pyro_mf.solvers import moment_matching, posterior_sampling

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def schools(y=Y, sigma=SIGMA):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def classes_in_schools(y):
    """Two levels, the upper one with heavy tails, both non-centred at once."""
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    rho = pyro.sample("rho", dist.LogNormal(0.0, 1.0))
    with pyro.plate("school", 3, dim=-1):
        school = pyro.sample("school_mean", dist.StudentT(4.0, 0.0, tau))
        with pyro.plate("class", 4, dim=-2):
            mean = pyro.sample("class_mean", dist.Normal(school, rho))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def random_walk(y):
    step = pyro.sample("step", dist.LogNormal(-2.0, 1.0))
    x = 0.0
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(x, step))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


def vectors(y):
    """An event, and a scale per coordinate."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(torch.ones(2), scale).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


CASES = {
    "one level": (schools, ()),
    "two levels": (classes_in_schools, (torch.randn(4, 3),)),
    "one after another": (random_walk, (torch.randn(5),)),
    "events": (vectors, (torch.randn(6),)),
}


def gaussian_at(size):
    return torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_the_density_is_the_same_but_for_the_jacobian(case):
    model, args = CASES[case]
    log_joint = LogJoint(model, args, backend="graph")
    latents = {s.name: s.shape for s in log_joint.layout.sites if s.is_real and s.name != "mu"}
    found = Noncentred(log_joint, {name: torch.rand(shape) for name, shape in latents.items()})
    z = torch.randn(20, log_joint.size)
    e = found.to_noncentred(z)
    back, log_det = found.to_centred(e)
    torch.testing.assert_close(back, z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_joint(e) - log_det, log_joint(z), rtol=1e-10, atol=1e-9)
    # The log Jacobian is that of the map itself, by central differences.
    steps = 1e-5 * torch.eye(log_joint.size, dtype=torch.float64)
    ahead, behind = found.to_centred(e[0] + steps)[0], found.to_centred(e[0] - steps)[0]
    numeric = torch.linalg.slogdet((ahead - behind) / 2e-5)[1]
    assert float(numeric) == pytest.approx(float(log_det[0]), abs=1e-6)


def test_a_wrong_jacobian_would_be_seen():
    log_joint = LogJoint(schools, backend="graph")
    found = Noncentred(log_joint, {"theta": torch.zeros(8)})
    z = torch.randn(20, 10)
    e = found.to_noncentred(z)
    gap = found.log_joint(e) - log_joint(z)
    assert float(gap.abs().min()) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_hierarchies_that_data_say_little_of_are_found(case):
    model, args = CASES[case]
    log_joint = LogJoint(model, args, backend="graph")
    *_, found = find_noncentred(log_joint, *gaussian_at(log_joint.size))
    assert found is not None
    assert "mu" not in found.sites


def test_single_precision_is_no_obstacle():
    torch.set_default_dtype(torch.float32)
    try:
        log_joint = LogJoint(schools, (Y.float(), SIGMA.float()), backend="graph")
        *_, found = find_noncentred(log_joint, *gaussian_at(log_joint.size))
    finally:
        torch.set_default_dtype(torch.float64)
    assert log_joint.dtype == torch.float32
    assert found is not None
    assert found.sites == ("theta",)


def fixed_scale(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def not_a_scale(y):
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("n", len(y)):
        theta = pyro.sample("theta", dist.Gamma(2.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def scaled(y):
    with poutine.scale(scale=2.0):
        schools(y, torch.ones(len(y)))


@pytest.mark.parametrize("model", [fixed_scale, not_a_scale, scaled])
def test_others_are_left_alone(model):
    log_joint = LogJoint(model, (Y,), backend="graph")
    assert find_noncentred(log_joint, *gaussian_at(log_joint.size)) == [None]


def scale_by_label(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("n", len(y)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        theta = pyro.sample("theta", dist.Normal(0.0, torch.where(k > 0.5, 1.0 + tau, 0.2 * tau)))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def name_is_taken(y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    pyro.sample("theta_decentered", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize("model", [scale_by_label, name_is_taken])
def test_sites_that_cannot_be_reparametrised_do_not_stand_in_the_way(model):
    def beside(y):
        model(y)
        rho = pyro.sample("rho", dist.HalfNormal(1.0))
        with pyro.plate("m", 3):
            pyro.sample("effect", dist.Normal(0.0, rho))

    log_joint = LogJoint(beside, (Y,), backend="graph")
    *_, found = find_noncentred(log_joint, *gaussian_at(log_joint.size))
    assert found is not None
    assert found.sites == ("effect",)


def test_latents_that_data_know_well_are_left_alone():
    precise = SIGMA / 100.0
    log_joint = LogJoint(schools, (Y, precise), backend="graph")
    loc = torch.cat([torch.tensor([8.0, math.log(10.0)]), Y])
    sd = torch.cat([torch.tensor([3.0, 0.3]), precise])
    first, second = find_noncentred(log_joint, loc, sd)
    assert first is None
    assert second is not None


def test_sites_that_pyro_cannot_reparametrise_are_refused():
    log_joint = LogJoint(not_a_scale, (Y,), backend="graph")
    with pytest.raises(ModelError, match="cannot reparametrise"):
        Noncentred(log_joint, {"theta": torch.zeros(8)})


def test_the_draws_of_centred_schools_are_those_of_the_whole_funnel():
    target = eight_schools(centered=True)
    result = mf.fit(target.model, target.args, objective=mf.ForwardKL(), progress=False)
    assert result.stop_reason == "converged"
    draws = result.draws
    assert "('theta' non-centred)" in result.message
    layout = result.log_joint.layout
    # Ten means and sds, of which the largest error is below four standard errors, .1 sds.
    for name, (mean, sd) in target.truth.items():
        at = slice(layout[name].start, layout[name].stop)
        assert bool(((draws.mean[at] - mean).abs() / sd < 0.1).all()), name
        assert bool(((draws.sd[at] / sd).log().abs() < 0.1).all()), name
    # The log evidence, of which the density in other coordinates must not have lost a part.
    lower, lower_se, upper, upper_se = result.evidence
    assert lower - 4 * lower_se <= target.log_evidence <= upper + 4 * upper_se


def test_a_file_knows_in_which_coordinates_draws_were_made(tmp_path):
    target = eight_schools(centered=True)
    result = mf.fit(target.model, target.args, objective=mf.ForwardKL(), progress=False)
    result.save(tmp_path / "fit.pt")
    loaded = mf.FitResult.load(tmp_path / "fit.pt", target.model, target.args)
    assert loaded.draws.noncentred == result.draws.noncentred == ("theta",)


def groups(y):
    """Few of them under heavy-tailed scale: its wide end is narrow in units of the scale."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("group", 6):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("row", 30):
        pyro.sample("y", dist.Normal(effect[torch.arange(30) // 5], sigma), obs=y)


def test_an_ordinary_hierarchy_converges_and_stein_agrees():
    y = 1.0 + torch.randn(30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    result = mf.fit(groups, (y,), objective=mf.ForwardKL(), progress=False)
    assert result.stop_reason == "converged", result.message
    # Over the posterior gradients average to zero, and z times them to -1.
    z = result.draws.sample(20_000, seed=1)
    gradients = result.log_joint.value_and_grad(z)[1]
    terms = torch.cat([gradients, (z - z.mean(0)) * gradients + 1.0], 1)
    effective = min(result.draws.diagnostics["ess"], 20_000.0)
    assert bool((terms.mean(0).abs() / terms.std(0) * effective**0.5 < 5.0).all())


def test_without_an_optimum_in_other_coordinates_the_models_own_are_taken(monkeypatch):
    monkeypatch.setattr(posterior_sampling, "_start_in", lambda *_: None)
    target = eight_schools(centered=True)
    guide = mf.AutoMeanField(target.model).setup(*target.args)
    log_joint = LogJoint(target.model, target.args)
    outcome = moment_matching.solve_moments(log_joint, guide, max_gradients=1500)
    assert outcome.forward.draws.noncentred == ()


def test_an_interrupt_while_it_is_tried_again_keeps_the_draws_so_far(monkeypatch):
    """The first try is told that its errors are too large; the second is interrupted."""
    target = eight_schools(centered=True)
    log_joint = LogJoint(target.model, target.args)
    moments = [target.truth[site.name] for site in log_joint.layout.sites]
    loc, sd = (torch.cat([m[k].reshape(-1) for m in moments]) for k in (0, 1))
    draw, tries = posterior_sampling.PosteriorSampler.draw, []

    def drawn_once(sampler, method):
        tries.append(method)
        drawn = draw(sampler, method) if len(tries) == 1 else None
        sampler.ending = "converged" if len(tries) == 1 else "interrupted"
        return drawn

    monkeypatch.setattr(posterior_sampling.PosteriorSampler, "draw", drawn_once)
    monkeypatch.setattr(posterior_sampling, "_back", _with_large_errors)
    found = posterior_sampling.sample_posterior(
        Blocks(log_joint),
        loc,
        sd,
        method="importance",
        max_gradients=20_000,
        max_error=0.2,
        aim=0.2,
        seed=0,
        report=lambda _: None,
    )
    assert len(tries) == 2
    assert found.ending == "interrupted"
    assert found.drawn is not None


def _with_large_errors(drawn, *_):
    averages, draws = drawn
    return averages, replace(draws, mean_error=10.0 * draws.mean_error.clamp_min(0.1))


def test_control_in_the_models_own_coordinates_the_neck_is_missed(monkeypatch):
    monkeypatch.setattr(posterior_sampling, "find_noncentred", lambda *_: [None])
    target = eight_schools(centered=True)
    guide = mf.AutoMeanField(target.model).setup(*target.args)
    log_joint = LogJoint(target.model, target.args)
    outcome = moment_matching.solve_moments(log_joint, guide, max_gradients=2500)
    assert outcome.stop_reason == "budget"


def test_a_verdict_on_centred_schools_is_by_draws_of_the_whole_funnel():
    target = eight_schools(centered=True)
    found = mf.fit(target.model, target.args, progress=False).diagnose(progress=False)
    by_name = {check.name: check for check in found.checks}
    assert by_name["reference"].status == "green"
    assert found.status == "red"  # mean field has half of the sd of tau
