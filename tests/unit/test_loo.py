"""Leave-one-out from draws of a guide: exact answers, ArviZ's answers, and what is refused."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoDelta
from torch.distributions import MultivariateNormal

from pyro_mf import fit
from pyro_mf._errors import ConversionWarning, KhatWarning
from pyro_mf.convert import elpd_numbers, from_pyro, from_pyro_svi, loo
from pyro_mf.convert.generations import arviz_major, dataset, groups, import_arviz, wrap
from pyro_mf.guides import AutoMeanField

SAMPLE = ("chain", "draw")
NEW = arviz_major() >= 1


def regression_data(num=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 3, generator=generator, dtype=torch.float64)
    x[:, 1] = 0.9 * x[:, 0] + 0.4 * x[:, 1]
    truth = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    return x, x @ truth + torch.randn(num, generator=generator, dtype=torch.float64)


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def posterior_of(x, y):
    covariance = torch.linalg.inv(x.T @ x + torch.eye(3) / 4)
    return MultivariateNormal(covariance @ x.T @ y, covariance)


def predictive(x, y, of):
    """Log density of one element given some data."""
    p = posterior_of(x, y)
    x_new, y_new = of
    sd = (1.0 + x_new @ p.covariance_matrix @ x_new).sqrt()
    return dist.Normal(x_new @ p.mean, sd).log_prob(y_new)


def exact_elpd(x, y):
    """The elpd and the effective number of parameters."""
    keep = ~torch.eye(len(y), dtype=torch.bool)
    left_out = [predictive(x[k], y[k], (x[i], y[i])) for i, k in enumerate(keep)]
    within = [predictive(x, y, (x[i], y[i])) for i in range(len(y))]
    return float(sum(left_out)), float(sum(within) - sum(left_out))


def result_of(z, log_lik, lp=None, log_q=None, *, chains=1, attrs=None):
    """A result of flat draws, as the converters make them."""

    def fold(values):
        return np.asarray(values).reshape(chains, -1, *np.shape(values)[1:])

    coords = {"chain": range(chains), "draw": range(len(z) // chains)}
    dims = [f"d{i}" for i in range(log_lik.ndim - 1)]
    stats = {n: (SAMPLE, fold(v)) for n, v in (("lp", lp), ("log_q", log_q)) if v is not None}
    return wrap(
        {
            "posterior": xr.Dataset({"z": ((*SAMPLE, "k"), fold(z))}, coords, attrs or {}),
            "sample_stats": xr.Dataset(stats, coords),
            "log_likelihood": xr.Dataset({"y": ((*SAMPLE, *dims), fold(log_lik))}, coords),
        }
    )


def widened(scale, num, seed, *, chains=1, attrs=None):
    """Draws of the regression's posterior stretched about its mean."""
    x, y = regression_data()
    p = posterior_of(x, y)
    noise = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    z = p.mean + scale * noise @ p.scale_tril.T
    log_q = MultivariateNormal(p.mean, scale**2 * p.covariance_matrix).log_prob(z)
    log_lik = dist.Normal(z @ x.T, 1.0).log_prob(y)
    return result_of(z, log_lik, p.log_prob(z), log_q, chains=chains, attrs=attrs)


def grid():
    """A case without random numbers: one Normal location, q 1.1 wide about zero."""
    y = torch.tensor([0.3, -1.2, 2.5, 0.0, 1.1])
    z = 1.1 * torch.special.ndtri((torch.arange(1600) + 0.5) / 1600)
    log_lik = -0.5 * (y - z[:, None]) ** 2 - 0.5 * math.log(2.0 * math.pi)
    lp, log_q = log_lik.sum(1) - 0.5 * z**2, -0.5 * (z / 1.1) ** 2
    return z[:, None], log_lik, lp, log_q


