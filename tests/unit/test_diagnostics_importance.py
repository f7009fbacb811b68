"""Checks by importance weights: each fires where it must, stays quiet where it must, and is exact
where there is a formula.
"""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf import AutoMeanField
from pyro_mf._errors import GuideMismatchError, GuideNotSetUpError, KhatWarning, ModelError
from pyro_mf.density import LogJoint
from pyro_mf.diagnostics.evidence import evidence_bracket, mcse, multi_draw_elbos
from pyro_mf.diagnostics.full_data import on_full_data
from pyro_mf.diagnostics.importance import importance_resample, systematic
from pyro_mf.diagnostics.khat import marginal_log_prob, site_khats
from pyro_mf.diagnostics.proposals import Proposal, guide_proposal, response_proposal
from pyro_mf.diagnostics.symmetry import asymmetry
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.posterior_draws import PosteriorDraws
from pyro_mf.weights import psis


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def equicorrelated(size: int, rho: float) -> torch.Tensor:
    return torch.full((size, size), rho) + (1.0 - rho) * torch.eye(size)


def gaussian(loc: torch.Tensor, covariance: torch.Tensor) -> LogJoint:
    """A model whose posterior is this Gaussian, with evidence one."""

    def model():
        pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    return LogJoint(model)


def proposal_of(loc: torch.Tensor, covariance: torch.Tensor) -> Proposal:
    return response_proposal(LinearResponse(loc, covariance))


def posterior_of(log_joint: LogJoint, z: torch.Tensor, **diagnostics: float) -> PosteriorDraws:
    nothing = torch.zeros(z.shape[1])
    weights = torch.zeros(len(z))
    return PosteriorDraws(
        "given", z, weights, log_joint(z), nothing, nothing, diagnostics=diagnostics
    )


SIZE, RHO = 4, 0.6
LOC, COVARIANCE = torch.arange(SIZE, dtype=torch.float64), equicorrelated(SIZE, RHO).double()
PRECISION = torch.linalg.inv(COVARIANCE)
REVERSE = torch.diag(1.0 / PRECISION.diagonal())  # the mean-field optimum, METHODS 3.1


# -- k-hat of marginals ----------------------------------------------------------------------------


def layout_of(size: int):
    return gaussian(torch.zeros(size), torch.eye(size)).layout


def log_normal(z: torch.Tensor, sd: torch.Tensor | float = 1.0) -> torch.Tensor:
    return dist.Normal(0.0, sd).log_prob(z)


def test_right_marginals_of_a_wrong_joint_are_good():
    covariance = equicorrelated(10, 0.9)
    z, reference = normal(2000, 10, seed=0), normal(2000, 10, seed=1)
    reference = reference @ torch.linalg.cholesky(covariance).T
    joint = psis(gaussian(torch.zeros(10), covariance)(z) - log_normal(z).sum(1))
    assert joint.khat - 2.0 * joint.khat_se > joint.threshold
    found = site_khats(layout_of(10), z, reference, log_q=log_normal)
    # An element in 40 is told apart by chance.
    assert found.good.sum() >= 9
    assert not found.bad.any()
    assert float(found.distance.max()) < 0.06


@pytest.mark.parametrize("sd", [0.4, 0.55, 0.7])
def test_khat_of_a_narrow_marginal_is_that_of_the_density(sd):
    # The index is 1 - s^2 for a factor of sd s against 1, which 2000 draws reach to within 0.2.
    z, reference = sd * normal(2000, 10, seed=2), normal(2000, 10, seed=3)
    found = site_khats(layout_of(10), z, reference, log_q=lambda u: log_normal(u, sd))
    exact = torch.tensor([psis(c).khat for c in (log_normal(z) - log_normal(z, sd)).T])
    assert abs(found.khat.mean() - (1.0 - sd**2)) < 0.2
    assert abs((found.khat - exact).mean()) < 0.05
    # Where the draws' own k-hat is low by luck, the share of p that they miss may say otherwise.
    is_near = (found.khat - exact).abs() < 2.0 * found.khat_se
    assert is_near.sum() >= 9
    assert (found.khat[~is_near] > found.threshold).all()


def test_a_marginal_that_is_too_wide_is_bounded_and_far():
    z, reference = 1.5 * normal(2000, 5, seed=4), normal(2000, 5, seed=5)
    found = site_khats(layout_of(5), z, reference, log_q=lambda u: log_normal(u, 1.5))
    assert (found.khat < 0.0).all()
    # Total variation of two centred Normals, one 1.5 times as wide: 0.19.
    assert (found.distance - 0.193).abs().max() < 0.06


