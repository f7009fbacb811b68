"""A baseline that cannot be trusted, and fits of something else, are marked wherever they show."""

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_mf.compare import compare_posteriors
from pyro_mf.convert.generations import wrap


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def result(x, attrs=None, name=None, stats=None, **data):
    groups = {"posterior": xr.Dataset({"x": (("chain", "draw", "row"), x)}, attrs=attrs or {})}
    if stats:
        groups["sample_stats"] = xr.Dataset({k: (("chain", "draw"), v) for k, v in stats.items()})
    for group, values in data.items():
        groups[group] = xr.Dataset({"y": (tuple("ij"[: np.ndim(values)]), values)})
    return wrap(groups, {"name": name} if name else None)


FIT = result(normal(1, 4, 250, 2))


def compared(**kwargs):
    return compare_posteriors(result(normal(0, 4, 250, 2), **kwargs), {"q": FIT})


@pytest.fixture(scope="module")
def stuck():
    """One chain of the first parameter is elsewhere: R-hat about 1.3. The second is fine."""
    x = normal(0, 4, 250, 2)
    x[3, :, 0] += 1.5
    return compare_posteriors(result(x), {"q": FIT, "other": FIT})


def test_a_good_baseline_has_no_mark():
    report = compared()
    assert report.notes == ()
    assert not report.baseline.is_doubtful
    assert report.doubtful == set()
    assert not report.table["nuts_doubtful"].any()
    assert not report.summary["nuts_doubtful"].any()
    assert "doubtful" not in str(report)
    assert "!" not in str(report)


def test_a_bad_baseline_is_marked_in_every_table(stuck):
    assert stuck.baseline.max_rhat > 1.05
    assert stuck.summary["nuts_doubtful"].all()
    for frame in (stuck.table, stuck.summary, stuck.predictive):
        assert "R-hat is 1." in frame.attrs["notes"][0]
    text = str(stuck)
    assert "The NUTS baseline is doubtful: the chains disagree" in text
    assert text.index("doubtful") < text.index("mean error")
    assert text.count("[NUTS is doubtful]") == 3


def test_only_the_parameters_that_have_not_converged_are_marked(stuck):
    assert stuck.doubtful == {"x[0]"}
    assert stuck.table["nuts_doubtful"].tolist() == [True, False, True, False]
    assert "x[0] !" in str(stuck)
    assert "x[1] !" not in str(stuck)


def test_divergences_are_counted():
    diverging = np.zeros((4, 250), dtype=bool)
    assert compared(stats={"diverging": diverging}).notes == ()
    diverging[0, :7] = True
    report = compared(stats={"diverging": diverging})
    assert report.baseline.divergences == 7
    assert "7 transitions diverged" in str(report)
    diverging[0, 1:] = False
    assert "1 transition diverged" in str(compared(stats={"diverging": diverging}))


def test_one_chain_has_no_rhat():
    report = compare_posteriors(result(normal(0, 1, 1000, 2)), {"q": FIT})
    assert np.isnan(report.baseline.max_rhat)
    assert "one chain" in report.notes[0]


def test_chains_that_stand_still_are_doubtful():
    x = normal(0, 4, 250, 2)
    x[..., 0] = np.arange(4.0)[:, None]
    report = compare_posteriors(result(x), {"q": FIT})
    assert report.baseline.max_rhat == np.inf
    assert report.doubtful == {"x[0]"}


def test_the_tails_have_an_effective_size_of_their_own():
    report = compared()
    assert report.baseline.min_ess_tail == report.table["nuts_ess_tail"].min()
    assert report.baseline.min_ess_tail != report.baseline.min_ess


def autoregressive(seed, rho):
    noise = normal(seed, 4, 250)
    x = noise.copy()
    for t in range(1, 250):
        x[:, t] = rho * x[:, t - 1] + np.sqrt(1 - rho**2) * noise[:, t]
    return x


