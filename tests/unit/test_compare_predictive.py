"""Predictions against NUTS: the collinear regression, and the numbers one by one."""

import functools
import math

import numpy as np
import pytest
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import norm

from pyro_mf.compare import compare_posteriors, elpd
from pyro_mf.convert.generations import dataset, groups, wrap

SIZE, NUM_DATA, RIDGE = 8, 50, 0.5


def collinear():
    """A regression of unit noise on predictors of correlation 0.8, with a prior of variance 2."""
    rng = np.random.default_rng(289)  # a draw as that of the notes, where the forward one varies
    root = np.linalg.cholesky(0.2 * np.eye(SIZE) + 0.8)
    x = rng.normal(size=(NUM_DATA, SIZE)) @ root.T
    y = x.sum(-1) + rng.normal(size=NUM_DATA)
    precision = x.T @ x + RIDGE * np.eye(SIZE)
    return x, y, np.linalg.solve(precision, x.T @ y), precision


def gaussian_result(mean, covariance, seed, *, draws=400, is_approximate=1, target=None):
    """What a Gaussian of the slopes says: slopes, expectations, predictions and likelihoods."""
    x, y, *_ = collinear()
    rng = np.random.default_rng(seed)
    root = np.linalg.cholesky(covariance)
    slopes = mean + rng.normal(size=(4, draws, SIZE)) @ root.T
    expectation = slopes @ x.T
    dims = ("chain", "draw", "data")
    log_likelihood = norm.logpdf(y, expectation, 1.0)
    deviation = np.linalg.solve(root, np.moveaxis(slopes - mean, -1, 0).reshape(SIZE, -1))
    log_q = -0.5 * (deviation**2).sum(0).reshape(4, draws) - np.log(np.diag(root)).sum()
    lp = log_likelihood.sum(-1) - 0.5 * RIDGE * (slopes**2).sum(-1)
    stats = (
        {"lp": lp} if target == "chain" else {"lp": lp, "log_q": log_q, "log_weight": lp - log_q}
    )
    posterior = {"slope": (("chain", "draw", "predictor"), slopes), "mean": (dims, expectation)}
    prediction = expectation + rng.normal(size=expectation.shape)
    return wrap(
        {
            "posterior": xr.Dataset(posterior, attrs={"is_approximate": is_approximate}),
            "sample_stats": xr.Dataset({k: (("chain", "draw"), v) for k, v in stats.items()}),
            "posterior_predictive": xr.Dataset({"y": (dims, prediction)}),
            "log_likelihood": xr.Dataset({"y": (dims, log_likelihood)}),
            "observed_data": xr.Dataset({"y": (("data",), y)}),
        }
    )


@functools.cache
def report():
    """The exact posterior as NUTS, and the optima of the two divergences in closed form."""
    _, _, mean, precision = collinear()
    exact = np.linalg.inv(precision)
    reverse, forward = np.diag(1 / np.diag(precision)), np.diag(np.diag(exact))
    nuts = gaussian_result(mean, exact, 0, is_approximate=0, target="chain")
    fits = {"reverse": reverse, "forward": forward, "linear response": exact}
    return compare_posteriors(
        nuts, {n: gaussian_result(mean, v, 1 + k) for k, (n, v) in enumerate(fits.items())}
    )


def variances():
    """Mean predictive variance, without the noise, by the formulas for a linear regression."""
    x, _, _, precision = collinear()
    exact = np.linalg.inv(precision)
    diagonals = {
        "NUTS": exact,
        "reverse": np.diag(1 / np.diag(precision)),
        "forward": np.diag(np.diag(exact)),
        "linear response": exact,
    }
    return {name: np.trace(x @ v @ x.T) / NUM_DATA for name, v in diagonals.items()}


def test_the_closed_forms_are_those_of_the_method_notes():
    """Exact 0.152, reverse 0.158, forward 0.695; three digits each."""
    found = variances()
    assert found["NUTS"] == pytest.approx(0.152, abs=0.0005)
    assert found["reverse"] == pytest.approx(0.158, abs=0.0005)
    assert found["forward"] == pytest.approx(0.695, abs=0.0005)


