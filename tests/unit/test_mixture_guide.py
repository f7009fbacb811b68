"""``AutoMeanFieldMixture`` as a Pyro guide, as a family, and as the guide of a fit."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList

import pyro_mf as mf
from pyro_mf._errors import CheckpointError, FamilyError, GuideMismatchError
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.families.mixture_marginals import MixtureMarginals
from pyro_mf.guides import AutoMeanFieldMixture, FactorisedGuide, log_importance_weights
from pyro_mf.weights import psis
from tests.cases import MODELS

full_models = {name: case for name, case in MODELS.items() if not case.is_subsampled}
line_models = {name: case for name, case in full_models.items() if name != "circular"}
every_model = pytest.mark.parametrize("case", line_models.values(), ids=line_models)


def two_signs(y):
    """The sign of theta is not known from its square: two modes."""
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta**2, sigma), obs=y)


def squares():
    return torch.tensor([3.9, 4.3, 4.1, 3.6, 4.2])


def some_params(size=3, num=4):
    loc = torch.randn(size, num) * 2.0
    return loc, torch.rand(size, num) + 0.3, torch.randn(num)


@pytest.fixture(scope="module")
def fitted():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    guide = AutoMeanFieldMixture(two_signs, 2)
    result = mf.fit(two_signs, (squares(),), guide=guide, progress=False)
    torch.set_default_dtype(dtype)
    return result


# -- the family ------------------------------------------------------------------------------------


def test_contributions_sum_to_the_density_of_torchs_own_mixture():
    family, params = FactorisedMixture(4), some_params()
    u = torch.randn(5, 6, 3)
    expected = family.distribution(params).log_prob(u)
    torch.testing.assert_close(family.log_prob(params, u).sum(-1), expected)
    torch.testing.assert_close(family.joint_log_prob(params, u), expected)


def test_contributions_are_conditional_densities():
    """The first is the element's marginal density; the last integrates to one given the others."""
    family, params = FactorisedMixture(4), some_params()
    marginals, own = family.marginals(params)
    u = torch.randn(3)
    first = marginals.log_prob(own, u)[0]
    torch.testing.assert_close(family.log_prob(params, u)[0], first)
    grid = torch.linspace(-30.0, 30.0, 20_001)
    rows = u.repeat(len(grid), 1)
    rows[:, 2] = grid
    last = family.log_prob(params, rows)[:, 2].exp()
    torch.testing.assert_close(torch.trapezoid(last, grid), torch.tensor(1.0))


def test_parameters_may_differ_by_draw():
    family, (loc, scale, logits) = FactorisedMixture(4), some_params()
    u = torch.randn(7, 3)
    many = (loc.expand(7, 3, 4), scale.expand(7, 3, 4), logits.expand(7, 4))
    torch.testing.assert_close(family.log_prob(many, u), family.log_prob((loc, scale, logits), u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_gradients_are_finite_at_extremes(dtype):
    family = FactorisedMixture(2)
    loc = torch.tensor([[-1e4, 1e4]], dtype=dtype, requires_grad=True)
    scale = torch.tensor([[1e-3, 1e3]], dtype=dtype, requires_grad=True)
    logits = torch.tensor([-80.0, 80.0], dtype=dtype, requires_grad=True)
    u = torch.tensor([[-1e4], [0.0], [1e5]], dtype=dtype)
    log_prob = family.log_prob((loc, scale, logits), u)
    gradients = torch.autograd.grad(log_prob.sum(), (loc, scale, logits))
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(g).all() for g in gradients)


def test_draws_have_the_mixtures_moments():
    """20 000 draws, z = 5: an error of 4 % of an sd in a mean would be seen."""
    family, params = FactorisedMixture(4), some_params()
    draws = family.transform(params, family.noise((20_000, 3)))
    weights = torch.softmax(params[2], 0)
    mean = params[0] @ weights
    sd = ((params[1].square() + (params[0] - mean[:, None]).square()) @ weights).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5.0 * sd / 20_000**0.5).all()
    torch.testing.assert_close(draws.std(0), sd, rtol=0.05, atol=0.0)


