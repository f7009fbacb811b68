"""The deterministic solver for any family, and the choice of families by a fit."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mf as mf
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.families import FAMILIES, FullRank, Normal, SinhArcsinh, Spline
from pyro_mf.families.protocol import event_dim_of, home_of
from pyro_mf.solvers.draws import fixed_draws, stratified_draws
from pyro_mf.solvers.family_choice import choose_by_draws, choose_by_optimum, describe_choice
from pyro_mf.solvers.family_elbo import FamilyELBO
from pyro_mf.solvers.meter import Meter
from pyro_mf.solvers.outcome import silent
from pyro_mf.solvers.posterior_draws import PosteriorDraws

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def log_gamma(shape=0.3):
    """A skewed density on the real line with a known integral: the law of log X of a Gamma."""

    def model():
        with pyro.plate("elements", 2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False))
            pyro.factor("log_gamma", shape * x - x.exp() - math.lgamma(shape))

    return model


def gap(result, num=4000):
    """KL(q || p), where p integrates to one, and its standard error."""
    z = result.sample_unconstrained(num, seed=3)
    with torch.no_grad():
        ratio = result.guide.log_prob_unconstrained(z) - result.log_joint(z)
    return float(ratio.mean()), float(ratio.std()) / num**0.5


class TestStratifiedDraws:
    def test_every_coordinate_is_filled_evenly(self):
        draws = stratified_draws(256, 7, seed=1)
        torch.testing.assert_close(draws.mean(0), torch.zeros(7), atol=1e-14, rtol=0)
        torch.testing.assert_close(draws.square().mean(0), torch.ones(7))
        torch.testing.assert_close(draws.T @ draws / 256, torch.eye(7), atol=0.01, rtol=0)
        # 32 in each of 8 strata, but for those near a bound, which decorrelating moves across it.
        apart = [
            max(
                float((torch.histc(torch.special.ndtr(x[:, d]), 8, 0.0, 1.0) - 32.0).abs().max())
                for d in range(7)
            )
            for x in (draws, fixed_draws(256, 7, seed=1))
        ]
        assert apart[0] <= 5.0
        assert apart[1] > 5.0

    def test_seeds_make_them_and_leave_the_global_generator_alone(self):
        state = torch.random.get_rng_state()
        assert torch.equal(stratified_draws(8, 3, seed=5), stratified_draws(8, 3, seed=5))
        assert not torch.equal(stratified_draws(8, 3, seed=5), stratified_draws(8, 3, seed=6))
        assert torch.equal(state, torch.random.get_rng_state())

    @pytest.mark.parametrize("num", [0, 3])
    def test_odd_numbers_are_refused(self, num):
        with pytest.raises(ValueError, match="even"):
            stratified_draws(num, 2)


@pytest.mark.parametrize("family", ["sinh_arcsinh", "student_t", "spline", "normal_mixture"])
def test_gradient_of_the_elbo_is_its_derivative(family):
    guide = mf.AutoMeanField(schools, family=family).setup(SIGMA, Y)
    blocks = Blocks(LogJoint(schools, (SIGMA, Y), backend="graph"))
    elbo = FamilyELBO(blocks, guide, 16, seed=0, meter=Meter(1000, silent))
    x = elbo.flatten(guide.flat_params())
    x = x + 0.1 * torch.randn(len(x))
    value, gradient = elbo.value_and_gradient(x)
    for _ in range(3):
        direction = torch.randn(len(x))
        step = 1e-6
        ahead, _ = elbo.value_and_gradient(x + step * direction)
        behind, _ = elbo.value_and_gradient(x - step * direction)
        assert (ahead - behind) / (2 * step) == pytest.approx(
            float(gradient @ direction), rel=1e-5, abs=1e-5
        )
    assert math.isfinite(value)


def test_normal_factors_are_the_same_as_by_their_own_solver():
    plain = mf.fit(schools, (SIGMA, Y))
    # A log-normal is a Normal on the unconstrained axis, and takes the other solver in company.
    own = mf.fit(schools, (SIGMA, Y), family={"tau": "log_normal"})
    for a, b in zip(
        plain.guide.quantiles([0.1, 0.5, 0.9]).values(),
        own.guide.quantiles([0.1, 0.5, 0.9]).values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0.15, atol=0.3)
    assert own.elbo == pytest.approx(plain.elbo, abs=0.3)


@pytest.mark.parametrize(
    ("family", "most"), [("sinh_arcsinh", 0.05), ("spline", 0.05), ("normal", math.inf)]
)
def test_flexible_factors_close_the_gap_on_a_skewed_density(family, most):
    result = mf.fit(log_gamma(), family=family)
    found, error = gap(result)
    assert result.converged
    assert found <= most + 3.0 * error
    if family == "normal":  # what the others gain: the negative control
        assert found - 3.0 * error > 0.3


@pytest.mark.parametrize(
    "family", [n for n, f in FAMILIES.items() if not event_dim_of(f()) and home_of(f()) is None]
)
def test_no_family_ends_below_its_start(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mf.ConvergenceWarning)  # a histogram has jumps
        result = mf.fit(schools, (SIGMA, Y), family=family)
        normal = mf.fit(schools, (SIGMA, Y))
    if family == "student_t":  # tau is positive: its logarithm's density falls exponentially
        assert result.stop_reason == "diverged"
        assert "minus infinity" in result.outcome.message
        return
    assert result.stop_reason in ("converged", "budget")
    z = result.guide.sample_unconstrained(4)
    assert torch.isfinite(z).all()
    if family not in ("laplace", "logistic", "histogram"):  # that hold no Normals
        assert result.elbo > normal.elbo - 3.0 * math.hypot(result.elbo_se, normal.elbo_se)


def test_budget_and_interruption_keep_what_there_is(monkeypatch):
    with pytest.warns(mf.ConvergenceWarning, match="budget"):
        result = mf.fit(schools, (SIGMA, Y), family="sinh_arcsinh", max_gradients=40)
    assert result.stop_reason == "budget"
    assert math.isfinite(result.elbo)
    from pyro_mf.solvers import pathwise

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pathwise, "lbfgs", interrupt)
    result = mf.fit(schools, (SIGMA, Y), family="sinh_arcsinh")
    assert result.stop_reason == "interrupted"
    assert math.isfinite(result.elbo)


def test_same_seed_same_bits():
    one, two = (mf.fit(schools, (SIGMA, Y), family="sinh_arcsinh", seed=4) for _ in range(2))
    for a, b in zip(one.guide.flat_params(), two.guide.flat_params(), strict=True):
        assert torch.equal(a, b)


def test_student_t_factors_serve_where_tails_are_as_heavy():
    def model():
        pyro.sample("z", dist.StudentT(5.0, 1.0, 2.0))

    result = mf.fit(model, family="student_t")
    assert result.converged
    assert abs(result.elbo) < 0.02


def test_blocks_are_exact_where_they_hold_the_posterior():
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def model():
        with pyro.plate("pairs", 12):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    result = mf.fit(model, family=FullRank(over="slice"))
    assert result.converged
    assert abs(result.elbo) < 1e-4  # draws are decorrelated, so nothing is left to chance


def test_angles_are_fitted_by_von_mises_factors():
    data = torch.tensor([0.3, 0.5, 0.4, 0.9])

    def model():
        angle = pyro.sample("angle", dist.VonMises(0.0, 0.5))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.VonMises(angle, 4.0), obs=data)

    # Conjugate: resultants add up.
    cosine = 0.5 + (4.0 * data.cos()).sum()
    sine = (4.0 * data.sin()).sum()
    for family in ("von_mises", "auto"):
        result = mf.fit(model, family=family)
        assert result.converged
        loc, concentration = result.guide.flat_params()
        torch.testing.assert_close(loc.reshape(()), torch.atan2(sine, cosine), atol=0.01, rtol=0)
        torch.testing.assert_close(
            concentration.reshape(()), torch.hypot(sine, cosine), rtol=0.05, atol=0
        )


class TestAuto:
    def test_says_what_it_chose_and_why_it_matters(self):
        result = mf.fit(schools, (SIGMA, Y), family="auto")
        names = {site: family.name for site, family in result.guide.families.items()}
        assert names == {"mu": "normal", "tau": "gamma", "eta": "normal"}
        assert any("'auto' chose normal for mu, eta; gamma for tau" in n for n in result.notes)
        assert result.elbo > mf.fit(schools, (SIGMA, Y)).elbo - 0.3

    def test_leaves_a_normal_posterior_alone(self):
        def model():
            pyro.sample("z", dist.Normal(1.0, 2.0).expand([4]).to_event(1))

        result = mf.fit(model, family="auto")
        assert result.guide.family == Normal()
        assert result.response is not None  # so that linear response is there
        assert result.response.found is not None

    def test_in_stock_svi_supports_decide(self):
        def model():
            pyro.sample("angle", dist.VonMises(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 1.0))

        guide = mf.AutoMeanField(model, family="auto").setup()
        assert {s: f.name for s, f in guide.families.items()} == {
            "angle": "von_mises",
            "z": "normal",
        }

    def test_restarts_agree_on_the_families(self):
        result = mf.fit(schools, (SIGMA, Y), family="auto", num_restarts=2)
        assert len(result.restarts) == 2
        assert len({tuple(p.shape for p in o.params) for o in result.restarts}) == 1

    @pytest.mark.parametrize(
        ("family", "chosen"),
        [
            ({"mu": "normal"}, {"mu": "normal", "tau": "gamma", "eta": "normal"}),
            (lambda site: "auto", {"mu": "normal", "tau": "gamma", "eta": "normal"}),
            ({"tau": "normal"}, {"mu": "normal", "tau": "normal", "eta": "normal"}),
        ],
    )
    def test_chooses_for_the_sites_that_are_left_to_it(self, family, chosen):
        result = mf.fit(schools, (SIGMA, Y), family=family)
        assert {site: f.name for site, f in result.guide.families.items()} == chosen

    def test_counts_every_gradient_once_and_keeps_its_budget(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mf.ConvergenceWarning)
            short = mf.fit(schools, (SIGMA, Y), family="auto", max_gradients=40)
        whole = mf.fit(schools, (SIGMA, Y), family="auto")
        assert short.outcome.num_gradients <= 41
        assert len(whole.outcome.losses) <= whole.outcome.num_gradients

    def test_is_saved_and_loaded(self, tmp_path):
        result = mf.fit(schools, (SIGMA, Y), family="auto")
        result.save(tmp_path / "fit.pt")
        again = mf.FitResult.load(tmp_path / "fit.pt", schools, (SIGMA, Y))
        assert again.guide.families == result.guide.families
        table, other = result.summary(), again.summary()
        assert table["sd"].to_numpy() == pytest.approx(other["sd"].to_numpy())


def _draws(z):
    size = z.shape[1]
    return PosteriorDraws(
        source="importance",
        z=z,
        log_weights=torch.zeros(len(z)),
        log_density=torch.zeros(len(z)),
        mean_error=torch.zeros(size),
        sd_error=torch.zeros(size),
    )


class TestChoiceByDraws:
    layout_model = staticmethod(
        lambda: pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    )

    def choose(self, z):
        layout = mf.AutoMeanField(self.layout_model).setup().layout
        first = torch.arange(len(z)) % 2 == 0
        return choose_by_draws(layout, _draws(z), first, {"z"})["z"].name

    def test_normal_draws_stay_normal(self):
        # Chance that noise is taken for shape: three standard errors and more, for three families.
        assert [self.choose(torch.randn(4000, 2)) for _ in range(5)] == ["normal"] * 5

    def test_skew_and_two_modes_are_seen(self):
        skewed = torch.stack([torch.randn(4000), torch.rand(4000).log()], 1)
        assert self.choose(skewed) != "normal"
        sign = torch.randint(0, 2, (4000, 2)) * 2.0 - 1.0
        assert self.choose(2.0 * sign + 0.5 * torch.randn(4000, 2)) in ("spline", "normal_mixture")


def test_choice_by_optimum_keeps_what_is_bent():
    guide = mf.AutoMeanField(schools, family="sinh_arcsinh").setup(SIGMA, Y)
    loc, scale, skew, tail = (p.detach().clone() for p in guide.flat_params())
    skew[guide.layout["tau"].start] = 0.5
    sites = ["mu", "tau", "eta"]
    chosen = choose_by_optimum(guide.layout, SinhArcsinh(), (loc, scale, skew, tail), sites)
    assert {s: f.name for s, f in chosen.items()} == {
        "mu": "normal",
        "tau": "sinh_arcsinh",
        "eta": "normal",
    }
    assert describe_choice(chosen).endswith("normal for mu, eta; sinh_arcsinh for tau")
    assert "for every site" in describe_choice({"a": Spline(), "b": Spline()})
