"""A family per site: asked for by name, dict or function, refused where it does not fit."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import constraints

import pyro_mf as mf
from pyro_mf._errors import FamilyError, GuideMismatchError
from pyro_mf.families import (
    FAMILIES,
    Beta,
    FullRank,
    Gamma,
    Normal,
    SinhArcsinh,
    Spline,
    get_family,
)
from pyro_mf.families.product import Product
from pyro_mf.families.protocol import event_dim_of, home_of

X = torch.tensor([0.3, 1.2, 0.7, 2.0], dtype=torch.float64)


def mixed(x=X):
    """One site of every support that families are at home on."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    bounded = pyro.sample("bounded", dist.Uniform(1.0, 4.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc.sum(-1), bounded))
        pyro.sample("x", dist.Exponential(rate * share * weights[..., 0] * z.exp()), obs=x)


SPEC = {"rate": "gamma", "share": Beta(), "loc": "full_rank", "z": "sinh_arcsinh"}
ELEMENTWISE = [
    name for name, f in FAMILIES.items() if not event_dim_of(f()) and home_of(f()) is None
]


def guide_of(spec, model=mixed):
    return mf.AutoMeanField(model, family=spec).setup()


def test_a_dict_gives_every_site_its_own():
    guide = guide_of(SPEC)
    names = {site: family.name for site, family in guide.families.items()}
    assert names == {
        "rate": "gamma",
        "share": "beta",
        "weights": "normal",
        "loc": "full_rank",
        "bounded": "normal",
        "z": "sinh_arcsinh",
    }
    trace = pyro.poutine.trace(guide).get_trace()
    base = {name: trace.nodes[name]["fn"] for name in names}
    assert isinstance(base["rate"], dist.Gamma)
    assert isinstance(base["share"], dist.Beta)


def test_a_function_of_the_site_and_the_dict_agree():
    guide = guide_of(lambda site: SPEC.get(site.name, "normal"))
    assert guide.families == guide_of(SPEC).families


def test_one_family_for_all_stays_itself():
    assert guide_of("spline").family == Spline()
    assert guide_of(dict.fromkeys(["rate", "share", "weights", "loc", "bounded", "z"], "spline"))
    assert isinstance(guide_of({"z": "spline"}).family, Product)


