"""Trained guides as ArviZ results: log q exact where it is given, left out where it cannot be."""

import functools
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)

from pyro_mf._errors import (
    ConversionWarning,
    GuideMismatchError,
    GuideNotSetUpError,
    ModelError,
)
from pyro_mf.compare import compare_posteriors
from pyro_mf.convert import from_pyro, from_pyro_svi
from pyro_mf.convert.generations import dataset, groups, import_arviz, load
from pyro_mf.guides import AutoMeanField
from tests.cases import MODELS

FULL = [name for name, case in MODELS.items() if not case.is_subsampled]


def gamma_poisson(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def counts():
    return torch.tensor([0.0, 2.0, 1.0])


def gamma_poisson_evidence(x):
    """The log evidence of a Gamma(2, 1) prior on a Poisson rate, in closed form."""
    a, n = 2.0 + x.sum(), 1.0 + len(x)
    return float(torch.lgamma(a) - a * math.log(n) - torch.lgamma(x + 1.0).sum())


def exact_guide(x):
    pyro.sample("rate", dist.Gamma(2.0 + x.sum(), 1.0 + len(x)))


def normal_normal(x):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_posterior(x):
    variance = 1.0 / (0.25 + len(x))
    return variance * x.sum(), variance**0.5


def normal_evidence(x):
    covariance = torch.eye(len(x)) + 4.0
    return float(dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x))


def statistic(result, name):
    return dataset(result, "sample_stats")[name].values


def fit_value(result, name):
    return float(dataset(result, "vi_fit")[name])


# -- log weights ---------------------------------------------------------------------------------


def test_at_the_posterior_our_guide_has_constant_weights_equal_to_the_evidence():
    x = torch.tensor([0.3, -0.2, 1.1])
    guide = AutoMeanField(normal_normal).setup(x)
    loc, scale = normal_posterior(x)
    guide.locs.z, guide.scales.z = loc, torch.tensor(scale)
    result = from_pyro_svi(guide, (x,), num_draws=100)
    np.testing.assert_allclose(statistic(result, "log_weight"), normal_evidence(x), rtol=1e-9)
    assert fit_value(result, "elbo") == pytest.approx(normal_evidence(x))
    assert fit_value(result, "pareto_k") == -math.inf
    assert fit_value(result, "elbo_mcse") < 1e-8


def test_at_the_posterior_a_function_on_a_constrained_site_has_constant_weights():
    """The Jacobian is in lp and in log q alike."""
    x = counts()
    result = from_pyro_svi(exact_guide, (x,), model=gamma_poisson, num_draws=100)
    expected = gamma_poisson_evidence(x)
    np.testing.assert_allclose(statistic(result, "log_weight"), expected, rtol=1e-9)
    rate = dataset(result, "posterior")["rate"].values
    log_q = dist.Gamma(5.0, 4.0).log_prob(torch.tensor(rate)) + torch.tensor(rate).log()
    np.testing.assert_allclose(statistic(result, "log_q"), log_q, rtol=1e-9)


@pytest.mark.parametrize("cls", [AutoNormal, AutoDiagonalNormal])
def test_log_q_of_stock_mean_field_guides_is_that_of_their_factors(cls):
    x = counts()
    guide = cls(gamma_poisson)
    SVI(gamma_poisson, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
    if cls is AutoNormal:
        loc, scale = guide.locs.rate, guide.scales.rate
    else:
        loc, scale = guide.loc, guide.scale
    result = from_pyro_svi(guide, (x,), num_draws=50)
    u = torch.tensor(dataset(result, "unconstrained_posterior")["rate"].values)
    log_q = dist.Normal(loc.detach(), scale.detach()).log_prob(u)
    np.testing.assert_allclose(statistic(result, "log_q"), log_q, rtol=1e-6)


@pytest.mark.parametrize(
    "cls", [AutoNormal, AutoMultivariateNormal, AutoStructured, AutoNormalMessenger]
)
def test_the_elbo_of_stock_guides_is_that_of_stock_svi(cls):
    """400 draws on each side; the difference is within 5 of its standard errors."""
    x = counts()
    guide = cls(gamma_poisson)
    svi = SVI(gamma_poisson, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(30):
        svi.step(x)
    stock = -np.array([svi.evaluate_loss(x) for _ in range(400)])
    result = from_pyro_svi(guide, (x,), num_draws=400)
    error = math.hypot(stock.std() / 20, fit_value(result, "elbo_mcse"))
    assert fit_value(result, "elbo") == pytest.approx(stock.mean(), abs=5 * error)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (AutoDelta, "puts 'rate' on a point"),
        (AutoLaplaceApproximation, "puts '_AutoLaplaceApproximation_latent' on a point"),
    ],
)
def test_point_guides_have_no_log_q_and_say_so(make, reason):
    x = counts()
    guide = make(gamma_poisson)
    guide(x)
    with pytest.warns(ConversionWarning, match=reason):
        result = from_pyro_svi(guide, (x,), num_draws=30)
    assert list(dataset(result, "sample_stats").data_vars) == ["lp"]
    assert "vi_fit" not in groups(result)