@pytest.mark.parametrize(("shape", "is_known"), [("normal", True), ("student", False)])
def test_equal_marginals_are_not_told_apart(shape, is_known):
    # False alarms among 40: at most 7.5 % above the threshold, and none by two standard errors.
    t = torch.distributions.StudentT(5.0)
    with torch.random.fork_rng():
        torch.manual_seed(6)
        draws = t.sample((4000, 40)) if shape == "student" else torch.randn(4000, 40)
    log_q = (t.log_prob if shape == "student" else log_normal) if is_known else None
    found = site_khats(layout_of(40), draws[:2000], draws[2000:], log_q=log_q)
    assert (~found.good).double().mean() <= 0.075
    assert not found.bad.any()
    assert (found.khat == -math.inf).double().mean() >= 0.85
    assert (found.khat_se[found.khat == -math.inf] == 0.0).all()


def test_a_mode_that_q_misses_is_seen_by_the_reference():
    side = torch.where(torch.rand(3000, 1, generator=generator(8)) < 0.5, -2.0, 2.0)
    reference = side + 0.5 * normal(3000, 1, seed=9)
    z = 2.0 + 0.5 * normal(3000, 1, seed=10)
    exact = torch.logaddexp(log_normal(z - 2.0, 0.5), log_normal(z + 2.0, 0.5)) - math.log(2.0)
    assert abs(float(exact.mean() - log_normal(z - 2.0, 0.5).mean()) + math.log(2.0)) < 0.01
    found = site_khats(layout_of(1), z, reference, log_q=lambda u: log_normal(u - 2.0, 0.5))
    assert found.bad.all()
    assert abs(float(found.distance) - 0.5) < 0.05


def test_heavy_tails_that_a_normal_has_not_are_seen():
    t = torch.distributions.StudentT(3.0)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        reference = t.sample((4000, 6))
    z = normal(4000, 6, seed=12)
    exact = torch.tensor([psis(c).khat for c in (t.log_prob(z) - log_normal(z)).T])
    found = site_khats(layout_of(6), z, reference, log_q=log_normal)
    assert ((found.khat - exact).abs() < 3.0 * found.khat_se + 0.2).all()
    assert (found.khat > 0.4).all()  # the index is 1, which shows only far out


def test_an_unknown_density_of_q_is_estimated():
    z, reference = 0.5 * normal(2000, 4, seed=13), normal(2000, 4, seed=14)
    known = site_khats(layout_of(4), z, reference, log_q=lambda u: log_normal(u, 0.5))

    def half_known(u):
        return log_normal(u, 0.5) + torch.tensor([math.nan, math.nan, 0.0, 0.0])

    found = site_khats(layout_of(4), z, reference, log_q=half_known)
    assert torch.equal(found.khat[2:], known.khat[2:])
    assert (found.khat - known.khat).abs().max() < 0.3


def test_weighted_references_count():
    z, wide = 0.5 * normal(2000, 3, seed=15), 2.0 * normal(8000, 3, seed=16)
    log_weights = (log_normal(wide) - log_normal(wide, 2.0)).sum(1)
    found = site_khats(
        layout_of(3), z, wide, log_weights=log_weights, log_q=lambda u: log_normal(u, 0.5)
    )
    assert ((found.khat - 0.75).abs() < 0.2).all()
    few = site_khats(layout_of(3), z, wide, log_weights=log_weights, reference_ess=300.0)
    assert few.num_draws == 300
    assert few.threshold == pytest.approx(1.0 - 1.0 / math.log10(300))


def test_angles_count_up_to_a_turn():
    def model():
        pyro.sample("angle", dist.VonMises(3.0, 4.0))

    guide = AutoMeanField(model, family="von_mises").setup()
    layout = LogJoint(model).layout
    z = guide.sample_unconstrained(2000)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        reference = dist.VonMises(3.0, 4.0).sample((2000, 1))
    turned = reference + 2.0 * math.pi * (torch.arange(2000) % 3)[:, None]

    def log_q(u):
        return marginal_log_prob(guide, u)

    narrow = [site_khats(layout, z, r, log_q=log_q) for r in (reference, turned)]
    assert float(narrow[0].khat) == pytest.approx(float(narrow[1].khat), abs=1e-6)
    assert float(narrow[0].distance) == pytest.approx(float(narrow[1].distance), abs=1e-6)