@pytest.mark.parametrize("name", ["NUTS", "reverse", "forward", "linear response"])
def test_the_report_shows_the_predictive_variance(name):
    """1600 draws in 8 dimensions: the mean variance is known to 1.3 %, z = 4.

    The forward one is inflated 4.6 times, which is 60 times that tolerance.
    """
    shown = report().predictive.loc[(name, "mean"), "variance"]
    assert shown == pytest.approx(variances()[name], rel=0.08)


def test_forward_marginals_are_right_and_its_predictions_far_too_wide():
    table, predictive = report().table, report().predictive
    slopes = [p for p in report().parameters if p.startswith("slope")]
    np.testing.assert_allclose(table.loc["forward"].loc[slopes, "sd_ratio"], 1.0, atol=0.1)
    assert (table.loc["reverse"].loc[slopes, "sd_ratio"] < 0.7).all()
    ratio = predictive["sd_ratio"]
    assert ratio["forward", "mean"] > 2.0
    assert ratio["linear response", "mean"] == pytest.approx(1.0, abs=0.05)
    assert ratio["forward", "y"] > 1.15  # of which unit noise is a part
    assert ratio["linear response", "y"] == pytest.approx(1.0, abs=0.03)
    assert predictive.loc[("forward", "y"), "lppd_diff"] < -2.0


def test_the_expected_ratio_of_predictions_is_that_of_the_variances():
    """The error of the ratio is the report's own; z = 4."""
    x, _, _, precision = collinear()
    exact = np.linalg.inv(precision)
    p, q = (1 + np.einsum("nd,de,ne->n", x, v, x) for v in (exact, np.diag(np.diag(exact))))
    row = report().predictive.loc[("forward", "y")]
    assert abs(row["sd_ratio"] - math.sqrt(np.mean(q / p))) < 4 * row["sd_ratio_mcse"]
    assert row["sd_ratio_mcse"] < 0.03


def test_means_that_agree_are_as_far_apart_as_the_floor_says():
    """The average over correlated observations varies by a half; a shift would be far above."""
    row = report().predictive.loc[("linear response", "mean")]
    assert row["mean_error"] < 2.5 * row["mean_error_floor"]
    assert row["mean_error_worst"] >= row["mean_error"]


def test_kinds_are_told_apart():
    predictive = report().predictive
    assert predictive.loc[("NUTS", "y"), "kind"] == "predictive"
    assert predictive.loc[("NUTS", "mean"), "kind"] == "local"
    assert ("NUTS", "slope") not in predictive.index
    assert (predictive["observations"] == NUM_DATA).all()


def test_a_result_predicts_as_itself():
    nuts = report().results["NUTS"]
    row = compare_posteriors(nuts, {"q": nuts}).predictive.loc[("q", "y")]
    assert row["mean_error"] == 0
    assert row["sd_ratio"] == pytest.approx(1)
    assert row["lppd_diff"] == 0
    assert row["elpd_diff"] == 0


def test_lppd_is_the_log_of_the_mean_likelihood():
    values = dataset(report().results["forward"], "log_likelihood")["y"].values.reshape(
        -1, NUM_DATA
    )
    expected = (logsumexp(values, axis=0) - math.log(len(values))).sum()
    assert report().predictive.loc[("forward", "y"), "lppd"] == pytest.approx(expected)


def test_coverage_counts_the_data_inside_central_intervals():
    result = report().results["NUTS"]
    _, y, *_ = collinear()
    draws = dataset(result, "posterior_predictive")["y"].values.reshape(-1, NUM_DATA)
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    row = report().predictive.loc[("NUTS", "y")]
    assert row["coverage_90"] == np.mean((low <= y) & (y <= high))
    assert row["coverage_50"] < row["coverage_90"]


# -- elpd ------------------------------------------------------------------------------------------


