"""Measures between posteriors: exact where they are, and errors that mean what they say."""

import functools

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from pyro_mf.compare import PosteriorComparison, compare_posteriors
from pyro_mf.compare.aligned import align_draws
from pyro_mf.compare.measures import Moments, measure
from pyro_mf.convert.generations import dataset, wrap


def result(attrs=None, coords=None, dims=(), stats=None, fit=None, **arrays):
    """A result whose posterior holds arrays of shape (chain, draw, ...)."""
    data = {name: (("chain", "draw", *dims[: a.ndim - 2]), a) for name, a in arrays.items()}
    groups = {"posterior": xr.Dataset(data, coords, attrs or {})}
    if stats:
        groups["sample_stats"] = xr.Dataset({k: (("chain", "draw"), v) for k, v in stats.items()})
    if fit:
        groups["vi_fit"] = xr.Dataset(fit)
    return wrap(groups)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def autoregressive(seed, chains, draws, rho):
    """Stationary standard normal chains with correlation ``rho`` between neighbours."""
    noise = normal(seed, chains, draws)
    x = noise.copy()
    for t in range(1, draws):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return x


def row(report, fit="q", parameter="x"):
    return report.table.loc[(fit, parameter)].astype(float)


def test_a_posterior_is_at_no_distance_from_itself():
    x = normal(0, 4, 250)
    r = row(compare_posteriors(result(x=x), {"q": result(x=x)}))
    assert r["mean_error"] == 0
    assert r["sd_ratio"] == 1
    assert r["wasserstein"] == 0
    assert r["wasserstein_mcse"] == 0
    assert r["mean_error_mcse"] > 0


def test_a_shift_of_the_same_draws_is_found_exactly():
    x = normal(0, 4, 250)
    shift = 0.3 * x.std(ddof=1)
    r = row(compare_posteriors(result(x=x), {"q": result(x=x + shift)}))
    np.testing.assert_allclose(r[["mean_error", "sd_ratio", "wasserstein"]], [0.3, 1, 0.3])
    # The dual potential of a shift is the identity, so both errors are those of a mean; in gaps
    # between draws wider than the shift it is flat.
    np.testing.assert_allclose(r["wasserstein_mcse"], r["mean_error_mcse"], rtol=0.02)


def test_an_affine_map_of_the_draws_is_found_exactly():
    x = normal(0, 4, 250)
    q = 5 + 0.4 * (x - x.mean())
    r = row(compare_posteriors(result(x=x), {"q": result(x=q)}))
    np.testing.assert_allclose(r["sd_ratio"], 0.4)
    np.testing.assert_allclose(r["mean_error"], (5 - x.mean()) / x.std(ddof=1))


def test_measures_do_not_depend_on_the_unit():
    x, q = normal(0, 4, 250), 0.7 * normal(1, 1, 800) + 0.2
    one = row(compare_posteriors(result(x=x), {"q": result(x=q)})).iloc[2:]
    other = row(compare_posteriors(result(x=50 * x - 7), {"q": result(x=50 * q - 7)})).iloc[2:]
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_wasserstein_equals_the_library_with_unequal_numbers_of_draws():
    x, q = normal(0, 4, 250), np.random.default_rng(1).gamma(2.0, size=(1, 700))
    r = row(compare_posteriors(result(x=x), {"q": result(x=q)}))
    expected = scipy.stats.wasserstein_distance(x.ravel(), q.ravel()) / x.std(ddof=1)
    np.testing.assert_allclose(r["wasserstein"], expected)


@functools.cache
def repeated_runs():
    """Measures of 100 runs with autocorrelated NUTS draws."""
    rows = []
    for seed in range(100):
        nuts = Moments.of(autoregressive(seed, 4, 400, 0.8)[..., None], independent=False)
        fit = Moments.of(0.3 + 0.6 * normal(1000 + seed, 1, 400, 1), independent=True)
        rows.append(measure(nuts, fit, ["x"]).loc["x"])
    return rows


@pytest.mark.parametrize(
    "measure", ["mean_error", "sd_ratio", "wasserstein", "q5_error", "q50_error"]
)
def test_monte_carlo_errors_are_the_spread_over_repeated_runs(measure):
    """100 runs with autocorrelated NUTS draws: the sd over runs is known to 7 %, so z = 4 is 28 %.

    The estimate of an effective sample size adds a few percent; ignoring the autocorrelation
    (effective size a ninth) would make the errors of the mean three times too small.
    """
    seen = [[r[measure], r[f"{measure}_mcse"]] for r in repeated_runs()]
    estimate, mcse = np.transpose(seen)
    assert estimate.std(ddof=1) == pytest.approx(mcse.mean(), rel=0.3)