@pytest.mark.parametrize("spec", [SPEC, "spline", {"loc": FullRank(over="site")}])
def test_density_of_a_trace_is_that_of_the_values(spec):
    guide = guide_of(spec)
    for _ in range(3):
        trace = pyro.poutine.trace(guide).get_trace()
        values = {name: trace.nodes[name]["value"] for name in guide.families}
        torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(values))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_family_runs_in_stock_svi(name):
    guide = mf.AutoMeanField(mixed, family=name)
    svi = SVI(mixed, guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
    losses = [svi.step() for _ in range(3)]
    assert all(map(torch.isfinite, torch.tensor(losses)))
    for grad in (leaf.grad for leaf in guide.parameters()):
        assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("spec", [SPEC, "spline", "student_t"])
def test_both_roads_of_the_reverse_kl_agree(spec):
    guide = guide_of(spec)
    objective = mf.ReverseKL(num_particles=16)
    svi = SVI(mixed, guide, Adam({"lr": 0.02}), loss=objective)
    for _ in range(30):
        svi.step()
    fast = torch.tensor([objective.loss(mixed, guide) for _ in range(100)])
    slow = torch.tensor([Trace_ELBO().loss(mixed, guide) for _ in range(150)])
    error = (fast.var() / 100 + slow.var() / 150).sqrt()
    assert (fast.mean() - slow.mean()).abs() < 5.0 * error


def test_native_factors_have_analytic_divergences():
    # q = prior: the KL that Pyro computes in closed form is zero, whatever the draws are.
    def model():
        pyro.sample("rate", dist.Gamma(2.0, 3.0))

    guide = guide_of({"rate": "gamma"}, model)
    guide.set_flat_params((torch.tensor([2.0]), torch.tensor([3.0])))
    assert abs(TraceMeanField_ELBO().loss(model, guide)) < 1e-6


def test_conjugate_posteriors_are_found_exactly():
    counts = torch.tensor([2.0, 5.0, 3.0])

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    result = mf.fit(model, family={"rate": "gamma"})
    assert result.converged
    params = dict(zip(result.guide.family.param_names, result.guide.flat_params(), strict=True))
    # Gamma(2 + 10, 1 + 3); the optimum over fixed draws is off by little of its sd.
    torch.testing.assert_close(params["concentration"], torch.tensor([12.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(params["rate"], torch.tensor([4.0]), rtol=0.02, atol=0)
    evidence = (
        torch.lgamma(torch.tensor(12.0)) - 12.0 * torch.log(torch.tensor(4.0))
    ) - torch.lgamma(counts + 1.0).sum()
    assert abs(result.elbo - float(evidence)) < 0.01


def test_blocks_find_a_correlated_normal_exactly():
    covariance = torch.tensor([[1.0, 0.8, 0.3], [0.8, 2.0, -0.2], [0.3, -0.2, 0.5]])
    mean = torch.tensor([1.0, -1.0, 0.5])

    def model():
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    result = mf.fit(model, family="full_rank")
    assert result.converged
    loc, tril = result.guide.flat_params()
    torch.testing.assert_close(loc.reshape(-1), mean, atol=0.02, rtol=0)
    tril = tril.reshape(3, 3)
    torch.testing.assert_close(tril @ tril.T, covariance, atol=0.05, rtol=0)
    assert abs(result.elbo) < 0.01


def test_a_block_over_a_plate_holds_its_correlations():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 4):
            pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(4))
        pyro.factor("sum", -2.0 * pyro.poutine.block(lambda: mu)() ** 2 * 0.0)

    guide = guide_of({"theta": FullRank(over="site")}, model)
    family, params = guide.site_family(guide.layout["theta"])
    assert family.name == "full_rank"
    assert params["scale_tril"].shape == (4, 4)
    trace = pyro.poutine.trace(guide).get_trace()
    assert trace.nodes["theta"]["fn"].batch_shape == (4,)


def test_minibatches_use_the_parameters_of_their_elements():
    def model(x):
        with pyro.plate("data", 6, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x[index])

    x = torch.arange(6.0)
    for loss in (mf.ReverseKL(num_particles=4), Trace_ELBO()):
        pyro.clear_param_store()
        families = {"z": "spline", "w": FullRank(over="slice")}
        guide = mf.AutoMeanField(model, family=families).setup(x)
        svi = SVI(model, guide, Adam({"lr": 0.01}), loss=loss)
        before = [p.detach().clone() for p in guide.flat_params()]
        svi.step(x)
        for old, new in zip(before, guide.flat_params(), strict=True):
            moved = (old != new).reshape(6, -1).any(1).sum()
            assert moved <= 2
    whole = mf.AutoMeanField(model, family={"z": FullRank(over="site")})
    with pytest.raises(GuideMismatchError, match="over='slice'"):
        whole.setup(x)


def test_guides_are_copied_saved_and_pickled():
    guide = guide_of(SPEC)
    with torch.no_grad():
        for leaf in guide.parameters():
            leaf.add_(0.1)
    state = guide.state_dict()
    other = guide_of(SPEC)
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        for a, b in zip(twin.flat_params(), guide.flat_params(), strict=True):
            torch.testing.assert_close(a, b)
    assert Predictive(mixed, guide=guide, num_samples=3)()["z"].shape == (3, 4)
    assert guide.quantiles([0.1, 0.9])["weights"].shape == (2, 3)
    assert guide.get_posterior().sample((2,)).shape == (2, guide.layout.size)


def test_views_reach_every_sites_parameters():
    guide = guide_of(SPEC)
    guide.locs.z = 2.0
    assert (guide.locs.z == 2.0).all()
    assert "rate" not in set(guide.locs)  # a Gamma has no location
    guide.site_params("concentration").rate = 3.0
    assert float(guide.site_params("concentration").rate.detach()) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="has parameters"):
        guide.site_params("height")


def test_quantiles_of_a_simplex_are_those_of_its_elements():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(4)))

    guide = guide_of("dirichlet", model)
    alpha = torch.tensor([3.5, 1.0, 12.0, 1.3])
    guide.set_flat_params((alpha[None],))
    p = torch.tensor([0.05, 0.5, 0.95])
    found = guide.quantiles(p)["p"]
    exact = dist.Beta(alpha, alpha.sum() - alpha)
    share = torch.stack([(exact.sample((20_000,)) < row).double().mean(0) for row in found])
    # By 10,000 and 20,000 draws: five standard errors of both.
    assert ((share - p[:, None]).abs() < 5 * (0.25 / 10_000 + 0.25 / 20_000) ** 0.5).all()
    point = guide.median()["p"]
    torch.testing.assert_close(point.sum(), torch.tensor(1.0))