def test_marginal_quantiles_invert_the_distribution_function():
    family, params = FactorisedMixture(4), some_params()
    marginals, own = family.marginals(params)
    p = torch.tensor([1e-6, 0.05, 0.5, 0.9])[:, None]
    quantiles = family.quantile(params, p)
    torch.testing.assert_close(marginals.distribution(own).cdf(quantiles), p.expand(4, 3))


def test_marginals_are_a_family():
    family = MixtureMarginals(3)
    assert pickle.loads(pickle.dumps(family)) == family
    loc, scale = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.1])
    params = family.init(loc, scale)
    torch.testing.assert_close(family.quantile(params, torch.tensor(0.5)), loc)
    u = torch.randn(4, 2)
    torch.testing.assert_close(family.log_prob(params, u), family.distribution(params).log_prob(u))
    assert family.entropy(params) is None
    draws = family.transform(params, family.noise((500, 2)))
    fitted = family.fit_weighted(draws, torch.zeros(500))
    assert all(p.shape == (2, 3) for p in fitted)
    assert (family.quantile(fitted, torch.tensor(0.5)) - loc).abs().lt(0.3 * scale).all()


# -- fitting it to draws ---------------------------------------------------------------------------


def test_weighted_fit_finds_the_modes():
    """z = 5 on 1000 draws each: locations to 0.16 sds."""
    family = FactorisedMixture(4)
    modes = torch.tensor([[-3.0, -3.0], [-3.0, 3.0], [3.0, -3.0], [3.0, 3.0]])
    u = (modes[:, None] + 0.5 * torch.randn(4, 1000, 2)).flatten(0, 1)
    log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat_interleave(1000)
    loc, scale, logits = family.fit_weighted(u, log_weights)
    order = torch.softmax(logits, 0).argsort()
    torch.testing.assert_close(loc.T[order], modes, atol=0.08, rtol=0.0)
    torch.testing.assert_close(scale, torch.full((2, 4), 0.5), atol=0.06, rtol=0.0)
    weights = torch.softmax(logits, 0)[order]
    torch.testing.assert_close(weights, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0.0)


def test_weighted_fit_of_one_component_matches_moments():
    u, log_weights = torch.randn(50, 3), torch.randn(50)
    loc, scale, logits = FactorisedMixture(1).fit_weighted(u, log_weights)
    expected = mf.families.Normal().fit_weighted(u, log_weights)
    torch.testing.assert_close((loc[:, 0], scale[:, 0]), expected)
    assert logits.shape == (1,)


def test_weighted_fit_follows_shift_and_stretch():
    family, u = FactorisedMixture(3), torch.randn(200, 2) + 3.0 * torch.randint(2, (200, 1))
    log_weights = torch.randn(200)
    loc, scale, logits = family.fit_weighted(u, log_weights)
    stretch, shift = torch.tensor([10.0, 0.01]), torch.tensor([-500.0, 3.0])
    moved = family.fit_weighted(shift + stretch * u, log_weights)
    expected = (shift[:, None] + stretch[:, None] * loc, stretch[:, None] * scale, logits)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda u, w: (torch.cat([u[:, :1], torch.full_like(u[:, 1:], 7.0)], 1), w),
        lambda u, w: (u, torch.cat([w[:1] + 50.0, w[1:]])),
        lambda u, w: (torch.cat([u[:1] * 1e6, u[1:]]), w),
        lambda u, w: (u, torch.cat([w[:1] - torch.inf, w[1:]])),
    ],
    ids=["constant column", "one heavy draw", "far outlier", "a draw of no weight"],
)
def test_weighted_fit_is_finite_and_no_worse_than_one_normal(spoil):
    u, log_weights = spoil(torch.randn(50, 2), torch.zeros(50))
    weights = torch.softmax(log_weights, 0)
    family = FactorisedMixture(3)
    params = family.fit_weighted(u, log_weights)
    assert all(torch.isfinite(p).all() for p in params)
    assert (params[1] > 0).all()
    one = FactorisedMixture(1).fit_weighted(u, log_weights)
    used = weights > 0
    likelihood = (weights * family.joint_log_prob(params, u))[used].sum()
    single = (weights * FactorisedMixture(1).joint_log_prob(one, u))[used].sum()
    assert likelihood >= single - 1e-9


# -- the guide in Pyro -----------------------------------------------------------------------------


