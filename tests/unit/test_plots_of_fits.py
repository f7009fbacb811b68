"""Ranks, pairs, sds, traces, k-hat and predictions: read back from the pictures."""

import functools
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from pyro_mf import plots
from pyro_mf.compare import compare_posteriors
from pyro_mf.convert.generations import wrap
from pyro_mf.plots.pairs import _ellipse, _worst_correlated
from pyro_mf.plots.ranks import share_below

OF_REPORTS = ["comparison", "ranks", "pairs", "sds", "khat", "predictive"]


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def result(seed, *, shift=0.0, scale=1.0, binary=False, is_chain=False):
    rng = np.random.default_rng(seed)
    x = shift + scale * rng.normal(size=(4, 100, 3))
    x[..., 1] = 0.9 * x[..., 0] + 0.4 * x[..., 1] if is_chain else x[..., 1]
    sigma = np.exp(rng.normal(size=(4, 100)))
    y = rng.normal(size=(4, 100, 40))
    observed = np.linspace(-2, 2, 40)
    if binary:
        y, observed = (y > 0).astype(float), (observed > 0).astype(float)
    draw, data = ("chain", "draw"), ("chain", "draw", "obs")
    stats = {"lp": rng.normal(size=(4, 100))}
    if not is_chain:
        stats["log_q"] = rng.normal(size=(4, 100))
        stats["log_weight"] = stats["lp"] - stats["log_q"]
    groups = {
        "posterior": xr.Dataset(
            {"x": ((*draw, "row"), x), "sigma": (draw, sigma)},
            attrs={"is_approximate": int(not is_chain), "stop_reason": "converged"},
        ),
        "sample_stats": xr.Dataset({k: (draw, v) for k, v in stats.items()}),
        "posterior_predictive": xr.Dataset({"y": (data, y)}),
        "log_likelihood": xr.Dataset({"y": (data, -0.5 * rng.normal(size=y.shape) ** 2)}),
        "observed_data": xr.Dataset({"y": (("obs",), observed)}),
    }
    if not is_chain:
        loss = 50 * np.exp(-np.arange(300) / 30) + 10 + 0.1 * rng.normal(size=300)
        groups["vi_fit"] = xr.Dataset({"loss": ("step", loss), "elbo": -10.0, "elbo_mcse": 0.1})
    return wrap(groups)


@functools.cache
def report(*, binary=False):
    fits = {"near": result(1, binary=binary), "narrow": result(2, scale=0.3, binary=binary)}
    return compare_posteriors(result(0, is_chain=True, binary=binary), fits)


@functools.cache
def doubtful():
    """A baseline whose first parameter has not converged."""
    nuts = result(0, is_chain=True)
    nuts["posterior"]["x"][3, :, 0] += 3.0
    return compare_posteriors(nuts, {"fit": result(1)})


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OF_REPORTS, "trace"])
def test_pictures_are_written_without_warnings(name, tmp_path):
    path = tmp_path / "picture.png"
    getattr(plots, f"plot_{name}")(report(), path=path)
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("name", OF_REPORTS)
def test_a_bad_baseline_is_written_over_every_picture(name):
    draw = getattr(plots, f"plot_{name}")
    head = draw(doubtful()).legends[0].get_title()
    assert "NUTS is doubtful: the chains disagree: R-hat is 1." in head.get_text()
    assert draw(report()).legends[0].get_title().get_text() == ""


@pytest.mark.parametrize("name", ["comparison", "ranks", "sds", "pairs"])
def test_parameters_that_have_not_converged_are_marked(name):
    figure = getattr(plots, f"plot_{name}")(doubtful(), var_names=["x"])
    texts = [t.get_text() for t in figure.findobj(plt.Text)]
    assert any("x[0] (!)" in text for text in texts)
    assert not any("x[2] (!)" in text for text in texts)


@pytest.mark.parametrize("name", OF_REPORTS)
def test_something_else_than_a_comparison_is_refused(name):
    with pytest.raises(TypeError, match=f"plot_{name} draws what compare_posteriors returns"):
        getattr(plots, f"plot_{name}")({})


@pytest.mark.parametrize("name", ["ranks", "pairs", "sds"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="which were not compared"):
        getattr(plots, f"plot_{name}")(report(), var_names=["mu"])


def test_a_point_estimate_can_be_drawn():
    point = wrap(
        {
            "posterior": xr.Dataset(
                {
                    "x": (("chain", "draw", "row"), np.zeros((1, 100, 3))),
                    "sigma": (("chain", "draw"), np.ones((1, 100))),
                }
            )
        }
    )
    comparison = compare_posteriors(result(0, is_chain=True), {"MAP": point, "fit": result(1)})
    for name in OF_REPORTS:
        getattr(plots, f"plot_{name}")(comparison).canvas.draw()


# -- one by one ------------------------------------------------------------------------------------


def test_ranks_of_equal_draws_are_flat():
    nuts = result(0, is_chain=True)
    figure = plots.plot_ranks(compare_posteriors(nuts, {"same": nuts}))
    for axes in figure.axes:
        assert np.abs(axes.get_lines()[-1].get_ydata()).max() < 0.01  # steps of 400 draws


def test_ranks_of_a_narrow_fit_leave_the_band():
    figure = plots.plot_ranks(report(), var_names=["x"])
    axes = figure.axes[titles(figure).index("x[0]")]
    band = axes.patches[0].get_height() / 2
    near, narrow = (line.get_ydata() for line in axes.get_lines()[-2:])
    assert np.abs(near).max() < band < np.abs(narrow).max()
    assert narrow[40] < 0 < narrow[160]  # down, then up
    assert legend(figure) == ["near", "narrow"]


def test_the_band_holds_curves_of_one_distribution():
    """Of 300 pairs 5 % leave it, standard error 1.3 %; ties of 200 draws make it fewer. z = 4."""
    rng = np.random.default_rng(0)
    points = np.linspace(0, 1, 201)
    outside = 0
    for _ in range(300):
        nuts, fit = rng.normal(size=(2, 400))
        curve = share_below(fit, np.quantile(nuts, points)) - points
        outside += np.abs(curve).max() > 1.358 * np.sqrt(2 / 400)
    assert 0 < outside <= 0.102 * 300


def test_ranks_are_capped():
    assert len(plots.plot_ranks(report(), max_panels=2).axes) == 2


def test_ellipses_are_at_their_distance_from_the_mean():
    x = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[1.0, 0.8], [0.0, 0.5]])
    away = _ellipse(x, 2.0).T - x.mean(0)
    squared = np.einsum("ni,ij,nj->n", away, np.linalg.inv(np.cov(x.T)), away)
    np.testing.assert_allclose(squared, 4.0)