def test_adopting_families_keeps_centre_and_spread():
    guide = guide_of("normal")
    guide.locs.rate, guide.scales.rate = 1.0, 0.3
    guide.adopt({"rate": "sinh_arcsinh"})
    low, middle, high = guide.quantiles([0.158655, 0.5, 0.841345])["rate"].log()
    torch.testing.assert_close(middle, torch.tensor(1.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(high - low, torch.tensor(0.6), atol=2e-3, rtol=0)


class TestRefused:
    @pytest.mark.parametrize(
        ("spec", "match"),
        [
            ({"loc": "gamma"}, "'gamma' is for sites whose support is positive; site 'loc'"),
            ("beta", "site 'rate' has support"),
            ({"bounded": "gamma"}, "site 'bounded' has support"),
            ({"nowhere": "gamma"}, "'nowhere', which is no latent site"),
            ({"lc": "normal"}, "did you mean 'loc'"),
            (lambda site: Gamma(), "site 'share'"),
        ],
    )
    def test_misfits(self, spec, match):
        with pytest.raises(FamilyError, match=match):
            guide_of(spec)

    @pytest.mark.parametrize(
        ("spec", "error", "match"),
        [
            ({"rate": "gama"}, ValueError, "Unknown family 'gama'.*did you mean 'gamma'"),
            ({"rate": 3}, TypeError, "got 3"),
            (3, TypeError, "a dict of them by site"),
            ({1: "normal"}, TypeError, "names of sites, strings, as keys; got 1"),
            ({"rate": {"a": "normal"}}, TypeError, "site 'rate': family must be"),
            (torch.distributions.Normal(0.0, 1.0), TypeError, "got Normal"),
            (Normal, TypeError, "family must be a name"),
        ],
    )
    def test_unknown_ones_before_the_model_is_seen(self, spec, error, match):
        with pytest.raises(error, match=match):
            mf.AutoMeanField(mixed, family=spec)

    def test_blocks_that_are_too_large(self):
        def model():
            pyro.sample("w", dist.Normal(0.0, 1.0).expand([20_000]).to_event(1))

        with pytest.raises(FamilyError, match=r"3052 MiB.*low_rank"):
            guide_of("full_rank", model)
        guide_of("low_rank", model)

    def test_parameters_that_hide_an_attribute(self):
        class Clash(SinhArcsinh):
            @property
            def param_names(self):
                return ("loc", "scale", "locs", "tail")

        with pytest.raises(FamilyError, match="'locs', which is an attribute"):
            guide_of(Clash())


def test_families_fit_supports_with_other_bounds():
    def model():
        pyro.sample("above", dist.Gamma(2.0, 1.0).mask(True))
        pyro.sample("between", dist.Uniform(2.0, 5.0))
        pyro.sample(
            "beyond",
            dist.TransformedDistribution(
                dist.LogNormal(0.0, 1.0), [dist.transforms.AffineTransform(3.0, 1.0)]
            ),
        )

    guide = guide_of({"above": "gamma", "between": "beta"}, model)
    values = guide.sample_posterior(100)
    assert ((values["between"] > 2.0) & (values["between"] < 5.0)).all()
    assert constraints.positive.check(values["above"]).all()
    trace = pyro.poutine.trace(guide).get_trace()
    drawn = {name: trace.nodes[name]["value"] for name in guide.families}
    torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(drawn))


def test_get_family_knows_all():
    assert {get_family(name).name for name in FAMILIES} == set(FAMILIES)
