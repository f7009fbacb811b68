"""Markov chains as ArviZ results: exact values, names, groups, and what is refused."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive

from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.baselines import run_nuts
from pyro_mf.convert import from_pyro
from pyro_mf.convert.generations import dataset, groups, import_arviz, load

SCHOOLS = ["Choate", "Deerfield", "Andover"]


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("effect", theta - mu)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def data():
    return torch.tensor([15.0, 10.0, 16.0]), torch.tensor([28.0, 8.0, -3.0])


def draws(chains=2, length=60, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(chains, length, *shape, generator=generator)

    return {"mu": normal(), "tau": normal().exp(), "theta": normal(3)}


def convert(**kwargs):
    return from_pyro(draws(), model=schools, model_args=data(), **kwargs)


@pytest.fixture(scope="module")
def mcmc():
    torch.manual_seed(0)
    kernel = NUTS(schools, max_tree_depth=4)
    sampler = MCMC(kernel, num_samples=40, warmup_steps=40, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler.run(*data())
    return sampler


def test_the_groups_are_those_of_the_schema():
    assert set(groups(convert())) == {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "log_prior",
        "log_likelihood",
        "observed_data",
    }


def test_draws_are_kept_and_carry_the_names_of_plates():
    posterior = dataset(convert(coords={"school": SCHOOLS}), "posterior")
    assert set(posterior.data_vars) == {"mu", "tau", "theta", "effect"}
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert list(posterior["school"].values) == SCHOOLS
    for name, value in draws().items():
        np.testing.assert_allclose(posterior[name].values, value, rtol=1e-12)


def test_deterministics_are_in_the_posterior_and_not_in_the_data():
    result = convert()
    posterior = dataset(result, "posterior")
    np.testing.assert_allclose(posterior["effect"], posterior["theta"] - posterior["mu"])
    assert list(dataset(result, "observed_data").data_vars) == ["y"]
    assert list(dataset(result, "log_likelihood").data_vars) == ["y"]


def test_densities_equal_those_written_by_hand():
    result, z, (sigma, y) = convert(), draws(), data()
    likelihood = dist.Normal(z["theta"], sigma).log_prob(y)
    prior = (
        dist.Normal(0.0, 5.0).log_prob(z["mu"])
        + dist.HalfNormal(5.0).log_prob(z["tau"])
        + dist.Normal(z["mu"][..., None], z["tau"][..., None]).log_prob(z["theta"]).sum(-1)
    )
    jacobian = z["tau"].log()
    np.testing.assert_allclose(dataset(result, "log_likelihood")["y"], likelihood)
    np.testing.assert_allclose(dataset(result, "log_prior")["log_prior"], prior)
    lp = dataset(result, "sample_stats")["lp"]
    np.testing.assert_allclose(lp, prior + likelihood.sum(-1) + jacobian)


def test_only_transformed_sites_have_unconstrained_draws():
    unconstrained = dataset(convert(), "unconstrained_posterior")
    assert list(unconstrained.data_vars) == ["tau"]
    np.testing.assert_allclose(unconstrained["tau"], draws()["tau"].log(), rtol=1e-9)


def test_labels_fit_a_simplex_on_both_sides_of_its_transform():
    def model():
        with pyro.plate("row", 2):
            pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    p = dist.Dirichlet(torch.ones(3)).sample((2, 5, 2))
    result = from_pyro(
        {"p": p}, model=model, dims={"p": ["row", "word"]}, coords={"word": ["a", "b", "c"]}
    )
    assert dataset(result, "posterior")["p"].dims == ("chain", "draw", "row", "word")
    unconstrained = dataset(result, "unconstrained_posterior")["p"]
    assert unconstrained.dims == ("chain", "draw", "row", "p_unconstrained_dim_0")
    assert unconstrained.shape == (2, 5, 2, 2)


def test_dims_for_an_event_do_not_disturb_the_log_likelihood():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 4):
            pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=torch.zeros(4, 3))

    result = from_pyro({"z": torch.zeros(1, 5)}, model=model, dims={"x": ["row", "column"]})
    assert dataset(result, "observed_data")["x"].dims == ("row", "column")
    assert dataset(result, "log_likelihood")["x"].dims == ("chain", "draw", "row")


def test_attributes_say_how_the_draws_were_made():
    result = convert(attrs={"sampling_time": 1.5, "note": None, "adapted": True})
    attrs = dataset(result, "posterior").attrs
    assert attrs["sampling_time"] == 1.5
    assert attrs["adapted"] == 1
    assert "note" not in attrs
    assert attrs["is_approximate"] == 0
    assert attrs["inference_library"] == "pyro"
    assert list(attrs["sample_dims"]) == ["chain", "draw"]
    assert result.attrs["name"] == "schools"
    assert "sample_dims" not in dataset(result, "observed_data").attrs


def test_netcdf_keeps_everything(tmp_path):
    result = convert(posterior_predictive=True, prior=20, coords={"school": SCHOOLS})
    result.to_netcdf(str(tmp_path / "result.nc"))
    back = load(tmp_path / "result.nc")
    assert set(groups(back)) == set(groups(result))
    for group in groups(result):
        for name, values in dataset(result, group).data_vars.items():
            np.testing.assert_array_equal(dataset(back, group)[name].values, values.values)
    assert dataset(back, "posterior").attrs["is_approximate"] == 0


def test_arviz_takes_the_result():
    az, result = import_arviz(), convert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # high Pareto k of made-up draws
        loo = az.loo(result)
        summary = az.summary(result)
    assert loo.n_data_points == 3
    assert "theta[0]" in summary.index


# -- the kinds of chains ----------------------------------------------------------------------


def test_mcmc_knows_its_model_and_arguments(mcmc):
    result = from_pyro(mcmc)
    samples = mcmc.get_samples(group_by_chain=True)
    posterior = dataset(result, "posterior")
    np.testing.assert_allclose(posterior["theta"].values, samples["theta"])
    np.testing.assert_array_equal(dataset(result, "observed_data")["y"].values, data()[1])
    assert posterior.attrs["inference_method"] == "nuts"


def test_divergences_are_at_their_draws(mcmc, monkeypatch):
    monkeypatch.setattr(mcmc, "_diagnostics", [{"divergences": [1, 4]}])
    diverging = dataset(from_pyro(mcmc), "sample_stats")["diverging"]
    assert list(np.flatnonzero(diverging.values[0])) == [1, 4]


def test_mcmc_that_has_not_run_is_refused():
    with pytest.raises(ValueError, match=r"has not run yet. Call mcmc.run"):
        from_pyro(MCMC(NUTS(schools), num_samples=5))


def test_mcmc_on_a_potential_needs_the_model(mcmc):
    sampler = MCMC(
        NUTS(potential_fn=lambda z: (z["mu"] ** 2).sum()),
        num_samples=5,
        warmup_steps=5,
        initial_params={"mu": torch.zeros(1)},
        disable_progbar=True,
    )
    sampler.run()
    with pytest.raises(ModelError, match=r"has no model, only a potential"):
        from_pyro(sampler)


def test_arguments_of_another_model_are_refused(mcmc):
    def other():
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"\['loc'\] are missing; got \['mu', 'tau', 'theta'\]"):
        from_pyro(mcmc, model=other, model_args=())
    sigma, y = data()
    with pytest.raises(ValueError, match=r"'theta' have shape \(1, 40, 3\); expected .*\(2,\)"):
        from_pyro(mcmc, model_args=(sigma[:2], y[:2]))


@pytest.fixture(scope="module")
def nuts():
    torch.manual_seed(0)
    return run_nuts(
        schools,
        data(),
        num_samples=30,
        warmup_steps=30,
        max_tree_depth=5,
        num_chains=2,
        backend="pyro",
        progress=False,
    )


def test_run_nuts_converts_with_its_statistics(nuts):
    result = nuts.to_arviz()
    stats = dataset(result, "sample_stats")
    assert {"lp", "diverging", "tree_depth"} <= set(stats.data_vars)
    np.testing.assert_allclose(
        dataset(result, "posterior")["theta"].values, nuts.samples["theta"].numpy(), rtol=1e-12
    )
    evaluated = nuts.log_joint(nuts.z)
    np.testing.assert_allclose(stats["lp"].values, evaluated.detach().numpy(), rtol=1e-6)
    attrs = dataset(result, "posterior").attrs
    assert attrs["sampling_time"] == pytest.approx(sum(nuts.seconds.values()))
    assert attrs["backend"] == "pyro"


def test_run_nuts_knows_its_model(nuts):
    with pytest.raises(ValueError, match="leave out model, model_args and model_kwargs"):
        from_pyro(nuts, model=schools)


@pytest.mark.parametrize(
    ("posterior", "kwargs", "error", "match"),
    [
        (3, {}, TypeError, "takes a pyro.infer.MCMC, a result of run_nuts or a mapping"),
        (draws(), {}, ModelError, "Give model and model_args"),
        ({**draws(), "thta": torch.zeros(2, 60)}, {"model": schools}, ValueError, r"\['thta'\]"),
        ({"mu": torch.zeros(2, 60)}, {"model": schools}, ValueError, r"\['tau', 'theta'\] are"),
        (
            {**draws(), "tau": torch.zeros(2, 60)},
            {"model": schools},
            NonFiniteError,
            "120 of 120 draws of 'tau' .* rounded onto the edge",
        ),
        ({k: v[:, :0] for k, v in draws().items()}, {"model": schools}, ValueError, "no draws"),
    ],
)
def test_bad_draws_are_refused(posterior, kwargs, error, match):
    with pytest.raises(error, match=match):
        from_pyro(posterior, **({"model_args": data(), **kwargs} if kwargs else {}))


def test_a_subsampled_model_is_refused():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    with pytest.raises(ModelError, match="subsamples plate 'data'.* full data"):
        from_pyro({"loc": torch.zeros(1, 30)}, model=model, model_args=(torch.zeros(10),))


# -- chains and draws of another result ----------------------------------------------------------


def test_like_takes_the_coordinates_and_spreads_the_draws():
    other = from_pyro(draws(1, 30), model=schools, model_args=data())
    result = from_pyro(draws(2, 60), model=schools, model_args=data(), like=other)
    posterior = dataset(result, "posterior")
    assert posterior.sizes["chain"] == 1
    assert posterior.sizes["draw"] == 30
    np.testing.assert_allclose(posterior["mu"][0, [0, -1]], draws(2, 60)["mu"][0, [0, -1]])


def test_like_thins_the_statistics_with_the_draws(nuts):
    other = from_pyro(draws(1, 30), model=schools, model_args=data())
    result = nuts.to_arviz(like=other)
    posterior, stats = dataset(result, "posterior"), dataset(result, "sample_stats")
    expected = (
        dataset(result, "log_prior")["log_prior"]
        + dataset(result, "log_likelihood")["y"].sum("school")
        + np.log(posterior["tau"])
    )
    assert posterior.sizes["draw"] == 30
    np.testing.assert_allclose(stats["lp"].values, expected.values, rtol=1e-4)


@pytest.mark.parametrize(("chains", "length"), [(3, 30), (1, 61)])
def test_like_cannot_be_larger(chains, length):
    other = from_pyro(draws(chains, length), model=schools, model_args=data())
    with pytest.raises(ValueError, match=r"only 2 chains of 60 draws are there"):
        convert(like=other)


def test_like_must_be_a_result():
    with pytest.raises(TypeError, match="like must be an InferenceData.* got list"):
        convert(like=[1, 2])


# -- predictive groups and data ------------------------------------------------------------------


def test_predictive_draws_follow_the_posterior_draws():
    """200 draws per school: the mean over draws of y - theta is known to sigma / sqrt(200)."""
    z = draws(2, 100)
    z["theta"] = z["theta"] * 1000.0
    result = from_pyro(z, model=schools, model_args=data(), posterior_predictive=True)
    predictive = dataset(result, "posterior_predictive")["y"]
    assert predictive.dims == ("chain", "draw", "school")
    sigma = data()[0].numpy()
    noise = (predictive.values - z["theta"].numpy()) / sigma
    assert np.abs(noise.mean((0, 1))).max() < 5 / np.sqrt(200)
    assert np.abs(noise.std((0, 1)) - 1).max() < 5 / np.sqrt(400)


def test_predictive_draws_of_ones_own_may_be_padded():
    """Pyro's Predictive pads sites to the depth of the plates."""
    flat = {k: v.flatten(0, 1) for k, v in draws().items()}
    own = Predictive(schools, flat, parallel=True)(data()[0])
    padded = {"y": own["y"].reshape(120, 1, 3)}
    result = convert(posterior_predictive=padded)
    np.testing.assert_array_equal(
        dataset(result, "posterior_predictive")["y"].values.reshape(120, 3), own["y"]
    )