def test_a_function_with_auxiliary_draws_has_no_log_q():
    def guide(x):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("rate", dist.Gamma(noise.exp(), 1.0))

    with pytest.warns(ConversionWarning, match=r"auxiliary draws \['noise'\]"):
        result = from_pyro_svi(guide, (counts(),), model=gamma_poisson, num_draws=30)
    assert "log_weight" not in dataset(result, "sample_stats")


def test_a_list_of_stock_guides_has_log_q():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, b), obs=torch.tensor(1.0))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["a"])))
    guide.append(AutoDiagonalNormal(pyro.poutine.block(model, expose=["b"])))
    guide()
    assert "log_q" in dataset(from_pyro_svi(guide, num_draws=30), "sample_stats")


def test_statistics_agree_with_each_other():
    x = torch.tensor([0.3, -0.2, 1.1])
    result = from_pyro_svi(AutoMeanField(normal_normal).setup(x), (x,), num_draws=200)
    difference = statistic(result, "lp") - statistic(result, "log_q")
    np.testing.assert_allclose(statistic(result, "log_weight"), difference)
    assert fit_value(result, "elbo") == pytest.approx(difference.mean())
    assert fit_value(result, "elbo_mcse") == pytest.approx(difference.std(ddof=1) / math.sqrt(200))


# -- every kind of latent site -------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL)
def test_every_kind_of_site_converts_and_survives_netcdf(name, tmp_path):
    case = MODELS[name]
    args = case.args()
    guide = AutoMeanField(case.model).setup(*args)
    prior = None if case.has_improper else 10
    result = from_pyro_svi(guide, args, num_draws=30, posterior_predictive=True, prior=prior)
    posterior = dataset(result, "posterior")
    for site in guide.layout.sites:
        values = torch.tensor(posterior[site.name].values).reshape(30, *site.shape)
        assert bool(site.support.check(values).all())
        for plate in site.plates:
            assert plate.name in posterior[site.name].dims
    assert np.isfinite(statistic(result, "log_weight")).all()
    observed = dataset(result, "observed_data")
    predictive = dataset(result, "posterior_predictive")
    assert list(predictive.data_vars) == list(observed.data_vars)
    for y in observed.data_vars:
        assert predictive[y].dims == ("chain", "draw", *observed[y].dims)
    result.to_netcdf(str(tmp_path / "result.nc"))
    assert set(groups(load(tmp_path / "result.nc"))) == set(groups(result))


def test_summed_out_latents_are_absent_and_their_data_are_scored():
    case = MODELS["discrete summed out"]
    (x,) = case.args()
    guide = AutoMeanField(case.model).setup(x)
    result = from_pyro_svi(guide, (x,), num_draws=30, prior=10)
    posterior = dataset(result, "posterior")
    assert "k" not in posterior
    weights, locs = (torch.tensor(posterior[n].values) for n in ("weights", "locs"))
    mixture = dist.MixtureSameFamily(
        dist.Categorical(weights[..., None, :]), dist.Normal(locs[..., None, :], 1.0)
    )
    np.testing.assert_allclose(
        dataset(result, "log_likelihood")["x"], mixture.log_prob(x), rtol=1e-9
    )
    assert all("k" not in dataset(result, group) for group in groups(result))