def latents_of(trace):
    return {
        name: node
        for name, node in trace.iter_stochastic_nodes()
        if type(node["fn"]).__name__ != "_Subsample"
    }


@every_model
def test_trace_has_the_models_sites_and_the_mixtures_density(case):
    args = case.args()
    guide = AutoMeanFieldMixture(case.model, 3, init_scale=0.3).setup(*args)
    assert isinstance(guide, FactorisedGuide)
    for component in (None, 1):
        trace = poutine.trace(
            guide if component is None else lambda *a: guide.run_component(1, *a)
        ).get_trace(*args)
        sites = latents_of(trace)
        assert list(sites) == [site.name for site in guide.layout.sites]
        for site in guide.layout.sites:
            node = sites[site.name]
            assert node["value"].shape == site.shape
            assert len(node["fn"].event_shape) == site.event_dim
            assert site.support.check(node["value"]).all()
            assert node["fn"].has_rsample is (component is not None)
        values = {name: node["value"] for name, node in sites.items()}
        torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(values))


@every_model
def test_values_that_the_guide_did_not_draw_have_its_density(case):
    args = case.args()
    guide = AutoMeanFieldMixture(case.model, 3, init_scale=0.3).setup(*args)
    values = {name: x[0] for name, x in guide.sample_posterior(1).items()}
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(*args)
    torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(values))


def test_runs_draw_from_the_mixture():
    """400 runs of the guide against its own draws: z = 4.5 on the mean, 0.23 of an sd."""
    guide = AutoMeanFieldMixture(two_signs, 2, init_spread=3.0, init_scale=0.5).setup(squares())
    runs = torch.stack([guide(squares())["theta"].detach() for _ in range(400)])
    draws = guide.sample_posterior(20_000)["theta"]
    assert (runs.mean() - draws.mean()).abs() < 4.5 * draws.std() / 20.0
    torch.testing.assert_close(runs.std(), draws.std(), rtol=0.2, atol=0.0)


def test_later_sites_know_the_component_of_earlier_ones():
    guide = AutoMeanFieldMixture(two_signs, 2).setup(squares())
    loc = torch.tensor([[-9.0, 9.0], [-5.0, 5.0]])
    guide.set_flat_params((loc, torch.full((2, 2), 0.1), torch.zeros(2)))
    for sign in (-1.0, 1.0):
        given = poutine.condition(guide, {"theta": torch.tensor(9.0 * sign)})
        drawn = [given(squares())["sigma"].log() for _ in range(5)]
        assert all((x - 5.0 * sign).abs() < 1.0 for x in drawn)


def test_particles_run_side_by_side():
    case = MODELS["crossed plates"]
    guide = AutoMeanFieldMixture(case.model, 3).setup(*case.args())

    def many(*args):
        with pyro.plate("particles", 6, dim=-3):
            return guide(*args)

    trace = poutine.trace(many).get_trace(*case.args())
    total = sum(
        node["fn"].log_prob(node["value"]).reshape(6, -1).sum(1)
        for node in latents_of(trace).values()
    )
    values = {
        site.name: trace.nodes[site.name]["value"].reshape(6, *site.shape)
        for site in guide.layout.sites
    }
    torch.testing.assert_close(total, guide.log_prob(values))


def test_predictive_runs_from_the_guide():
    guide = AutoMeanFieldMixture(two_signs, 2).setup(squares())
    one_by_one = Predictive(two_signs, guide=guide, num_samples=4)(squares())
    at_once = Predictive(two_signs, guide=guide, num_samples=4, parallel=True)(squares())
    assert one_by_one["theta"].shape[0] == at_once["theta"].shape[0] == 4


def test_works_in_a_list_of_guides():
    guide = AutoGuideList(two_signs)
    guide.append(AutoMeanFieldMixture(poutine.block(two_signs, hide=["sigma"]), 2))
    guide.append(mf.AutoMeanField(poutine.block(two_signs, hide=["theta"])))
    svi = SVI(two_signs, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.step(squares()) > 0.0
    assert set(guide(squares())) == {"theta", "sigma"}


@pytest.mark.parametrize("loss", [mf.ReverseKL(4), Trace_ELBO()], ids=["ReverseKL", "Trace_ELBO"])
def test_svi_learns_every_parameter(loss):
    guide = AutoMeanFieldMixture(two_signs, 2)
    svi = SVI(two_signs, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    guide.setup(squares())
    before = [p.detach().clone() for p in guide.parameters()]
    for _ in range(3):
        svi.step(squares())
    assert all((p != old).all() for p, old in zip(guide.parameters(), before, strict=True))


def test_plates_of_data_may_be_subsampled():
    def model(y):
        theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(theta**2, 1.0), obs=y[index])

    guide = AutoMeanFieldMixture(model, 2)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), mf.ReverseKL())
    assert svi.step(squares()) > 0.0


