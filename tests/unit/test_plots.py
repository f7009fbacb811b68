"""The overview of a comparison: what is in it, read back from the figure."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pyro_mf.compare import compare_posteriors
from pyro_mf.convert.generations import wrap
from pyro_mf.plots import plot_comparison
from pyro_mf.plots.densities import density
from pyro_mf.plots.forest import LIMIT
from pyro_mf.plots.overview import MAX_FOREST


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def result(draws, mu):
    data = {"mu": (("chain", "draw"), mu), "theta": (("chain", "draw", "school"), draws)}
    return wrap({"posterior": xr.Dataset(data)})


@functools.cache
def report(size=4, num_fits=2, shift=0.0, scale=0.5):
    rng = np.random.default_rng(0)
    theta, mu = rng.normal(size=(4, 100, size)), rng.normal(size=(4, 100))
    fits = {f"fit {k}": result(scale * theta + shift, mu + k) for k in range(num_fits)}
    return compare_posteriors(result(theta, mu), fits)


def labels(figure):
    return [t.get_text() for a in figure.axes for t in a.get_yticklabels()]


def titles(figure):
    return [a.get_title() for a in figure.axes if a.get_title()]


def test_every_parameter_has_a_row_and_a_density():
    figure = plot_comparison(report())
    parameters = ["mu", *(f"theta[{i}]" for i in range(4))]
    assert labels(figure) == parameters
    assert sorted(titles(figure)) == sorted(parameters)


def test_the_legend_names_nuts_and_every_fit():
    figure = plot_comparison(report())
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["NUTS", "fit 0", "fit 1"]


def test_the_forest_shows_distances_in_nuts_sds():
    comparison = report(num_fits=1)
    figure = plot_comparison(comparison, max_densities=0)
    nuts, fit = figure.axes[0].get_lines()[:2]
    np.testing.assert_allclose(nuts.get_xdata(), 0.0, atol=1e-12)
    np.testing.assert_allclose(fit.get_xdata(), comparison.table["mean_error"], atol=1e-12)


def test_a_mean_out_of_sight_is_an_arrow_at_the_edge():
    figure = plot_comparison(report(num_fits=1, shift=-50.0), max_densities=0)
    axes = figure.axes[0]
    assert axes.get_xlim() == (-LIMIT, LIMIT)
    (arrow,) = [line for line in axes.get_lines() if line.get_marker() == "<"]
    np.testing.assert_array_equal(arrow.get_xdata(), -LIMIT)


def test_densities_integrate_to_one():
    rng = np.random.default_rng(0)
    for sample in (rng.normal(size=3000), rng.exponential(size=3000)):
        grid, curve = density(sample, sample.min(), sample.max())
        assert np.sum(curve) * (grid[1] - grid[0]) == pytest.approx(1, rel=1e-6)


def test_the_density_at_a_hard_bound_is_not_halved():
    """3000 exponential draws, bandwidth 0.15: bias below 10 %, standard error about 5 %."""
    sample = np.random.default_rng(0).exponential(size=3000)
    _, curve = density(sample, 0.0, sample.max())
    assert curve[0] == pytest.approx(1.0, abs=0.25)


def test_only_the_furthest_densities_are_drawn():
    figure = plot_comparison(report(size=30), max_densities=3)
    assert titles(figure)[0] == "mu"  # shifted by one sd in the second fit
    assert len([a for a in figure.axes if a.get_title()]) == 3


def test_many_parameters_are_set_in_columns():
    figure = plot_comparison(report(size=49), max_densities=0)
    assert len(figure.axes) == 2
    assert len(labels(figure)) == 50


def test_of_very_many_parameters_the_furthest_are_kept():
    assert len(labels(plot_comparison(report(size=80), max_densities=0))) == MAX_FOREST


@pytest.mark.parametrize(
    ("var_names", "count"), [(["mu"], 1), ("theta", 4), (["theta[1]", "mu"], 2), (None, 5)]
)
def test_var_names_choose_variables_or_elements(var_names, count):
    assert len(labels(plot_comparison(report(), var_names=var_names))) == count


def test_a_point_estimate_is_a_line():
    rng = np.random.default_rng(0)
    theta, mu = rng.normal(size=(4, 100, 2)), rng.normal(size=(4, 100))
    point = result(np.zeros((1, 100, 2)), np.zeros((1, 100)))
    plot_comparison(compare_posteriors(result(theta, mu), {"MAP": point})).canvas.draw()


def test_the_picture_is_written_without_warnings(tmp_path):
    path = tmp_path / "comparison.png"
    plot_comparison(report(size=49), path=path)
    assert path.stat().st_size > 20_000


def test_something_else_than_a_comparison_is_refused():
    with pytest.raises(TypeError, match="got dict. Call plot_comparison"):
        plot_comparison({})


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"has \['tehta'\], which were not compared.*'mu', 'theta'"
    ):
        plot_comparison(report(), var_names=["tehta"])


def test_too_many_fits_are_refused():
    with pytest.raises(ValueError, match="at most 6 fits can be told apart in one picture; got 7"):
        plot_comparison(report(num_fits=7))