def test_prior_draws_are_split_into_latents_and_data():
    """1000 draws: standard errors 5 / sqrt(1000) for mu; z = 5."""
    result = convert(prior=1000)
    prior = dataset(result, "prior")
    assert set(prior.data_vars) == {"mu", "tau", "theta", "effect"}
    assert prior["theta"].shape == (1, 1000, 3)
    np.testing.assert_allclose(prior["effect"], prior["theta"] - prior["mu"])
    assert list(dataset(result, "prior_predictive").data_vars) == ["y"]
    assert abs(float(prior["mu"].mean())) < 5 * 5 / np.sqrt(1000)
    assert float(prior["mu"].std()) == pytest.approx(5.0, abs=5 * 5 / np.sqrt(2000))


def test_prior_draws_of_ones_own_are_taken():
    own = Predictive(schools, num_samples=30)(data()[0])
    result = convert(prior=own)
    np.testing.assert_array_equal(dataset(result, "prior")["theta"][0], own["theta"])
    np.testing.assert_array_equal(dataset(result, "prior_predictive")["y"][0], own["y"])


def test_predictions_may_have_another_size_than_the_data():
    result = convert(predictions={"y": torch.zeros(120, 7)}, coords={"school": SCHOOLS})
    predictions = dataset(result, "predictions")
    assert predictions["y"].dims == ("chain", "draw", "school")
    assert list(predictions["school"].values) == list(range(7))
    assert list(dataset(result, "posterior")["school"].values) == SCHOOLS