# -- parameters, states, copies --------------------------------------------------------------------


def test_site_views_read_and_write_the_components():
    case = MODELS["real in a plate"]
    guide = AutoMeanFieldMixture(case.model, 3).setup(*case.args())
    guide.locs.theta = torch.arange(9.0).reshape(3, 3)
    guide.scales.mu = torch.tensor([1.0, 2.0, 3.0])
    site = guide.layout["theta"]
    torch.testing.assert_close(guide.loc[site.start : site.stop], guide.locs.theta)
    torch.testing.assert_close(guide.scales.mu, torch.tensor([1.0, 2.0, 3.0]))
    assert guide.site_params("logits").theta.shape == (3, 3)
    with pytest.raises(ValueError, match="share the components' weights"):
        guide.site_params("logits").theta = 0.0


@pytest.mark.parametrize("num", [1, 2, 5])
def test_starts_are_pairs_around_the_users_start(num):
    def start(site):
        return torch.tensor(2.0)

    make = {"num_components": num, "init_spread": 1.5, "init_loc_fn": start}
    loc = AutoMeanFieldMixture(two_signs, **make).setup(squares()).loc.detach()
    middle = torch.tensor([2.0, math.log(2.0)])
    torch.testing.assert_close(loc.mean(1), middle)
    assert ((loc - middle[:, None]).abs() <= 1.5).all()
    assert num == 1 or (torch.pdist(loc.T) > 0.1).all()
    again = AutoMeanFieldMixture(two_signs, **make).setup(squares())
    torch.testing.assert_close(loc, again.loc.detach(), rtol=0, atol=0)


def test_restarts_that_agree_are_not_called_different():
    """Medians of a mixture may lie in either mode."""
    guide = AutoMeanFieldMixture(two_signs, 2)
    result = mf.fit(two_signs, (squares(),), guide=guide, num_restarts=2, progress=False)
    assert result.restarts[0].elbo == pytest.approx(result.restarts[1].elbo, abs=0.01)
    assert "elsewhere" not in str(result)


def test_models_without_a_gradient_are_fitted_by_scores():
    def jumps(y):
        theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(theta.round().abs(), 1.0), obs=y)

    guide = AutoMeanFieldMixture(jumps, 2)
    with pytest.warns(mf.ConvergenceWarning, match="max_steps=20"):
        result = mf.fit(jumps, (torch.tensor(3.0),), guide=guide, max_gradients=20, progress=False)
    assert "score gradients" in result.reason