def test_sites_are_judged_by_their_worst_element():
    def model():
        with pyro.plate("p", 3):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Gamma(2.0, 1.0))

    layout = LogJoint(model).layout
    z, reference = normal(1000, 4, seed=17), normal(1000, 4, seed=18)
    z[:, 1] *= 0.3
    found = site_khats(layout, z, reference)
    assert found.worst[0] == "a[1]"
    assert found.sites["a"] == found.khat[1] > found.sites["b"]


def test_marginal_densities_sum_to_the_guides():
    def model():
        pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("p", 3):
            pyro.sample("b", dist.Gamma(2.0, 1.0))

    guide = AutoMeanField(model, family={"b": "gamma"}).setup()
    z = guide.sample_unconstrained(7)
    marginals = marginal_log_prob(guide, z)
    torch.testing.assert_close(marginals.sum(1), guide.log_prob_unconstrained(z))
    blocks = AutoMeanField(model, family={"a": "full_rank"}).setup()
    is_unknown = marginal_log_prob(blocks, z).isnan()
    assert is_unknown[:, :2].all()
    assert not is_unknown[:, 2:].any()


def test_bad_draws_for_marginals_are_refused():
    z, good = normal(500, 2, seed=19), normal(500, 2, seed=20)
    layout = layout_of(2)
    infinite, point = good.clone(), good.clone()
    infinite[3, 0] = math.inf
    point[:, 1] = 2.0
    with pytest.raises(
        ValueError, match="has 50 effective draws, and k-hat of marginals needs 100"
    ):
        site_khats(layout, z, good[:50])
    with pytest.raises(ValueError, match=r"shape \(number, 2\), an entry per element of \['z'\]"):
        site_khats(layout, z, good[:, :1])
    with pytest.raises(ValueError, match="reference must be finite"):
        site_khats(layout, z, infinite)
    with pytest.raises(ValueError, match=r"z has one value only at element 'z\[1\]'"):
        site_khats(layout, point, good)
    with pytest.raises(ValueError, match=r"log_weights of shape \(500,\)"):
        site_khats(layout, z, good, log_weights=torch.zeros(4))
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        site_khats(layout, z, good, log_weights=torch.full((500,), math.nan))


# -- resampling ------------------------------------------------------------------------------------


def test_resampled_draws_have_the_posteriors_moments():
    log_joint = gaussian(LOC, COVARIANCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importance_resample(
            log_joint, proposal_of(LOC + 0.2, 1.3 * COVARIANCE), num_draws=4000, seed=1
        )
    assert found.good
    assert found.notes == ()
    # Two draws in three are worth one of 40 000 proposals; z = 5.
    error = 5.0 / math.sqrt(4000)
    assert (found.z.mean(0) - LOC).abs().max() < error
    assert (found.z.T.cov() - COVARIANCE).abs().max() < 2.0 * error
    assert torch.equal(found.samples["z"], found.z)
    again = importance_resample(
        log_joint, proposal_of(LOC + 0.2, 1.3 * COVARIANCE), num_draws=4000, seed=1
    )
    assert torch.equal(found.z, again.z)


def test_a_mean_field_proposal_that_is_too_narrow_is_warned_about():
    covariance = equicorrelated(10, 0.9)
    narrow = torch.diag(1.0 / torch.linalg.inv(covariance).diagonal())
    with pytest.warns(KhatWarning, match=r"k-hat .* above 0\.70.*linear response") as record:
        found = importance_resample(
            gaussian(torch.zeros(10), covariance), proposal_of(torch.zeros(10), narrow)
        )
    assert record[0].filename == __file__
    assert not found.good
    assert str(record[0].message) == found.notes[0]


def test_no_draw_is_repeated_more_than_its_weight_asks_for():
    weights = torch.softmax(2.0 * normal(300, seed=21), 0)
    for num in (1, 50, 1000):
        rows = systematic(weights, num, generator(num))
        counts = torch.bincount(rows, minlength=300)
        assert counts.sum() == num
        assert ((counts - num * weights).abs() < 1.0).all()
    assert (systematic(torch.tensor([0.0, 1.0, 0.0]), 9, generator(0)) == 1).all()


def test_resampling_is_unbiased():
    # Means over 2000 repetitions; z = 5 of a count that is floor or ceiling.
    weights = torch.tensor([0.05, 0.5, 0.15, 0.3])
    counts = torch.stack(
        [torch.bincount(systematic(weights, 3, generator(s)), minlength=4) for s in range(2000)]
    ).double()
    assert (counts.mean(0) - 3.0 * weights).abs().max() < 5.0 * 0.5 / math.sqrt(2000)


def test_few_distinct_draws_are_noted():
    narrow = proposal_of(LOC, COVARIANCE)
    found = importance_resample(
        gaussian(LOC, COVARIANCE), narrow, num_draws=1000, num_proposals=100
    )
    assert found.num_distinct == 100
    assert "only 100 of the 1000 draws are different" in found.notes[-1]


def test_bad_proposals_are_refused():
    log_joint = gaussian(LOC, COVARIANCE)

    def nan(num: int, seed: int):
        return normal(num, SIZE, seed=seed), torch.full((num,), math.nan)

    def infinite(num: int, seed: int):
        return normal(num, SIZE, seed=seed), torch.full((num,), -math.inf)

    def flat(num: int, seed: int):
        return normal(num, SIZE + 1, seed=seed), torch.zeros(num)

    for bad in (nan, infinite):
        with pytest.raises(ValueError, match=r"4000 of 4000 log weights are NaN or \+inf"):
            importance_resample(log_joint, bad, num_draws=10)
    with pytest.raises(ValueError, match=r"must return draws of shape \(4000, 4\)"):
        importance_resample(log_joint, flat, num_draws=10)
    good = proposal_of(LOC, COVARIANCE)
    with pytest.raises(ValueError, match="num_proposals must be at least 25"):
        importance_resample(log_joint, good, num_proposals=24)
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        importance_resample(log_joint, good, num_draws=0)


def test_draws_where_the_model_has_no_density_are_left_out():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 0.0, 0.0, -math.inf))

    wide = proposal_of(torch.zeros(1), 2.0 * torch.eye(1))
    found = importance_resample(LogJoint(model), wide, num_draws=500)
    assert (found.z > 0.0).all()

    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 100.0, 0.0, -math.inf))

    with pytest.raises(ValueError, match="every log weight is -inf"):
        importance_resample(LogJoint(impossible), wide, num_draws=500)