def test_the_floor_is_the_distance_between_two_samples_of_one_distribution():
    """200 runs: the distance varies by a third, so its mean is known to 2.5 %; z = 4 is 10 %."""
    seen = [
        measure(
            Moments.of(normal(s, 2, 200, 1), independent=True),
            Moments.of(normal(s + 500, 1, 300, 1), independent=True),
            ["x"],
        )
        for s in range(200)
    ]
    distance = np.mean([r["wasserstein"] for r in seen])
    assert distance == pytest.approx(np.mean([r["wasserstein_floor"] for r in seen]), rel=0.1)


def test_more_draws_lower_the_floor():
    x = normal(0, 4, 1000)
    few = row(compare_posteriors(result(x=x[:, :100]), {"q": result(x=x[:, :100])}))
    many = row(compare_posteriors(result(x=x), {"q": result(x=x)}))
    assert few["wasserstein_floor"] > 2 * many["wasserstein_floor"]


def test_draws_of_another_chain_method_do_not_count_as_independent():
    nuts, x = result(x=normal(0, 4, 250)), autoregressive(1, 4, 250, 0.9)
    independent = row(compare_posteriors(nuts, {"q": result(x=x)}))
    chains = row(compare_posteriors(nuts, {"q": result({"is_approximate": 0}, x=x)}))
    assert chains["mean_error_mcse"] > 1.5 * independent["mean_error_mcse"]


def test_parameters_are_named_by_their_labels():
    coords = {"school": ["Choate", "Deerfield"], "time": [1990, 2000, 2010]}
    nuts = result(
        coords=coords, dims=("school", "time"), mu=normal(0, 2, 100), x=normal(1, 2, 100, 2, 3)
    )
    report = compare_posteriors(nuts, {"q": nuts})
    assert report.parameters[:3] == ["mu", "x[Choate,1990]", "x[Choate,2000]"]
    assert len(report.parameters) == 7
    assert report.draws["NUTS"].shape == (2, 100, 7)


def test_labels_in_another_order_are_matched():
    x = normal(0, 2, 100, 2) * [1.0, 10.0]
    nuts = result(coords={"a": ["one", "two"]}, dims=("a",), x=x)
    fit = result(coords={"a": ["two", "one"]}, dims=("a",), x=x[..., ::-1])
    np.testing.assert_allclose(compare_posteriors(nuts, {"q": fit}).table["sd_ratio"], 1.0)


def test_axes_in_another_order_are_matched():
    x = normal(0, 2, 100, 2, 3)
    nuts = result(dims=("a", "b"), x=x)
    fit = result(dims=("b", "a"), x=x.swapaxes(2, 3))
    np.testing.assert_array_equal(compare_posteriors(nuts, {"q": fit}).table["wasserstein"], 0.0)


def test_several_fits_have_a_row_each_and_a_summary():
    x = normal(0, 4, 250, 2)
    nuts = result({"sampling_time": 12.5}, dims=("a",), x=x)
    far = x + np.array([0.0, 2.0]) * x.std((0, 1), ddof=1)
    fits = {
        "near": result(
            {"sampling_time": 0.25}, dims=("a",), x=x, fit={"pareto_k": 0.4, "elbo": -3}
        ),
        "far": result(dims=("a",), x=far),
    }
    report = compare_posteriors(nuts, fits)
    assert list(report.table.index.names) == ["fit", "parameter"]
    assert report.baseline.seconds == 12.5
    assert report.summary.loc["near", "seconds"] == 0.25
    assert report.summary.loc["near", "pareto_k"] == 0.4
    assert np.isnan(report.summary.loc["far", "seconds"])
    np.testing.assert_allclose(report.summary.loc["far", "mean_error_worst"], 2.0)
    np.testing.assert_allclose(report.summary.loc["far", "wasserstein_median"], 1.0)
    assert report.furthest(1) == ["x[1]"]


def test_the_worst_sd_ratio_is_the_furthest_from_one_on_the_log_scale():
    x = normal(0, 4, 250, 2)
    report = compare_posteriors(
        result(dims=("a",), x=x), {"q": result(dims=("a",), x=x * [0.2, 1.8])}
    )
    np.testing.assert_allclose(report.summary.loc["q", "sd_ratio_worst"], 0.2)