def test_elpd_of_a_fit_is_corrected_for_its_q():
    """Both estimate one number, though the fit's plain lppd is nats away; z = 4 of 50 elements."""
    row = report().predictive.loc[("forward", "y")]
    assert abs(row["elpd_diff"]) < max(4 * row["elpd_diff_se"], 1.0)
    assert row["lppd_diff"] < -2.0


def test_elpd_with_a_bad_khat_is_marked():
    predictive = report().predictive
    assert predictive.loc[("reverse", "y"), "elpd_doubtful"]
    assert predictive.loc[("reverse", "y"), "elpd_bad_k"] > 0
    assert not predictive.loc[("linear response", "y"), "elpd_doubtful"]
    lines = [line for line in str(report()).splitlines() if "lppd" not in line]
    assert any(
        line.split()[0] == "reverse" and line.endswith("!") for line in lines if line.strip()
    )


def test_elpd_is_never_the_plain_one_of_draws_of_a_fit():
    nuts, fit = report().results["NUTS"], report().results["forward"]
    kept = {g: dataset(fit, g) for g in groups(fit) if g != "sample_stats"}
    found = compare_posteriors(nuts, {"q": wrap(kept)})
    assert np.isnan(found.predictive.loc[("q", "y"), "elpd"])
    assert any("No elpd of 'q' for 'y'" in note and "log_q" in note for note in found.notes)
    assert found.predictive.loc[("q", "y"), "lppd"] < 0


def test_a_part_of_many_observations_stands_for_all(monkeypatch):
    """25 of 50 elements: the sum is known to 50 sd / 5 times the root of a half, z = 4."""
    full = report().predictive.loc[("NUTS", "y"), "elpd"]
    monkeypatch.setattr(elpd, "MAX_ELEMENTS", 25)
    nuts = report().results["NUTS"]
    found = compare_posteriors(nuts, {"q": nuts})
    assert len(found.loo_khat["y"]["NUTS"]) == 25
    assert found.predictive.loc[("NUTS", "y"), "elpd"] == pytest.approx(full, abs=4 * 50 * 0.8 / 7)


# -- what does not fit -----------------------------------------------------------------------------


def small(seed, y, **coords):
    x = np.random.default_rng(seed).normal(size=(2, 100))
    return wrap(
        {
            "posterior": xr.Dataset({"x": (("chain", "draw"), x)}),
            "posterior_predictive": xr.Dataset({"y": (("chain", "draw", "row"), y)}, coords),
        }
    )


def test_results_without_predictions_have_none():
    x = np.random.default_rng(0).normal(size=(2, 100))
    plain = wrap({"posterior": xr.Dataset({"x": (("chain", "draw"), x)})})
    found = compare_posteriors(plain, {"q": plain})
    assert found.predictive.empty
    assert "Predictions" not in str(found)


def test_other_observations_are_not_compared():
    rng = np.random.default_rng(0)
    nuts, fit = small(0, rng.normal(size=(2, 100, 3))), small(1, rng.normal(size=(2, 100, 4)))
    assert list(compare_posteriors(nuts, {"q": fit}).predictive.index) == [("NUTS", "y")]


def test_labels_of_observations_in_another_order_are_matched():
    y = np.random.default_rng(0).normal(size=(2, 100, 2)) + [0.0, 50.0]
    nuts = small(0, y, row=["a", "b"])
    fit = small(0, y[..., ::-1], row=["b", "a"])
    assert compare_posteriors(nuts, {"q": fit}).predictive.loc[("q", "y"), "mean_error"] == 0


def test_observations_that_are_always_predicted_alike_are_left_out():
    y = np.random.default_rng(0).normal(size=(2, 100, 2))
    y[..., 0] = 1.0
    row = compare_posteriors(small(0, y), {"q": small(1, y + 0.5)}).predictive.loc[("q", "y")]
    assert row["mean_error"] == pytest.approx(0.5 / y[..., 1].std(ddof=1))