def test_draws_at_which_the_model_raises_have_no_weight():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        factor = torch.linalg.cholesky(torch.eye(2) + a * (1.0 - torch.eye(2)))
        pyro.factor("f", 0.0 * factor.sum())

    wide = proposal_of(torch.zeros(1), torch.eye(1))
    found = importance_resample(LogJoint(model), wide, num_draws=200, num_proposals=400)
    assert (found.z.abs() < 1.0).all()
    lopsided = asymmetry(LogJoint(model), normal(50, 1, seed=42) * 0.2, torch.full((1,), 0.9))
    assert lopsided.index == 1.0


def test_many_rows_are_taken_in_parts(monkeypatch):
    log_joint = gaussian(LOC, COVARIANCE)
    z = normal(100, SIZE, seed=43)
    whole = (
        asymmetry(log_joint, z, LOC + 1.0),
        evidence_bracket(log_joint, proposal_of(LOC, REVERSE)),
    )
    monkeypatch.setattr("pyro_mf.diagnostics.proposals._MAX_BYTES", 30_000)
    parts = (
        asymmetry(log_joint, z, LOC + 1.0),
        evidence_bracket(log_joint, proposal_of(LOC, REVERSE)),
    )
    assert parts[0].index == pytest.approx(whole[0].index, abs=1e-12)
    assert parts[1].elbo == pytest.approx(whole[1].elbo, abs=1e-10)