def test_constant_data_take_names_and_labels():
    result = convert(
        constant_data={"sigma": data()[0]},
        predictions_constant_data={"new": torch.zeros(7)},
        dims={"sigma": ["school"]},
        coords={"school": SCHOOLS},
    )
    assert list(dataset(result, "constant_data")["school"].values) == SCHOOLS
    assert dataset(result, "predictions_constant_data")["new"].dims == ("new_dim_0",)


def test_log_likelihood_can_be_left_out(monkeypatch):
    monkeypatch.setattr("pyro_mf.convert.groups._CHUNK_ELEMENTS", 100)  # several chunks
    small, full = convert(log_likelihood=False), convert()
    assert "log_likelihood" not in groups(small)
    for group in groups(small):
        for name, values in dataset(small, group).data_vars.items():
            np.testing.assert_allclose(values, dataset(full, group)[name], rtol=1e-9)


def test_the_global_generator_is_not_touched_and_the_seed_decides():
    state = torch.get_rng_state()
    one, two = (convert(posterior_predictive=True, prior=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = convert(posterior_predictive=True, seed=1)
    y = [dataset(r, "posterior_predictive")["y"].values for r in (one, two, other)]
    np.testing.assert_array_equal(y[0], y[1])
    assert not np.array_equal(y[0], y[2])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"coords": {"school": ["a"]}}, "1 labels for dimension 'school', whose size is 3"),
        ({"coords": {"scool": SCHOOLS}}, r"dimensions \['scool'\] that no variable has"),
        ({"dims": {"thta": ["a"]}}, r"axes of \['thta'\], which are no variables"),
        ({"dims": {"theta": ["a", "b"]}}, "dims names 2 axes of 'theta'"),
        ({"posterior_predictive": {"y": torch.zeros(7, 3)}}, r"expected \(120, 3\)"),
        ({"posterior_predictive": {"x": torch.zeros(120)}}, "posterior_predictive has 'x'"),
        ({"predictions": {"y": torch.zeros(7, 3)}}, r"expected \(120, ...\)"),
        ({"prior": {"mu": torch.zeros(5), "tau": torch.zeros(6)}}, "prior has 'tau' of shape"),
    ],
)
def test_bad_options_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        convert(**kwargs)


def test_an_improper_prior_cannot_be_drawn():
    def model():
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    draw = {"loc": torch.zeros(1, 30)}
    assert "log_likelihood" in groups(from_pyro(draw, model=model))
    with pytest.raises(ModelError, match="the prior cannot be sampled"):
        from_pyro(draw, model=model, prior=10)