def test_printing_shows_errors_times_and_the_baseline():
    x = normal(0, 4, 250, 30)
    nuts = result(
        {"sampling_time": 12.5}, dims=("a",), x=x, stats={"diverging": np.zeros((4, 250))}
    )
    text = str(
        compare_posteriors(nuts, {"reverse": result({"sampling_time": 0.25}, dims=("a",), x=x)})
    )
    assert "NUTS: 4 chains of 250 draws, max R-hat 1.0" in text
    assert "0 divergences, 12.5 s" in text
    assert "10 more in .table" in text
    assert "+0.00 ± 0.0" in text
    assert "0.25" in text
    assert "doubtful" not in text
    assert max(map(len, text.splitlines())) <= 110


def test_constant_elements_are_left_out_and_named():
    x = normal(0, 2, 100, 2)
    x[..., 0] = 1.0
    report = compare_posteriors(result(dims=("a",), x=x), {"q": result(dims=("a",), x=x)})
    assert report.parameters == ["x[1]"]
    assert "constant in NUTS: x[0]" in report.notes[0]


def test_a_point_estimate_can_be_compared():
    x = normal(0, 4, 250)
    r = row(compare_posteriors(result(x=x), {"map": result(x=np.full((1, 100), x.mean()))}), "map")
    assert r["sd_ratio"] == pytest.approx(0, abs=1e-12)
    assert np.isfinite(r).all()


def test_variables_of_one_result_only_are_left_out_and_named():
    x = normal(0, 2, 100)
    report = compare_posteriors(result(x=x, extra=x), {"q": result(x=x)})
    assert report.parameters == ["x"]
    assert "not in every result: extra (of 'NUTS')" in report.notes[0]


def test_objects_with_to_arviz_are_converted():
    class Fit:
        def to_arviz(self):
            return result(x=normal(0, 2, 100))

    assert isinstance(compare_posteriors(Fit(), {"q": Fit()}), PosteriorComparison)


X = normal(0, 2, 100)


@pytest.mark.parametrize(
    ("nuts", "fits", "error", "match"),
    [
        (result(x=X), {}, ValueError, "at least one entry.* got dict"),
        (result(x=X), result(x=X), ValueError, "must be a mapping .* Give each fit a name"),
        (result(x=X), {"NUTS": result(x=X)}, ValueError, "called 'NUTS', as the baseline is"),
        (result(x=X), {"q": {"x": X}}, TypeError, "'q' must be an InferenceData.* got dict"),
        (result(x=X), {"q": result(y=X)}, ValueError, r"share no variable \(NUTS: \['x'\]; q"),
        (result(x=X), {"q": result(x=X[:, :20])}, ValueError, "'q' has 40 draws; at least 100"),
        (
            result(x=X),
            {"q": result(dims=("a",), x=normal(0, 2, 100, 3))},
            ValueError,
            r"one draw of 'x' has shape \(3,\) in 'q', and \(\) was expected",
        ),
        (
            result(x=X),
            {"q": result(x=np.where(X > 2, np.nan, X))},
            ValueError,
            "of 200 draws of 'x' in 'q' are NaN or infinite",
        ),
        (result(x=0 * X), {"q": result(x=X)}, ValueError, "every parameter is constant"),
        (
            wrap({"posterior": xr.Dataset({"x": (("sample",), X.ravel())})}),
            {"q": result(x=X)},
            ValueError,
            r"must have the dimensions chain and draw; it has \['sample'\]",
        ),
        (
            wrap({"prior": xr.Dataset({"x": (("chain", "draw"), X)})}),
            {"q": result(x=X)},
            KeyError,
            "expected a group 'posterior'",
        ),
    ],
)
def test_bad_input_is_refused(nuts, fits, error, match):
    with pytest.raises(error, match=match):
        compare_posteriors(nuts, fits)


def test_aligned_draws_keep_the_values():
    x = normal(0, 2, 100, 3)
    aligned = align_draws({"a": result(dims=("r",), x=x)}, min_draws=200)
    np.testing.assert_array_equal(aligned.draws["a"], x)
    assert dataset(result(x=X), "posterior").sizes["draw"] == 100


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (4.3478, 3.24, "4.3 ± 3.2"),
        (-0.0699, 0.961, "-0.07 ± 0.96"),
        (1234.6, 125.0, "1230 ± 120"),
        (0.0, 2.5e-9, "0 ± 2.5e-09"),
    ],
)
def test_values_are_shown_to_two_digits_of_the_sd(mean, sd, text):
    z = normal(0, 4, 250)
    z = mean + sd * (z - z.mean()) / z.std(ddof=1)
    report = compare_posteriors(result(x=z), {"q": result(x=z)})
    shown = report.nuts_value("x")
    assert shown == text or (mean == 0 and shown.endswith(text[3:]))