def test_states_copies_and_pickles_hold_the_mixture(fitted):
    guide, y = fitted.guide, squares()
    new = AutoMeanFieldMixture(two_signs, 2)
    new.load_state_dict(guide.state_dict())
    new.setup(y)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    for other in (new, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        torch.testing.assert_close(other.flat_params(), guide.flat_params(), rtol=0, atol=0)
        torch.testing.assert_close(other.median(), guide.median(), rtol=0, atol=0)


def test_posterior_is_torchs_own_mixture():
    guide = AutoMeanFieldMixture(two_signs, 3).setup(squares())
    posterior, z = guide.get_posterior(), guide.sample_unconstrained(5)
    assert posterior.event_shape == (2,)
    assert posterior.sample().shape == (2,)
    torch.testing.assert_close(posterior.log_prob(z), guide.log_prob_unconstrained(z))


# -- a fit -----------------------------------------------------------------------------------------


def test_fit_covers_both_signs(fitted):
    summary = fitted.summary()
    assert fitted.converged
    assert abs(summary.loc["theta", "mean"]) < 0.1
    assert abs(summary.loc["theta", "5%"] + 2.0) < 0.3 > abs(summary.loc["theta", "95%"] - 2.0)
    torch.testing.assert_close(fitted.guide.weights, torch.full((2,), 0.5), atol=0.02, rtol=0.0)
    assert "above that of one mean field" in str(fitted)
    theta = fitted.sample(200)["theta"]
    assert 60 < int((theta > 0).sum()) < 140  # z = 5.6 of a fair coin


def test_fit_is_better_than_one_mean_field(fitted):
    one = mf.fit(two_signs, (squares(),), progress=False)
    assert fitted.elbo > one.elbo + 0.6  # log 2 is what the second mode is worth


def test_fit_has_small_khat(fitted):
    log_weights = log_importance_weights(two_signs, fitted.guide, (squares(),), num_draws=2000)
    assert psis(log_weights).khat < 0.7


def test_fit_is_saved_and_loaded(fitted, tmp_path):
    path = tmp_path / "fit.pt"
    fitted.save(path)
    loaded = mf.FitResult.load(
        path, two_signs, (squares(),), guide=AutoMeanFieldMixture(two_signs, 2)
    )
    torch.testing.assert_close(loaded.guide.flat_params(), fitted.guide.flat_params())
    assert loaded.elbo == fitted.elbo
    with pytest.raises(CheckpointError, match="Give it a new one for the model"):
        mf.FitResult.load(path, two_signs, (squares(),))
    other = AutoMeanFieldMixture(two_signs, 3)
    with pytest.raises(CheckpointError, match="must have shape"):
        mf.FitResult.load(path, two_signs, (squares(),), guide=other)


def test_fit_becomes_arviz(fitted):
    data = fitted.to_arviz(num_draws=50)
    assert data["posterior"]["theta"].shape[-1] == 50


def test_forward_kl_fits_the_mixture_by_expectation_maximisation():
    """Given draws of the posterior; both modes get their half of the weight, z = 5."""
    theta = torch.cat([torch.randn(500) * 0.1 - 2.0, torch.randn(500) * 0.1 + 2.0])
    draws = {"theta": theta[torch.randperm(1000)], "sigma": 0.3 * (0.2 * torch.randn(1000)).exp()}
    guide = AutoMeanFieldMixture(two_signs, 2)
    with pytest.warns(mf.ConvergenceWarning):  # these are not draws of the posterior, only like it
        mf.fit(
            two_signs,
            (squares(),),
            guide=guide,
            objective=mf.ForwardKL(),
            draws=draws,
            progress=False,
        )
    torch.testing.assert_close(
        guide.locs.theta.sort().values, torch.tensor([-2.0, 2.0]), atol=0.03, rtol=0.0
    )
    torch.testing.assert_close(guide.weights, torch.full((2,), 0.5), atol=0.01, rtol=0.0)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, -1])
def test_refuses_no_components(num):
    with pytest.raises(ValueError, match=f"num_components >= 1; got {num}"):
        AutoMeanFieldMixture(two_signs, num)


@pytest.mark.parametrize("num", [2.0, "3", True, None])
def test_refuses_components_that_are_no_number(num):
    with pytest.raises(TypeError, match="num_components must be an integer"):
        AutoMeanFieldMixture(two_signs, num)


def test_refuses_a_bad_spread():
    with pytest.raises(ValueError, match="init_spread must not be negative"):
        AutoMeanFieldMixture(two_signs, 2, init_spread=-1.0)
    with pytest.raises(TypeError, match="init_spread must be a number"):
        AutoMeanFieldMixture(two_signs, 2, init_spread="wide")


def test_refuses_minibatches_of_latents():
    case = next(case for case in MODELS.values() if case.is_subsampled)
    guide = AutoMeanFieldMixture(case.model, 2)
    for _ in range(2):
        with pytest.raises(GuideMismatchError, match="subsampled around latent sites"):
            guide.setup(*case.args())


def test_refuses_angles():
    case = MODELS["circular"]
    with pytest.raises(FamilyError, match="'angle' is an angle"):
        AutoMeanFieldMixture(case.model, 2).setup(*case.args())


def test_refuses_the_state_of_another_number_of_components(fitted):
    new = AutoMeanFieldMixture(two_signs, 3)
    new.load_state_dict(fitted.guide.state_dict())
    with pytest.raises(GuideMismatchError, match="has shape"):
        new.setup(squares())