# -- draws, names, data --------------------------------------------------------------------------


def test_chains_and_draws_are_as_asked_and_seeded():
    x = counts()
    guide = AutoMeanField(gamma_poisson).setup(x)
    state = torch.get_rng_state()
    one, two, other = (
        from_pyro_svi(guide, (x,), num_draws=20, num_chains=3, seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    rates = [dataset(r, "posterior")["rate"].values for r in (one, two, other)]
    assert rates[0].shape == (3, 20)
    np.testing.assert_array_equal(rates[0], rates[1])
    assert not np.array_equal(rates[0], rates[2])


def test_like_takes_the_coordinates_of_another_result():
    x = counts()
    chains = {"rate": torch.ones(4, 25)}
    nuts = from_pyro(chains, model=gamma_poisson, model_args=(x,))
    result = from_pyro_svi(AutoMeanField(gamma_poisson).setup(x), (x,), like=nuts)
    posterior = dataset(result, "posterior")
    assert posterior["rate"].shape == (4, 25)
    assert posterior["chain"].equals(dataset(nuts, "posterior")["chain"])


def test_the_fit_is_described():
    x = counts()
    guide = AutoMeanField(gamma_poisson).setup(x)
    result = from_pyro_svi(
        guide, (x,), num_draws=30, losses=[3.0, 2.0], attrs={"sampling_time": 0.5}
    )
    fit = dataset(result, "vi_fit")
    np.testing.assert_array_equal(fit["loss"], [3.0, 2.0])
    assert fit["loss"].dims == ("step",)
    assert list(fit["latent"].values) == ["rate"]
    assert float(fit["scale"].sel(latent="rate")) == pytest.approx(
        float(guide.scales.rate.detach())
    )
    attrs = dataset(result, "posterior").attrs
    assert attrs["guide"] == "AutoMeanField(normal)"
    assert attrs["num_steps"] == 2
    assert attrs["is_approximate"] == 1
    assert attrs["sampling_time"] == 0.5
    assert result.attrs["name"] == "gamma_poisson"


def test_an_svi_brings_its_guide_and_its_model():
    x = counts()
    svi = SVI(gamma_poisson, exact_guide, pyro.optim.Adam({}), Trace_ELBO())
    result = from_pyro_svi(svi, (x,), num_draws=30)
    assert fit_value(result, "elbo") == pytest.approx(gamma_poisson_evidence(x))


def test_a_model_without_data_converts():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoMeanField(model).setup()
    result = from_pyro_svi(guide, num_draws=30, posterior_predictive=True)
    assert "posterior_predictive" not in groups(result)
    assert "observed_data" not in groups(result)


def test_few_draws_have_no_khat():
    x = counts()
    result = from_pyro_svi(AutoMeanField(gamma_poisson).setup(x), (x,), num_draws=10)
    assert "pareto_k" not in dataset(result, "vi_fit")
    assert "elbo" in dataset(result, "vi_fit")


def test_a_guide_trained_on_minibatches_converts_with_the_full_model():
    def model(x, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.LogNormal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    x = torch.linspace(0.5, 2.0, 10)
    guide = AutoMeanField(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, size=4)
    with pytest.raises(ModelError, match="subsamples plate 'data'.* full data"):
        from_pyro_svi(guide, (x,), {"size": 4})
    result = from_pyro_svi(guide, (x,), num_draws=30)
    assert dataset(result, "posterior")["z"].dims == ("chain", "draw", "data")
    z = torch.tensor(dataset(result, "unconstrained_posterior")["z"].values)
    log_q = dist.Normal(guide.locs.z, guide.scales.z).log_prob(z).sum(-1)
    mu = torch.tensor(dataset(result, "posterior")["mu"].values)
    log_q = log_q + dist.Normal(guide.locs.mu, guide.scales.mu).log_prob(mu)
    np.testing.assert_allclose(statistic(result, "log_q"), log_q.detach(), rtol=1e-9)


def test_the_result_goes_through_arviz_and_the_comparison():
    az = import_arviz()
    x = torch.tensor([0.3, -0.2, 1.1])
    guide = AutoMeanField(normal_normal).setup(x)
    loc, scale = normal_posterior(x)
    guide.locs.z, guide.scales.z = loc, torch.tensor(scale)
    result = from_pyro_svi(guide, (x,))
    summary = az.summary(result, kind="stats")
    assert float(summary.loc["z", "mean"]) == pytest.approx(float(loc), abs=0.1)
    assert az.loo(result).n_data_points == 3
    exact = {"z": loc + scale * torch.randn(4, 250)}
    nuts = from_pyro(exact, model=normal_normal, model_args=(x,))
    report = compare_posteriors(nuts, {"q": result})
    row = report.table.loc[("q", "z")]
    assert abs(row["mean_error"]) < 5 * row["mean_error_mcse"]
    assert abs(row["sd_ratio"] - 1) < 5 * row["sd_ratio_mcse"]
    assert report.summary.loc["q", "elbo"] == pytest.approx(normal_evidence(x))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [AutoMeanField, AutoNormal, AutoDiagonalNormal])
def test_a_guide_that_has_not_been_set_up_is_refused(make):
    with pytest.raises(GuideNotSetUpError, match="has not seen its model run"):
        from_pyro_svi(make(gamma_poisson), (counts(),))


def test_something_that_is_no_guide_is_refused():
    with pytest.raises(TypeError, match=r"a guide must be callable; got dict"):
        from_pyro_svi({"rate": torch.ones(3)}, (counts(),))


def test_a_lone_argument_is_refused():
    with pytest.raises(TypeError, match=r"got Tensor. Write model_args=\(data,\)"):
        from_pyro_svi(exact_guide, counts(), model=gamma_poisson)


def test_an_unpickled_stock_guide_needs_the_model():
    guide = AutoNormal(MODELS["scalar real"].model)
    guide(counts())
    guide = pickle.loads(pickle.dumps(guide))
    with pytest.raises(ModelError, match=r"\(AutoNormal\) does not know its model"):
        from_pyro_svi(guide, (counts(),))


def test_a_function_needs_the_model():
    with pytest.raises(ModelError, match=r"the guide \(function\) does not know its model"):
        from_pyro_svi(exact_guide, (counts(),))


def test_an_unpickled_guide_needs_the_model():
    guide = pickle.loads(pickle.dumps(AutoMeanField(MODELS["real vector"].model).setup(counts())))
    with pytest.raises(GuideNotSetUpError, match="this guide was unpickled"):
        from_pyro_svi(guide, (counts(),))
    model = MODELS["real vector"].model
    assert "posterior" in groups(from_pyro_svi(guide, (counts(),), model=model, num_draws=30))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: AutoMeanField(gamma_poisson).setup(x),
        lambda x: exact_guide,
    ],
)
def test_a_guide_for_another_model_is_refused(make):
    x = counts()
    with pytest.raises(GuideMismatchError, match="Give the model"):
        from_pyro_svi(make(x), (x,), model=normal_normal)