def conjugate(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_resampled_draws_convert_with_a_word_that_they_are():
    x = torch.tensor([0.3, 1.1, 0.7])
    log_joint = LogJoint(conjugate, (x,))
    guide = AutoMeanField(conjugate, init_scale=1.0).setup(x)
    found = importance_resample(log_joint, guide_proposal(guide, log_joint), num_draws=400)
    result = found.to_arviz(num_chains=2, attrs={"note": "mine"})
    posterior = result["posterior"]
    assert posterior["mu"].shape == (2, 200)
    assert posterior.attrs["is_resampled"] == 1
    assert posterior.attrs["inference_method"] == "importance_resampling"
    assert posterior.attrs["khat"] == found.khat
    assert posterior.attrs["note"] == "mine"
    assert "log_likelihood" in list(getattr(result, "children", None) or result.groups())
    with pytest.raises(ValueError, match="400 draws cannot be cut into 3 chains"):
        found.to_arviz(num_chains=3)


def test_any_guide_whose_density_is_known_can_propose():
    x = torch.tensor([0.3, 1.1, 0.7])
    log_joint = LogJoint(conjugate, (x,))
    stock = pyro.infer.autoguide.AutoNormal(conjugate)
    with pytest.raises(GuideNotSetUpError):
        guide_proposal(stock, log_joint)
    stock(x)
    proposal = guide_proposal(stock, log_joint)
    z, log_q = proposal(50, 0)
    expected = dist.Normal(stock.locs.mu, stock.scales.mu).log_prob(z[:, 0])
    torch.testing.assert_close(log_q, expected.detach())
    assert proposal.log_prob is None

    def on_a_point(x):
        pyro.sample("mu", dist.Delta(torch.tensor(0.3)))

    with pytest.raises(ValueError, match="no importance weights: .* point"):
        guide_proposal(on_a_point, log_joint)(50, 0)

    def other():
        pyro.sample("nu", dist.Normal(0.0, 1.0))

    with pytest.raises(GuideMismatchError):
        guide_proposal(AutoMeanField(other).setup(), log_joint)


# -- symmetry --------------------------------------------------------------------------------------


def test_a_gaussian_is_symmetric_about_its_mean_for_any_factors():
    log_joint = gaussian(LOC, COVARIANCE)
    for scale in (0.1, 1.0, 10.0):
        found = asymmetry(log_joint, LOC + scale * normal(200, SIZE, seed=22), LOC)
        assert found.index < 1e-8
        assert found.nats < 1e-8 * scale**2
        assert float(found.elements.max()) < 1e-8


@pytest.mark.parametrize("df", [1.0, 4.0])
def test_so_is_any_elliptical_density(df):
    def model():
        pyro.sample("z", dist.MultivariateStudentT(df, LOC, torch.linalg.cholesky(COVARIANCE)))

    found = asymmetry(LogJoint(model), LOC + 2.0 * normal(200, SIZE, seed=23), LOC)
    assert found.index < 1e-8
    assert float(found.elements.max()) < 1e-8


def skewed(shape: float, constant: float = 0.0, unit: float = 1.0) -> LogJoint:
    """A skewed density beside a normal that is correlated with it."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, unit))
        pyro.sample("y", dist.Normal(x / unit, 1.0))
        pyro.factor("skew", torch.nn.functional.logsigmoid(shape * x / unit) + constant)

    return LogJoint(model)


def test_skewness_shows_and_at_its_source():
    z = normal(500, 2, seed=24)
    found = [asymmetry(skewed(shape), z, torch.zeros(2)) for shape in (0.0, 0.5, 5.0)]
    index = [f.index for f in found]
    assert index[0] < 1e-8
    assert index[0] < index[1] < index[2] <= 1.0
    assert index[1] > 10.0 * found[1].index_se > 0.0
    assert found[2].sites["x"] > 0.3
    assert found[2].sites["y"] < 1e-8


def test_neither_constants_nor_units_matter():
    z = normal(500, 2, seed=25)
    base = asymmetry(skewed(2.0), z, torch.zeros(2))
    moved = asymmetry(skewed(2.0, constant=1e4), z, torch.zeros(2))
    scaled = asymmetry(skewed(2.0, unit=7.0), z * torch.tensor([7.0, 1.0]), torch.zeros(2))
    for other in (moved, scaled):
        assert other.index == pytest.approx(base.index, abs=1e-8)
        assert other.nats == pytest.approx(base.nats, abs=1e-8)
        torch.testing.assert_close(other.elements, base.elements, atol=1e-8, rtol=0.0)


def test_a_location_that_is_off_fires_as_documented():
    log_joint = gaussian(torch.zeros(1), torch.eye(1))
    off = 0.1
    found = asymmetry(log_joint, off + normal(4000, 1, seed=26), torch.full((1,), off))
    exact = off / math.sqrt(0.5 + off**2)
    assert abs(found.index - exact) < 4.0 * found.index_se


def test_a_wall_on_one_side_is_as_asymmetric_as_can_be():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > -1.0, 0.0, -math.inf))

    found = asymmetry(LogJoint(model), normal(200, 1, seed=27).abs(), torch.zeros(1))
    assert found.index == 1.0
    assert found.nats == math.inf
    assert found.elements.isnan().all()


def test_bad_input_for_symmetry_is_refused():
    log_joint = gaussian(LOC, COVARIANCE)
    z = normal(100, SIZE, seed=28)
    with pytest.raises(ValueError, match="at least 25 draws; got 24"):
        asymmetry(log_joint, z[:24], LOC)
    with pytest.raises(ValueError, match=r"a centre of shape \(4,\)"):
        asymmetry(log_joint, z, torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        asymmetry(log_joint, z, torch.full((SIZE,), math.nan))


# -- evidence --------------------------------------------------------------------------------------


def test_the_bracket_of_a_gaussian_is_that_of_the_formulas():
    # METHODS 3.1, with evidence one; z = 4 each.
    log_joint = gaussian(LOC, COVARIANCE)
    z = LOC + normal(20_000, SIZE, seed=29) @ torch.linalg.cholesky(COVARIANCE).T
    posterior = posterior_of(log_joint, z)
    found = evidence_bracket(log_joint, proposal_of(LOC, REVERSE), posterior, num_draws=8192)
    sd = PRECISION.diagonal().rsqrt()
    elbo = 0.5 * torch.logdet(PRECISION * torch.outer(sd, sd))
    total = torch.trace(torch.diag(PRECISION.diagonal()) @ COVARIANCE) - SIZE
    eubo = 0.5 * (total + torch.logdet(REVERSE) - torch.logdet(COVARIANCE))
    assert abs(found.elbo - elbo) < 4.0 * found.elbo_se < 0.1
    assert abs(found.eubo - eubo) < 4.0 * found.eubo_se < 0.2
    assert abs(found.gap.elbo - (eubo - elbo)) < 4.0 * found.gap.se
    assert found.bounds.lower - 2.0 * found.bounds.lower_se < 0.0 < found.bounds.upper
    assert found.bounds.lower > found.elbo
    assert not found.contradicts_itself
    assert abs(found.log_evidence) < 0.2  # k-hat is 0.8: its error is not to be trusted
    forward = proposal_of(LOC, torch.eye(SIZE))
    found = evidence_bracket(log_joint, forward, posterior)
    assert abs(found.eubo + 0.5 * torch.logdet(COVARIANCE)) < 4.0 * found.eubo_se


def test_the_evidence_of_a_conjugate_model_is_found():
    x = torch.tensor([0.3, 1.1, 0.7, -0.4])
    covariance = torch.eye(4) + torch.ones(4, 4)
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)
    log_joint = LogJoint(conjugate, (x,))
    wide = proposal_of(torch.full((1,), 0.2), torch.full((1, 1), 0.4))
    found = evidence_bracket(log_joint, wide)
    assert found.khat < found.threshold
    assert abs(found.log_evidence - exact) < 4.0 * found.log_evidence_se < 0.1
    posterior = proposal_of(x.sum()[None] / 5.0, torch.full((1, 1), 0.2))
    tight = evidence_bracket(log_joint, posterior, posterior_of(log_joint, posterior(99, 3)[0]))
    for value in (
        tight.elbo,
        tight.log_evidence,
        tight.eubo,
        *(e.elbo for e in tight.multi_draw.values()),
    ):
        assert value == pytest.approx(float(exact), abs=1e-10)
    assert tight.notes == ()


def test_more_draws_at_a_time_never_lower_the_bound():
    log_weights = 3.0 * normal(5000, seed=30)
    found = multi_draw_elbos(log_weights)
    values = [float(log_weights.mean()), *(e.elbo for e in found.values())]
    assert list(found) == [2, 4, 8, 16, 32, 64, 128]
    assert values[1:] == sorted(values[1:])
    assert values[-1] < 4.5  # log evidence: 3^2 / 2


def test_the_bound_of_several_draws_is_unbiased_with_its_error():
    # 300 repetitions of K = 4 against quadrature by a million draws; z = 5.
    big = normal(1_000_000, seed=31).reshape(-1, 4)
    exact = (torch.logsumexp(big, 1) - math.log(4.0)).mean()
    found = [multi_draw_elbos(normal(256, seed=100 + s))[4] for s in range(300)]
    values = torch.tensor([e.elbo for e in found])
    scatter = values.std()
    assert abs(values.mean() - exact) < 5.0 * scatter / math.sqrt(300)
    stated = torch.tensor([e.se for e in found]).mean()
    assert 0.8 * stated < scatter < 1.15 * stated  # at most that of one order


def test_draws_that_have_not_mixed_are_found_out():
    log_joint = gaussian(torch.zeros(2), torch.eye(2))
    narrow = proposal_of(torch.zeros(2), 0.25 * torch.eye(2))
    stuck = posterior_of(log_joint, 0.01 * normal(1000, 2, seed=32))
    found = evidence_bracket(log_joint, narrow, stuck)
    assert found.contradicts_itself
    assert any("EUBO is below the ELBO by" in note for note in found.notes)
    mixed = posterior_of(log_joint, normal(1000, 2, seed=33))
    assert not evidence_bracket(log_joint, narrow, mixed).contradicts_itself


def test_false_alarms_of_a_bracket_that_is_exact():
    # Where q is nearly p the gap is nearly zero: 200 of these, none beyond four errors.
    log_joint = gaussian(torch.zeros(1), torch.eye(1))
    near = proposal_of(torch.zeros(1), 0.98 * torch.eye(1))
    for seed in range(200):
        posterior = posterior_of(log_joint, normal(200, 1, seed=seed))
        found = evidence_bracket(log_joint, near, posterior, num_draws=64, seed=seed)
        assert not found.contradicts_itself


def test_errors_of_chains_count_their_correlation():
    # An autoregression: the error of a mean is sqrt((1 + r) / (1 - r)) times that of as many draws.
    r, length, chains = 0.8, 4000, 4
    z = torch.zeros(length, chains)
    noise = math.sqrt(1.0 - r * r) * normal(length, chains, seed=34)
    z[0] = noise[0] / math.sqrt(1.0 - r * r)
    for t in range(1, length):
        z[t] = r * z[t - 1] + noise[t]
    values = z.reshape(-1)
    log_joint = gaussian(torch.zeros(1), torch.eye(1))
    chain = posterior_of(log_joint, values[:, None], num_chains=float(chains))
    plain = posterior_of(log_joint, values[:, None])
    ratio = mcse(values, chain) / mcse(values, plain)
    assert ratio == pytest.approx(math.sqrt((1.0 + r) / (1.0 - r)), rel=0.15)


def test_what_a_bracket_cannot_be_made_of_is_refused_or_marked():
    log_joint = gaussian(LOC, COVARIANCE)
    good = proposal_of(LOC, COVARIANCE)
    posterior = posterior_of(log_joint, normal(200, SIZE, seed=35), ess=20.0)
    with pytest.raises(ValueError, match="num_draws must be at least 64; got 63"):
        evidence_bracket(log_joint, good, num_draws=63)
    with pytest.raises(ValueError, match="known at its own draws only"):
        evidence_bracket(log_joint, Proposal("mine", good.draw), posterior)
    with pytest.raises(ValueError, match="have 2 latents and the model has 4"):
        evidence_bracket(
            log_joint, good, posterior_of(gaussian(LOC[:2], torch.eye(2)), torch.zeros(50, 2))
        )
    found = evidence_bracket(log_joint, good, posterior)
    assert any("worth 20 independent ones" in note for note in found.notes)
    alone = evidence_bracket(log_joint, good)
    assert (alone.eubo, alone.bounds.upper) == (math.inf, math.inf)
    assert math.isnan(alone.eubo_se)
    assert not alone.contradicts_itself

    def walled():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 0.0, math.log(2.0), -math.inf))

    found = evidence_bracket(LogJoint(walled), proposal_of(torch.zeros(1), torch.eye(1)))
    assert found.elbo == -math.inf
    assert "density zero to" in found.notes[0]
    assert abs(found.log_evidence) < 4.0 * found.log_evidence_se
    assert abs(found.multi_draw[128].elbo) < 0.1


# -- all of the data -------------------------------------------------------------------------------

X = torch.linspace(-1.0, 2.0, 150, dtype=torch.float64).reshape(50, 3)
Y = X.sin().sum(1)


def regression(x, y, size=None):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(y), subsample_size=size) as index:
        local = pyro.sample("local", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x[index] @ beta + local, scale), obs=y[index])


def test_the_full_model_is_the_one_without_subsampling():
    args = (X, Y, 7)
    with pytest.raises(ModelError, match="subsamples plate 'data'"):
        LogJoint(regression, args)
    full = on_full_data(regression, args)
    z = normal(6, 54, seed=36)
    plain = LogJoint(regression, (X, Y))
    log_joint = LogJoint(full, args)
    torch.testing.assert_close(log_joint(z), plain(z), atol=1e-10, rtol=0.0)
    torch.testing.assert_close(
        log_joint.value_and_grad(z)[1], plain.value_and_grad(z)[1], atol=1e-10, rtol=0.0
    )
    assert log_joint.mode == plain.mode
    # Outside of it nothing has changed.
    with pyro.plate("p", 10, subsample_size=3) as index:
        assert len(index) == 3


def two_plates(x):
    rows = pyro.plate("rows", 6, subsample_size=2, dim=-2)
    columns = pyro.plate("columns", 5, subsample_size=3, dim=-1)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with rows as i:
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with rows, columns as j:
        pyro.sample("x", dist.Normal(mean + effect, 1.0), obs=x[i][:, j])


def by_subsample(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample_size=4):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=pyro.subsample(x, event_dim=0))


def one_by_one(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    for j in pyro.plate("data", 30, subsample_size=4):
        pyro.sample(f"x_{j}", dist.Normal(mean, 1.0), obs=x[j])


def given_indices(x, index):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample=index) as index:
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])


def with_discrete(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", 30, subsample_size=1) as index:
        k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(k, 1.0), obs=x[index])


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (two_plates, (normal(6, 5, seed=37),)),
        (by_subsample, (normal(30, seed=38),)),
        (one_by_one, (normal(30, seed=38),)),
        (given_indices, (normal(30, seed=38), torch.tensor([3, 1]))),
        (with_discrete, (normal(30, seed=38),)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_way_of_taking_a_minibatch_by_indices_works(model, args):
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    log_joint = LogJoint(on_full_data(model, args), args)
    z = 0.3 * torch.ones(log_joint.size)
    x, log_normal_at = args[0], dist.Normal(0.3, 1.0).log_prob
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    if model is two_plates:
        expected = 7.0 * prior + dist.Normal(0.6, 1.0).log_prob(x).sum()
    elif model is with_discrete:
        p = torch.sigmoid(torch.tensor(0.3))
        mixed = torch.logaddexp(
            p.log() + dist.Normal(1.0, 1.0).log_prob(x),
            (1.0 - p).log() + dist.Normal(0.0, 1.0).log_prob(x),
        )
        expected = mixed.sum() + dist.Beta(2.0, 2.0).log_prob(p) + (p * (1.0 - p)).log()
    else:
        expected = prior + log_normal_at(x).sum()
    assert float(log_joint(z)) == pytest.approx(float(expected), abs=1e-10)


def handed_in(x, total=30):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", total, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def indices_of_its_own(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample_size=4):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[torch.randint(30, (4,))])


def indices_of_the_caller(x, index):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample=index):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])


def factor_outside(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample_size=4) as index:
        pass
    pyro.factor("likelihood", 7.5 * dist.Normal(mean, 1.0).log_prob(x[index]).sum())


def half_followed(x):
    """Covariates shuffled against the responses, which a shape does not show."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 30, subsample_size=4) as index:
        pyro.sample("x", dist.Normal(slope * x[: len(index)], 1.0), obs=x[index])


@pytest.mark.parametrize(
    ("model", "args", "match"),
    [
        (handed_in, (normal(4, seed=39),), "cannot be run on the full data: with plate 'data'"),
        (handed_in, (normal(1, seed=39),), "site 'x' does not take its minibatch by the indices"),
        (indices_of_its_own, (normal(30, seed=39),), "Give the full data as model_args"),
        (
            indices_of_the_caller,
            (normal(30, seed=39), torch.arange(4)),
            r"all of them, torch\.arange\(len\(x\)\)",
        ),
        (factor_outside, (normal(30, seed=39),), "site 'likelihood' does not take"),
        (half_followed, (normal(30, seed=39),), "site 'x' does not take"),
    ],
)
def test_every_other_way_is_refused(model, args, match):
    with pytest.raises(ModelError, match=match):
        on_full_data(model, args)


def test_a_model_that_subsamples_nothing_is_left_alone():
    assert on_full_data(conjugate, (torch.zeros(3),)) is conjugate
    x = normal(30, seed=40)
    assert on_full_data(handed_in, (x,)) is handed_in
    assert on_full_data(indices_of_the_caller, (x, torch.arange(30))) is indices_of_the_caller


def test_modules_keep_their_parameters():
    class Model(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.width = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x, size=None):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), subsample_size=size) as index:
                pyro.sample("x", dist.Normal(mean, self.width), obs=x[index])

    model, x = Model(), normal(30, seed=41).double()
    log_joint = LogJoint(on_full_data(model, (x, 4)), (x, 4))
    plain = LogJoint(model, (x,))
    z = torch.tensor([[0.3]])
    torch.testing.assert_close(log_joint(z), plain(z), atol=1e-10, rtol=0.0)
    with torch.no_grad():
        model.width.fill_(0.5)
    torch.testing.assert_close(log_joint(z), plain(z), atol=1e-10, rtol=0.0)


def test_a_guide_of_minibatches_is_weighed_on_all_data():
    args = (X, Y, 7)
    guide = AutoMeanField(regression, init_scale=0.2).setup(*args)
    log_joint = LogJoint(on_full_data(regression, args), args)
    z, log_q = guide_proposal(guide, log_joint)(100, 0)
    torch.testing.assert_close(log_q, guide.log_prob_unconstrained(z).detach())
    plain = LogJoint(regression, (X, Y))
    found = evidence_bracket(log_joint, guide_proposal(guide, log_joint), num_draws=64)
    expected = evidence_bracket(plain, guide_proposal(guide, plain), num_draws=64)
    assert found.elbo == pytest.approx(expected.elbo, abs=1e-8)