def arviz_loo(result, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat
        return import_arviz().loo(result, pointwise=True, **options)


# -- it is right ---------------------------------------------------------------------------------


def test_draws_of_too_wide_a_guide_give_the_exact_elpd_and_plain_loo_does_not():
    elpd, p = exact_elpd(*regression_data())
    runs = [elpd_numbers(loo(widened(1.5, 400, seed))) for seed in range(16)]
    assert not any(run.num_bad for run in runs)
    for found, expected in (([r.elpd for r in runs], elpd), ([r.p for r in runs], p)):
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        assert np.mean(found) == pytest.approx(expected, abs=4.0 * error)
        assert error < 0.05
    plain = elpd_numbers(arviz_loo(widened(1.5, 1000, 0)))
    assert plain.elpd < elpd - 3.0
    assert plain.p > 2.0 * p


def test_too_narrow_a_guide_is_marked():
    with pytest.warns(KhatWarning, match=r"of 20 elements.*guide's weights.*linear_response=True"):
        elpd = loo(widened(0.3, 1000, 0))
    assert elpd.warning
    assert elpd_numbers(elpd).num_bad == 20


def test_numbers_are_those_of_arviz_1_on_both_generations():
    z, log_lik, lp, log_q = grid()
    elpd = elpd_numbers(loo(result_of(z, log_lik, lp, log_q)))
    # loo_approximate_posterior of ArviZ 1.3
    frozen = [-1.0235974468878046, -2.643613527637773, -3.531604203610181]
    frozen += [-1.1315992621431983, -1.2635982118937807]
    khat = [-1.6102436966858231, -1.616670011747288, -1.6149951277002617]
    khat += [-1.6176630589186953, -1.6251222630500552]
    np.testing.assert_allclose(elpd.pointwise, frozen, rtol=1e-12)
    np.testing.assert_allclose(elpd.khat, khat, rtol=1e-9)
    assert (elpd.elpd, elpd.se) == pytest.approx((-9.594012652172738, 2.494206798993379))


@pytest.mark.skipif(not NEW, reason="ArviZ 0.x does not correct for a guide")
@pytest.mark.parametrize(("draws", "tolerance"), [(1600, 1e-10), (1000, 0.1)])
def test_numbers_are_those_of_arviz_but_for_a_point_more_in_the_tail(draws, tolerance):
    result = widened(1.3, draws, 0)
    stats = result["sample_stats"]
    theirs = import_arviz().loo_approximate_posterior(
        result, stats["lp"], stats["log_q"], pointwise=True
    )
    ours = loo(result)
    np.testing.assert_allclose(ours.elpd_i, theirs.elpd_i, rtol=0.0, atol=tolerance)
    np.testing.assert_allclose(ours.pareto_k, theirs.pareto_k, rtol=0.0, atol=tolerance)
    assert ours.se == pytest.approx(theirs.se, abs=tolerance)
    assert type(ours) is type(theirs)
    assert ours.approx_posterior


@pytest.mark.parametrize("attrs", [{"is_approximate": 0}, {}])
def test_draws_of_the_posterior_get_ordinary_loo(attrs):
    result = widened(1.0, 1600, 0, attrs={"is_approximate": 0})
    if not attrs:  # of another library: no densities either
        kept = [g for g in groups(result) if g != "sample_stats"]
        result = wrap({g: dataset(result, g).assign_attrs(attrs) for g in kept})
    ours = elpd_numbers(loo(result))
    theirs = elpd_numbers(arviz_loo(result, reff=1.0))
    assert ours.elpd == pytest.approx(theirs.elpd, abs=1e-9)
    assert ours.p == pytest.approx(theirs.p, abs=1e-9)
    np.testing.assert_allclose(ours.khat, theirs.khat, atol=1e-9)


def test_labels_and_chains_are_kept_and_do_not_matter():
    z, log_lik, lp, log_q = grid()
    square = log_lik[:, :4].reshape(-1, 2, 2)
    elpd = loo(result_of(z, square, lp, log_q))
    assert elpd.pareto_k.dims == ("d0", "d1")
    chains = torch.arange(1600).reshape(-1, 4).T.reshape(-1)  # every fourth draw
    several = loo(result_of(z[chains], square[chains], lp[chains], log_q[chains], chains=4))
    np.testing.assert_allclose(elpd_numbers(elpd).pointwise, elpd_numbers(several).pointwise)


def test_arviz_takes_what_comes_out():
    az = import_arviz()
    wide, right = loo(widened(1.5, 1600, 0)), loo(widened(1.0, 1600, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 of what pandas and matplotlib deprecate
        table = az.compare({"wide": wide, "right": right})
        az.plot_khat(wide)
    assert set(table.index) == {"wide", "right"}
    assert "Pareto k" in str(wide)


def test_factors_of_discrete_sites_count_with_their_labels():
    data = torch.tensor([-0.4, 0.3, 2.6, 0.9])

    def clusters(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(loc + 2.0 * k, 2.0), obs=x)

    loc = torch.linspace(-12.0, 12.0, 4001)[:, None]
    first, second = (dist.Normal(loc + shift, 2.0).log_prob(data) for shift in (0.0, 2.0))
    log_lik = torch.logaddexp(math.log(0.7) + first, math.log(0.3) + second)
    log_p = dist.Normal(0.0, 2.0).log_prob(loc[:, 0]) + log_lik.sum(1)
    expected = torch.logsumexp(log_p, 0) - torch.logsumexp(log_p[:, None] - log_lik, 0)
    guide = AutoMeanField(clusters, family={"k": "bernoulli"}, init_scale=1.5).setup(data)
    result = from_pyro_svi(guide, (data,), num_draws=400)
    elpd = elpd_numbers(loo(result))
    log_weight = dataset(result, "sample_stats")["log_weight"].to_numpy().reshape(-1, 1)
    density = np.exp(dataset(result, "log_likelihood")["x"].to_numpy()[0])
    weight = np.exp(log_weight - log_weight.max()) / density
    weight /= weight.sum(0)
    error = np.linalg.norm(weight * (density / np.exp(elpd.pointwise) - 1.0), axis=0)
    assert elpd.num_bad == 0
    assert error.max() < 0.15
    np.testing.assert_array_less(np.abs(elpd.pointwise - expected.numpy()), 4.0 * error)


def test_linear_response_is_the_better_proposal():
    fitted = fit(regression, regression_data(), progress=False)
    elpd, _ = exact_elpd(*regression_data())
    better = elpd_numbers(loo(fitted, linear_response=True, num_draws=4000))
    with pytest.warns(KhatWarning):
        mean_field = elpd_numbers(loo(fitted, num_draws=4000))
    assert better.num_bad == 0
    assert better.elpd == pytest.approx(elpd, abs=0.2)  # four times the sd over seeds
    assert mean_field.num_bad == 20


def test_chains_of_the_posterior_agree():
    data = regression_data()
    chains = from_pyro(
        {"beta": posterior_of(*data).sample((4, 1000))}, model=regression, model_args=data
    )
    elpd, _ = exact_elpd(*data)
    assert elpd_numbers(loo(chains)).elpd == pytest.approx(elpd, abs=0.2)


def test_draws_of_weight_zero_may_say_anything():
    z, log_lik, lp, log_q = grid()
    outside = z[:, 0] > 2.0
    lp[outside] = -math.inf
    elpd = loo(result_of(z, log_lik, lp, log_q))
    log_lik[outside] = -math.inf
    assert loo(result_of(z, log_lik, lp, log_q)).se == elpd.se


def test_elements_that_say_nothing_are_no_trouble():
    z, log_lik, lp, log_q = grid()
    log_lik[:, 0] = 0.0  # masked
    for densities in ({"lp": lp, "log_q": log_q}, {}):
        elpd = elpd_numbers(loo(result_of(z, log_lik / 10.0, **densities)))
        assert elpd.pointwise[0] == pytest.approx(0.0, abs=1e-12)
        assert elpd.num_bad == 0


# -- it refuses ----------------------------------------------------------------------------------


def changed(**replaced):
    z, log_lik, lp, log_q = grid()
    attrs = replaced.pop("attrs", None)
    arrays = {"z": z, "log_lik": log_lik, "lp": lp, "log_q": log_q}
    return result_of(**{**arrays, **replaced}, attrs=attrs)


def spoilt(array, value):
    array = array.clone()
    array.view(-1)[7] = value
    return array


def replaced(group, change):
    result = changed()
    return wrap({g: dataset(result, g) for g in groups(result)} | {group: change(result)})


def of_half(result):
    return dataset(result, "log_likelihood").isel(draw=slice(800))


def relabelled(result):
    return dataset(result, "log_likelihood").assign_coords(draw=np.arange(1, 1601))


def of_two_sites(result):
    log_lik = dataset(result, "log_likelihood")
    return log_lik.assign(extra=log_lik["y"])


Z, LOG_LIK, LP, LOG_Q = grid()
REFUSED = {
    "few draws": (lambda: changed(z=Z[:90], log_lik=LOG_LIK[:90], lp=LP[:90], log_q=LOG_Q[:90]),
                  "at least 100 draws; got 90"),
    "NaN weight": (lambda: changed(lp=spoilt(LP, math.nan)), "1 of 1600 are NaN"),
    "infinite weight": (lambda: changed(lp=spoilt(LP, math.inf)), "1 of 1600 are NaN or"),
    "no weight": (lambda: changed(lp=LP - math.inf), "not all -inf"),
    "infinite log q": (lambda: changed(log_q=spoilt(LOG_Q, -math.inf)), "log_q must be finite"),
    "constant log q": (lambda: changed(log_q=0.0 * LOG_Q), "cannot be the same at all"),
    "NaN likelihood": (lambda: changed(log_lik=spoilt(LOG_LIK, math.nan)), "of 'y' is NaN"),
    "zero likelihood": (lambda: changed(log_lik=spoilt(LOG_LIK, -math.inf)), "1 of 8000 draws"),
    "one element": (lambda: changed(log_lik=LOG_LIK[:, :1]), "has 1 element"),
    "no densities": (lambda: changed(lp=None, log_q=None, attrs={"is_approximate": 1}),
                     r"lacks \['lp', 'log_q'\]"),
    "no lp": (lambda: changed(lp=None), r"lacks \['lp'\]"),
    "other draws": (lambda: replaced("log_likelihood", of_half), "has 800 draws and posterior"),
    "other labels": (lambda: replaced("log_likelihood", relabelled), "labels differ"),
    "several sites": (lambda: replaced("log_likelihood", of_two_sites), "'extra', 'y'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    make, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        loo(make())


def test_one_of_several_sites_can_be_chosen():
    result = replaced("log_likelihood", of_two_sites)
    assert loo(result, var_name="extra").pareto_k.name == "pareto_k"
    with pytest.raises(ValueError, match=r"'x' is no observed site; expected one of .*'y'"):
        loo(result, var_name="x")


def test_what_is_no_result_is_refused():
    with pytest.raises(TypeError, match="got dict. Convert it"):
        loo({})
    with pytest.raises(TypeError, match=r"\['num_draws'\] are options of to_arviz"):
        loo(changed(), num_draws=10)
    with pytest.raises(TypeError, match="Call mf.loo"):
        elpd_numbers(3.0)
    with pytest.raises(ValueError, match="pointwise=True"):
        elpd_numbers(import_arviz().loo(changed(log_lik=LOG_LIK / 10.0), pointwise=False))


def test_missing_likelihood_and_missing_density_say_how_to_get_them():
    data = (torch.tensor([0.3, 0.7, -0.2]),)

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide = AutoMeanField(model).setup(*data)
    with pytest.raises(ValueError, match="log_likelihood=True"):
        loo(from_pyro_svi(guide, data, log_likelihood=False))
    guide = AutoDelta(model)
    guide(*data)
    with pytest.warns(ConversionWarning, match="log_q"):
        result = from_pyro_svi(guide, data)
    with pytest.raises(ValueError, match=r"lacks \['log_q'\].*take the draws for the posterior's"):
        loo(result)


def test_chains_of_different_guides_are_refused_and_those_of_one_are_not():
    z, log_lik, lp, log_q = grid()
    shuffled = torch.randperm(1600, generator=torch.Generator().manual_seed(0))
    z, log_lik, lp, log_q = (a[shuffled] for a in (z, log_lik, lp, log_q))
    loo(result_of(z, log_lik, lp, log_q, chains=4))
    z = z + (torch.arange(1600) >= 1200)[:, None]  # the last chain ended elsewhere
    with pytest.raises(ValueError, match="different guides.*num_chains=1"):
        loo(result_of(z, log_lik, lp, log_q, chains=4))


def test_restarts_that_agree_may_be_pooled_and_others_not():
    data = (torch.tensor([2.0, 1.7, 2.2, 1.9]),)

    def sign(x):
        root = pyro.sample("root", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(root**2, 1.0), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(sign, data, num_restarts=6, progress=False)
        locs = {round(float(o.params[0]), 1) for o in result.restarts}
        assert len(locs) > 1  # both signs are found
        with pytest.raises(ValueError, match="6 chains were drawn from different guides"):
            loo(result)
        assert elpd_numbers(loo(result, num_chains=1)).khat.shape == (4,)