def test_a_guide_for_data_of_another_size_is_refused():
    hierarchical = MODELS["real in a plate"].model
    guide = AutoMeanField(hierarchical).setup(torch.zeros(5))
    with pytest.raises(GuideMismatchError, match=r"'theta': \(5,\).*'theta': \(3,\)"):
        from_pyro_svi(guide, (torch.zeros(3),))
    stock = AutoNormal(hierarchical)
    stock(torch.zeros(5))
    with pytest.raises(GuideMismatchError, match=r"'theta' has shape \(5,\).*\(3,\)"):
        from_pyro_svi(stock, (torch.zeros(3),))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_draws": 0}, "num_draws must be an integer of at least 1; got 0"),
        ({"num_chains": 1.5}, "num_chains must be an integer of at least 1; got 1.5"),
        ({"coords": {"data": ["a"]}}, "1 labels for dimension 'data', whose size is 3"),
    ],
)
def test_bad_options_are_refused(kwargs, match):
    x = counts()
    with pytest.raises(ValueError, match=match):
        from_pyro_svi(AutoMeanField(gamma_poisson).setup(x), (x,), **kwargs)


def test_a_partial_function_can_be_converted():
    x = counts()
    model = functools.partial(gamma_poisson)
    result = from_pyro_svi(exact_guide, (x,), model=model, num_draws=30)
    assert result.attrs["name"] == "partial"
