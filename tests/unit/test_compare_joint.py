"""Joint distances: exact, or in closed form on average, and silent between equals."""

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_mf.compare import compare_posteriors
from pyro_mf.compare.importance import khat_of
from pyro_mf.compare.joint import discrepancy, median_distance
from pyro_mf.convert.generations import wrap
from pyro_mf.weights import psis


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def result(x, attrs=None, **groups):
    posterior = xr.Dataset({"x": (("chain", "draw", "row"), x)}, attrs=attrs or {})
    return wrap({"posterior": posterior, **groups})


def expected_kernel(mean, covariance, h):
    """E k(x, y) for x - y from Normal(mean, covariance)."""
    size = len(mean)
    wide = np.eye(size) + covariance / h**2
    return np.linalg.det(wide) ** -0.5 * np.exp(
        -0.5 * mean @ np.linalg.solve(h**2 * np.eye(size) + covariance, mean)
    )


def expected_mmd2(mean, root_p, root_q, h):
    p, q, zero = root_p @ root_p.T, root_q @ root_q.T, np.zeros_like(mean)
    return (
        expected_kernel(zero, 2 * p, h)
        + expected_kernel(zero, 2 * q, h)
        - 2 * expected_kernel(mean, p + q, h)
    )


def test_a_sample_is_at_no_distance_from_itself():
    x = normal(0, 300, 4)
    found = discrepancy(x, x, 2.0)
    assert found.mmd2 == pytest.approx(0.0, abs=1e-15)
    assert found.mcse == pytest.approx(0.0, abs=1e-15)


def test_the_estimate_is_the_mean_over_all_pairs():
    x, y, h = normal(0, 12, 3), normal(1, 12, 3) + 0.4, 1.3

    def kernel(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * h**2))

    pairs = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i in range(12)
        for j in range(12)
        if i != j
    ]
    assert discrepancy(x, y, h).mmd2 == pytest.approx(np.mean(pairs), abs=1e-14)


GAUSSIANS = {
    "shifted": (np.array([0.5, 0.0, 0.0]), np.eye(3), np.eye(3)),
    "wide": (np.zeros(3), np.eye(3), 1.5 * np.eye(3)),
    "correlated": (np.zeros(3), np.eye(3), np.linalg.cholesky(0.2 * np.eye(3) + 0.8)),
}


@pytest.mark.parametrize("name", GAUSSIANS)
def test_gaussians_are_at_their_distance(name):
    """Thirty pairs of samples: their mean is within z = 4 standard errors of the closed form.

    The error itself is the spread over pairs, which 30 of them know to 13 %; z = 4 is 50 %.
    Equal distributions would be 10 standard errors away.
    """
    mean, root_p, root_q = GAUSSIANS[name]
    found = [
        discrepancy(
            normal(seed, 300, 3) @ root_p.T, mean + normal(1000 + seed, 300, 3) @ root_q.T, 2.0
        )
        for seed in range(30)
    ]
    estimate = np.array([f.mmd2 for f in found])
    error = estimate.std(ddof=1) / np.sqrt(len(found))
    assert abs(estimate.mean() - expected_mmd2(*GAUSSIANS[name], 2.0)) < 4 * error
    assert np.mean([f.mcse for f in found]) == pytest.approx(estimate.std(ddof=1), rel=0.5)
    assert estimate.mean() > 10 * error


def test_equal_distributions_exceed_the_floor_one_time_in_twenty():
    """200 pairs: 10 expected, standard error 3.1; z = 4 allows up to 22."""
    exceed = 0
    for seed in range(200):
        found = discrepancy(normal(seed, 60, 3), normal(5000 + seed, 60, 3), 2.0)
        exceed += found.mmd2 > found.floor
    assert 0 < exceed <= 22


def test_the_median_distance_of_a_triangle():
    assert median_distance(np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])) == pytest.approx(4.0)


def test_a_missed_correlation_is_seen_jointly_and_in_no_marginal():
    z = normal(0, 4, 400, 2)
    correlated = z.copy()
    correlated[..., 1] = 0.95 * z[..., 0] + np.sqrt(1 - 0.95**2) * z[..., 1]
    report = compare_posteriors(
        result(correlated), {"mean field": result(normal(1, 4, 400, 2)), "same": result(correlated)}
    )
    summary, table = report.summary, report.table
    assert (table["wasserstein"] < 2 * table["wasserstein_floor"]).all()
    assert summary.loc["mean field", "mmd2"] > 5 * summary.loc["mean field", "mmd2_floor"]
    assert summary.loc["mean field", "mmd2_pvalue"] < 0.01
    assert summary.loc["same", "mmd2"] == pytest.approx(0.0, abs=1e-12)


def test_units_do_not_matter():
    p, q = normal(0, 4, 200, 2), 0.3 + normal(1, 4, 200, 2)
    unit = np.array([1.0, 1000.0])
    one = compare_posteriors(result(p), {"q": result(q)}).summary
    other = compare_posteriors(result(p * unit), {"q": result(q * unit)}).summary
    assert one["mmd2"].item() == pytest.approx(other["mmd2"].item(), abs=1e-10)


def test_too_few_effective_draws_give_no_distance_but_a_note():
    stuck = normal(0, 4, 100, 1) * 0.1 + np.arange(4.0)[:, None, None]
    report = compare_posteriors(result(stuck), {"q": result(normal(1, 4, 100, 1))})
    assert np.isnan(report.summary["mmd2"]).all()
    assert any("No MMD where fewer than 50 effective draws" in note for note in report.notes)


# -- k-hat -----------------------------------------------------------------------------------------


def stats(log_weight):
    return xr.Dataset({"log_weight": (("chain", "draw"), log_weight)})


def test_khat_is_that_of_the_draws_where_the_fit_does_not_say():
    log_weight = np.random.default_rng(0).standard_t(3, size=(4, 250))
    found = khat_of(result(normal(0, 4, 250, 1), sample_stats=stats(log_weight)))
    expected = psis(torch.as_tensor(log_weight.ravel()))
    assert found["pareto_k"] == expected.khat
    assert found["pareto_k_se"] == expected.khat_se
    assert found["pareto_k_threshold"] == expected.threshold


def test_khat_that_the_fit_says_comes_first():
    own = xr.Dataset({"pareto_k": 0.4, "pareto_k_se": 0.05, "pareto_k_threshold": 0.66})
    wild = stats(np.random.default_rng(0).standard_cauchy(size=(4, 250)))
    found = khat_of(result(normal(0, 4, 250, 1), sample_stats=wild, vi_fit=own))
    assert list(found.values()) == [0.4, 0.05, 0.66]


@pytest.mark.parametrize("bad", [np.full((4, 250), np.nan), np.full((4, 250), -np.inf)])
def test_khat_of_weights_that_are_not_finite_is_unknown(bad):
    found = khat_of(result(normal(0, 4, 250, 1), sample_stats=stats(bad)))
    assert np.isnan(list(found.values())).all()


def test_khat_above_its_threshold_is_marked():
    x = normal(0, 4, 250, 1)
    fits = {
        "good": result(x, vi_fit=xr.Dataset({"pareto_k": 0.3, "pareto_k_se": 0.1})),
        "bad": result(x, vi_fit=xr.Dataset({"pareto_k": 0.9, "pareto_k_se": 0.1})),
        "unknown": result(x),
    }
    report = compare_posteriors(result(x), fits)
    assert report.summary["pareto_k_high"].tolist() == [False, True, False]
    text = str(report)
    assert "0.90 ± 0.10 !" in text
    assert "0.30 ± 0.10 !" not in text