def test_pairs_begin_with_the_correlation_that_is_missed():
    figure = plots.plot_pairs(report(), max_parameters=2)
    assert len(figure.axes) == 1
    assert {figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()} == {"x[0]", "x[1]"}


def test_the_worst_correlated_are_found_among_many():
    rng = np.random.default_rng(0)
    nuts = rng.normal(size=(2000, 8))
    nuts[:, 6] += 3 * nuts[:, 2]
    assert _worst_correlated([nuts, rng.normal(size=(2000, 8))], 2) == [2, 6]


def test_long_tailed_positive_parameters_are_drawn_as_logarithms():
    figure = plots.plot_pairs(report(), max_parameters=4)
    names = {a.get_xlabel() for a in figure.axes} | {a.get_ylabel() for a in figure.axes}
    assert "log sigma" in names
    assert "log x[0]" not in names


def test_one_parameter_makes_no_pair():
    with pytest.raises(ValueError, match="a pair needs two parameters"):
        plots.plot_pairs(report(), var_names=["sigma"])


def test_sds_are_those_of_the_table():
    figure = plots.plot_sds(report())
    upper, lower = figure.axes
    rows = report().table.loc["narrow"]
    found = [
        line for line in upper.get_lines() if line.get_marker() == "^" and len(line.get_xdata())
    ]
    np.testing.assert_allclose(found[0].get_xdata(), rows["nuts_sd"])
    np.testing.assert_allclose(found[0].get_ydata(), rows["nuts_sd"] * rows["sd_ratio"])
    assert any("x[" in text.get_text() for text in lower.texts)


@dataclass
class Fit:
    losses: tuple[float, ...]
    stop_reason: str = "converged"
    elbo: float = -1.0
    elbo_se: float = 0.1


def test_a_trace_says_where_and_why_it_stopped():
    figure = plots.plot_trace({"a": Fit((3.0, 2.0, 1.0)), "b": Fit((9.0, 4.0), "budget")})
    assert titles(figure) == ["a: converged after 3", "b: budget after 2"]
    assert figure.axes[1].title.get_color() == plots.style.ALARM
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), [3.0, 2.0, 1.0])


def test_traces_of_a_comparison_are_of_its_fits():
    assert titles(plots.plot_trace(report())) == [
        "near: converged after 300",
        "narrow: converged after 300",
    ]


def test_a_trace_without_losses_is_refused():
    with pytest.raises(ValueError, match="no fit has losses to draw"):
        plots.plot_trace({"a": Fit(())})
    with pytest.raises(TypeError, match="'a' has no losses: expected a fit"):
        plots.plot_trace({"a": 3})


def test_khat_has_a_panel_per_fit_and_one_of_its_observations():
    figure = plots.plot_khat(report())
    found = titles(figure)
    assert len(found) == 2 + 3
    assert found[0].startswith("near: k-hat ")
    assert found[2].startswith("NUTS\n")
    assert "of 40 above 0.62" in found[2]  # 400 draws


def test_khat_needs_weights():
    plain = wrap(
        {
            "posterior": xr.Dataset(
                {"x": (("chain", "draw"), np.random.default_rng(0).normal(size=(2, 100)))}
            )
        }
    )
    with pytest.raises(ValueError, match="no result has log weights or a log likelihood"):
        plots.plot_khat(compare_posteriors(plain, {"q": plain}))


def test_predictions_show_the_data():
    left, right = plots.plot_predictive(report()).axes
    observed = next(line for line in right.get_lines() if line.get_label() == "observed")
    assert len(observed.get_xdata()) == 30  # of 40
    assert right.get_xlabel() == "30 of 40 observations, by NUTS's mean"
    assert left.get_xlabel() == "y, all observations"


def test_predictions_of_two_values_are_shares():
    left, right = plots.plot_predictive(report(binary=True)).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["0", "1"]
    assert [bar.get_height() for bar in left.patches] == [0.5, 0.5]
    assert right.get_xlabel() == "predicted share of 1 by NUTS"


@pytest.mark.parametrize(
    ("site", "match"), [("z", r"site='z' has no predictions; expected one of \['y'\]")]
)
def test_unknown_sites_are_refused(site, match):
    with pytest.raises(ValueError, match=match):
        plots.plot_predictive(report(), site=site)


def test_results_without_predictions_are_refused():
    plain = wrap(
        {
            "posterior": xr.Dataset(
                {"x": (("chain", "draw"), np.random.default_rng(0).normal(size=(2, 100)))}
            )
        }
    )
    with pytest.raises(ValueError, match="NUTS has no predictions"):
        plots.plot_predictive(compare_posteriors(plain, {"q": plain}))