@pytest.mark.parametrize(("rho", "is_slow"), [(0.0, False), (0.99, True)])
def test_slow_energies_are_announced(rho, is_slow):
    """BFMI of an autoregression is 2 (1 - rho): 2 for independent energies, 0.02 for these."""
    report = compared(stats={"energy": autoregressive(3, rho)})
    assert any("BFMI" in note for note in report.notes) == is_slow
    if not is_slow:
        assert report.baseline.bfmi == pytest.approx(2.0, abs=0.4)  # the least of four chains


@pytest.mark.parametrize(("deep", "warns"), [(0, False), (5, False), (50, True)])
def test_trees_at_the_usual_limit_are_announced(deep, warns):
    depth = np.full((4, 250), 4)
    depth.flat[:deep] = 10
    report = compared(stats={"tree_depth": depth})
    assert any("have depth 10 or more" in note for note in report.notes) == warns
    assert report.baseline.max_tree_depth == (10 if deep else 4)
    assert report.baseline.deep_share == deep / 1000


# -- another model, other data ---------------------------------------------------------------------


def against(nuts, fit):
    return " ".join(compare_posteriors(nuts, {"q": fit}).notes)


X = normal(0, 4, 250, 2)
Y = normal(9, 20)


def test_the_same_data_in_single_precision_are_the_same():
    single = Y.astype(np.float32).astype(float)
    assert against(result(X, observed_data=Y), result(X, observed_data=single)) == ""


@pytest.mark.parametrize("group", ["observed_data", "constant_data"])
def test_a_fit_of_other_data_is_marked(group):
    other = Y.copy()
    other[3] += 0.01
    said = against(result(X, **{group: Y}), result(X, **{group: other}))
    assert "'q' is not of the data that NUTS has seen: 1 of 20 values of 'y' differ" in said
    said = against(result(X, **{group: Y}), result(X, **{group: Y[:10]}))
    assert "'y' has shape (10,) there and (20,) here" in said


def test_missing_values_in_both_are_no_difference():
    gaps = np.where(np.arange(20) < 3, np.nan, Y)
    assert against(result(X, observed_data=gaps), result(X, observed_data=gaps)) == ""


def test_a_fit_of_another_model_is_marked():
    said = against(result(X, name="schools"), result(X, name="regression"))
    assert "'q' is of the model 'regression', NUTS of 'schools'" in said
    assert against(result(X, name="schools"), result(X, name="schools")) == ""


@pytest.mark.parametrize(("shift", "is_far"), [(3.0, False), (20.0, True)])
def test_a_fit_far_from_nuts_is_suspected_of_other_data(shift, is_far):
    said = against(result(X), result(X + shift))
    assert ("It may be a fit of other data" in said) == is_far


def test_one_parameter_very_far_away_is_enough():
    assert "at worst (x[1])" in against(result(X), result(X + np.array([0.0, 150.0])))


def test_a_fit_that_has_not_converged_is_marked():
    said = against(result(X), result(X, attrs={"stop_reason": "budget"}))
    assert "'q' has not converged (it stopped with 'budget')" in said
    assert against(result(X), result(X, attrs={"stop_reason": "converged"})) == ""


# -- reference draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_reference_draws_may_be_arrays(kind):
    report = compare_posteriors({"x": kind(X)}, {"q": FIT})
    same = compare_posteriors(result(X), {"q": FIT})
    assert report.parameters == ["x[0]", "x[1]"]
    np.testing.assert_array_equal(report.table["mean_error"], same.table["mean_error"])


@pytest.mark.parametrize(
    "draws", [{"x": X, "z": X[:, :100]}, {"x": X[0, :, 0]}], ids=["unequal", "no chains"]
)
def test_reference_draws_of_other_shapes_are_refused(draws):
    with pytest.raises(ValueError, match=r"must be \(chains, draws, \*shape\) per variable"):
        compare_posteriors(draws, {"q": FIT})
