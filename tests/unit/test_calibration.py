"""Simulation-based calibration: probabilities, tests, verdicts, pictures, and what is refused."""

import _thread
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.special import ndtr, ndtri

from pyro_mf import AutoMeanField, ForwardKL, ModelError, fit
from pyro_mf.density import LogJoint
from pyro_mf.density.data_sets import DataSets
from pyro_mf.diagnostics.calibration import Calibration
from pyro_mf.diagnostics.miscalibration import holm, measure
from pyro_mf.diagnostics.ranks import probability_below, rank_among
from pyro_mf.diagnostics.uniformity import (
    _LEVELS,
    _miss_probabilities,
    _tails,
    points_for,
    uniform_band,
    uniformity_test,
)
from pyro_mf.families import get_family
from pyro_mf.fitting.calibrate import calibrate
from pyro_mf.plots import plot_calibration
from pyro_mf.solvers import many_data

X = torch.tensor(
    [[1.0, 0.9], [-1.0, -1.1], [0.5, 0.6], [2.0, 1.7], [-0.3, 0.2]], dtype=torch.float64
)
QUIET = {"progress": False}


def conjugate(y):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def regression(x, y=None):
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ slopes, 0.5), obs=y)


def simulate_regression(latents):
    return {"y": dist.Normal(X @ latents["slopes"], 0.5).sample()}


def precision():
    """Of the posterior of the regression, whatever the data."""
    return X.T @ X / 0.25 + torch.eye(2)


def uniforms(num, columns, seed=0):
    return np.random.default_rng(seed).random((num, columns))


def shifted(bias, ratio, num, columns, seed=0):
    error = np.random.default_rng(seed).normal(size=(num, columns))
    return ndtr((error - bias) / ratio)


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "ratio"), [(0.0, 1.0), (0.4, 1.0), (0.0, 0.5), (-0.7, 1.6), (1.5, 0.6)]
)
def test_bias_and_sd_ratio_are_those_of_gaussians(bias, ratio):
    grid = (np.arange(1500)[:, None] + 0.5) / 1500
    found = measure(ndtr((ndtri(grid) - bias) / ratio))
    np.testing.assert_allclose(found.bias, bias, atol=5e-3)  # of the grid
    np.testing.assert_allclose(found.sd_ratio, ratio, rtol=5e-3)


def test_their_standard_errors_are_those_of_repetitions():
    found = measure(shifted(0.4, 0.7, 200, 2000))
    # The sd of 2000 estimates is known to 1.6 %; 10 % is for what is not Gaussian at 200.
    np.testing.assert_allclose(found.bias_se.mean(), found.bias.std(), rtol=0.1)
    np.testing.assert_allclose(found.log_sd_ratio_se.mean(), np.log(found.sd_ratio).std(), rtol=0.1)


def test_probability_of_leaving_a_band_is_exact():
    num, points = 4, points_for(4)
    cells = np.diff([0.0, *points, 1.0])
    tails = _tails(num, points)
    expected = np.zeros(len(_LEVELS))
    for counts in itertools.product(range(num + 1), repeat=len(cells)):
        if sum(counts) != num:
            continue
        ways = math.factorial(num) / math.prod(map(math.factorial, counts))
        below = np.cumsum(counts)[:-1]
        level = min(tails[k, c] for k, c in enumerate(below))
        expected += ways * np.prod(cells ** np.array(counts)) * (level <= _LEVELS)
    np.testing.assert_allclose(_miss_probabilities(num), expected, atol=1e-12)


@pytest.mark.parametrize("num", [25, 130])
def test_uniform_numbers_stay_in_their_band_as_often_as_said(num):
    u = uniforms(num, 4000)
    band = uniform_band(num, 0.9)
    ecdf = (u[:, None] <= band.points[:, None]).mean(0)
    is_inside = (ecdf >= band.lower[:, None] - 1e-12) & (ecdf <= band.upper[:, None] + 1e-12)
    share, error = is_inside.all(0).mean(), (0.9 * 0.1 / 4000) ** 0.5
    # Discrete: the band has at least its probability, with so few numbers up to 2 % more.
    assert 0.9 - 4 * error < share < 0.92 + 4 * error
    rejected = (uniformity_test(u) < 0.05).mean()
    assert 0.03 < rejected < 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5
    assert (uniformity_test(u**2.0)[:50] < 0.05).mean() > (0.4 if num == 25 else 0.99)


def test_holm_keeps_order_and_shape():
    adjusted = holm(np.array([[0.01, 0.5], [0.02, 0.015]]))
    np.testing.assert_allclose(adjusted, [[0.04, 0.5], [0.045, 0.045]])


def test_false_alarms_are_as_rare_as_said_over_all_parameters():
    """Of 2000 tables of five calibrated parameters at most 5 % have a fault: z = 3."""
    found = measure(uniforms(60, 10_000))
    tables = np.stack([found.p_bias, found.p_sd, found.p_uniform]).reshape(3, 2000, 5)
    alarms = np.mean([holm(tables[:, k]).min() < 0.05 for k in range(2000)])
    assert alarms < 0.05 + 3 * (0.05 * 0.95 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("bias", "ratio", "test"),
    [(0.0, 0.75, "p_sd"), (0.0, 4 / 3, "p_sd"), (1 / 3, 1.0, "p_bias"), (-1 / 3, 1.0, "p_bias")],
)
def test_serious_faults_do_not_go_unseen_with_200_simulations(bias, ratio, test):
    """Power in a table of ten parameters, of which one is at fault: more than 85 %."""
    found = measure(shifted(bias, ratio, 200, 500))
    assert (getattr(found, test) < 0.05 / 30).mean() > 0.85


def test_verdicts_in_words():
    columns = {
        "fine": uniforms(1000, 1),
        "too narrow": shifted(0.0, 0.6, 1000, 1),
        "too wide": shifted(0.0, 1.6, 1000, 1),
        "too high": shifted(0.5, 1.0, 1000, 1),
        "too low and narrow": shifted(-0.6, 0.6, 1000, 1),
        # Two values, with the mean and the variance of uniform numbers.
        "wrong shape": 0.5 + (2 * (uniforms(1000, 1) < 0.5) - 1) / 12**0.5,
    }
    found = Calibration(list(columns), np.concatenate(list(columns.values()), 1))
    assert found.table["verdict"].to_dict() == {name: name for name in columns}
    assert found.verdict == "not calibrated"
    assert found.worst(1) != ["fine"]
    assert Calibration(["a"], uniforms(1000, 1)).verdict == "calibrated"
    small = Calibration(["a"], shifted(0.15, 1.0, 1000, 1))
    assert small.table["verdict"].tolist() == ["slightly too high"]
    assert Calibration(["a"], uniforms(25, 1)).verdict == "cannot tell"


def test_ranks_are_uniform_integers():
    ranks = Calibration(["a"], uniforms(5000, 1)).ranks(9)
    assert ranks.min() == 0
    assert ranks.max() == 9
    counts = np.bincount(ranks[:, 0])
    assert ((counts - 500) ** 2 / 500).sum() < 9 + 4 * 18**0.5  # chi-squared, z = 4


def test_ties_are_broken_at_random():
    draws = np.zeros((50, 4000))
    p = rank_among(np.zeros(4000), draws, seed=0)
    assert uniformity_test(p[:, None])[0] > 0.001
    assert p.min() < 0.01
    assert p.max() > 0.99
    assert (rank_among(np.full(4000, -1.0), draws, seed=0) < 1 / 51).all()


@pytest.mark.parametrize("name", ["student_t", "sinh_arcsinh", "logistic"])
def test_distribution_functions_invert_quantiles(name):
    family = get_family(name)
    params = family.init(torch.tensor([0.3, -2.0]), torch.tensor([0.5, 3.0]))
    p = torch.tensor([0.02, 0.7])
    u = family.quantile(params, p)
    torch.testing.assert_close(probability_below(family, params, u), p, rtol=1e-5, atol=1e-7)


# -- many data sets through one graph ----------------------------------------------------------


def test_density_of_many_data_sets_is_that_of_each():
    arguments = [((X, X @ torch.randn(2)), {}) for _ in range(5)]
    many = DataSets(LogJoint(regression, *arguments[0]), arguments)
    assert not many.obstacle
    z, index = torch.randn(7, 2), torch.tensor([0, 1, 2, 3, 4, 2, 2])
    value, gradient = many.value_and_grad(z, index)
    for row, k in enumerate(index.tolist()):
        own = LogJoint(regression, *arguments[k]).value_and_grad(z[row : row + 1])
        shared = many.at(k).value_and_grad(z[row : row + 1])
        for expected, found in zip(own, shared, strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(value[row], own[0][0])
        torch.testing.assert_close(gradient[row], own[1][0])


def test_models_that_vmap_cannot_run_are_vectorised_by_their_graph():
    def mixture(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc + 3.0 * label, 1.0), obs=y)

    arguments = [((torch.randn(4),), {}) for _ in range(3)]
    many = DataSets(LogJoint(mixture, *arguments[0]), arguments)
    assert not many.obstacle
    z = torch.randn(3, 1)
    value, gradient = many.value_and_grad(z, torch.arange(3))
    for k in range(3):
        own = LogJoint(mixture, *arguments[k]).value_and_grad(z[k : k + 1])
        torch.testing.assert_close((value[k], gradient[k]), (own[0][0], own[1][0]))


def test_single_precision_serves():
    def single(y):
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    found = calibrate(
        single, num_simulations=20, model_args=(torch.zeros(3, dtype=torch.float32),), **QUIET
    )
    mean_and_sd = [found.probabilities.mean(), found.probabilities.std()]
    np.testing.assert_allclose(mean_and_sd, [0.5, 12**-0.5], atol=4 * 0.065)  # z = 4
    assert found.method == "fits side by side"


def test_obstacles_are_named():
    def branching(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0 if y.sum() > 0 else 2.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=y)

    def obstacle(model, *data):
        arguments = [((y,), {}) for y in data]
        return DataSets(LogJoint(model, *arguments[0]), arguments).obstacle

    assert "control flow" in obstacle(branching, torch.ones(2), -torch.ones(2))
    assert "differ in more" in obstacle(conjugate, torch.ones(2), torch.ones(3))


def test_fits_side_by_side_are_those_of_fit():
    found = calibrate(regression, num_simulations=20, model_args=(X, torch.zeros(5)), **QUIET)
    assert found.method == "fits side by side"
    other = []

    def keep(latents):
        other.append(simulate_regression(latents))
        return other[-1]

    calibrated = calibrate(regression, keep, 20, model_args=(X, torch.zeros(5)), seed=3, **QUIET)
    for k in (0, 7, 19):
        result = fit(regression, (X, other[k]["y"]), **QUIET)
        loc, scale = (p.detach() for p in result.guide.flat_params())
        p = torch.special.ndtr((torch.from_numpy(calibrated.truths[k]) - loc) / scale)
        np.testing.assert_allclose(calibrated.probabilities[k], p, atol=1e-3)


# -- what is known exactly ---------------------------------------------------------------------


def test_conjugate_posterior_is_calibrated():
    data = []

    def simulate(latents):
        data.append(dist.Normal(latents["loc"], 1.0).expand([3]).sample())
        return (data[-1],)

    found = calibrate(conjugate, simulate, 100, model_args=(torch.zeros(3),), **QUIET)
    y = torch.stack(data)
    mean, sd = (0.25 + y.sum(1)) / 3.25, 3.25**-0.5
    exact = torch.special.ndtr((torch.from_numpy(found.truths[:, 0]) - mean) / sd)
    np.testing.assert_allclose(found.probabilities[:, 0], exact, atol=1e-6)
    assert found.verdict == "calibrated"
    assert not found.failures
    assert not found.unconverged


def test_mean_field_fails_on_correlated_slopes_as_predicted_and_linear_response_passes():
    """Reverse KL has the sds 1 / sqrt(A_ii): sd ratios sqrt(1 - r^2), z = 4."""
    a = precision()
    covariance = torch.linalg.inv(a)
    ratio = (a.diagonal() * covariance.diagonal()).rsqrt()
    assert float(ratio.max()) < 0.5  # the negative control is one
    options = {"num_simulations": 100, "model_args": (X, None), **QUIET}
    plain = calibrate(regression, {"y": "y"}, **options)
    for k in range(2):
        row = plain.table.iloc[k]
        assert abs(math.log(row["sd_ratio"] / ratio[k])) < 4 * row["log_sd_ratio_se"]
        assert row["verdict"] == "too narrow"
        expected = math.erf(1.6448536 * float(ratio[k]) / 2**0.5)
        assert abs(row["coverage_90"] - expected) < 4 * row["coverage_90_se"]
    assert plain.verdict == "not calibrated"
    response = calibrate(regression, {"y": "y"}, linear_response=True, **options)
    assert response.verdict == "calibrated"
    np.testing.assert_array_equal(response.truths, plain.truths)
    z = ndtri(plain.probabilities) * ratio.numpy()
    np.testing.assert_allclose(ndtri(response.probabilities), z, atol=1e-3)


def test_constrained_and_deterministic_parameters():
    def model(y):
        low = pyro.sample(
            "low",
            dist.TransformedDistribution(
                dist.LogNormal(0.0, 1.0), dist.transforms.AffineTransform(0.0, -1.0)
            ),
        )
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.deterministic("double", 2.0 * low)
        pyro.sample("y", dist.Normal(low + shares[0], 1.0), obs=y)

    found = calibrate(
        model,
        num_simulations=20,
        model_args=(torch.tensor(0.0),),
        deterministic=True,
        num_draws=2000,
        **QUIET,
    )
    names = ["low", "shares[0]", "shares[1]", "shares[2]", "double"]
    assert found.parameters == names
    assert found.num_draws == 2000
    p = found.probabilities
    # Ranks among 2000 draws have standard errors of 0.011 at most: z = 4.
    np.testing.assert_allclose(p[:, 0], p[:, 4], atol=4 * 0.5 / 2000**0.5)
    assert np.corrcoef(p[:, 0], found.truths[:, 0])[0, 1] < 0  # the axis is turned around


# -- how data are made -------------------------------------------------------------------------


def test_same_seed_same_bits_and_no_state_is_left():
    options = {"num_simulations": 20, "model_args": (X, torch.zeros(5)), **QUIET}
    pyro.param("AutoMeanField.loc", torch.ones(3))
    state = torch.get_rng_state()
    one = calibrate(regression, simulate_regression, **options)
    torch.manual_seed(5)
    other = calibrate(regression, simulate_regression, **options)
    np.testing.assert_array_equal(one.probabilities, other.probabilities)
    assert not np.array_equal(
        one.probabilities, calibrate(regression, simulate_regression, seed=1, **options)
    )
    torch.manual_seed(0)
    calibrate(regression, simulate_regression, **options)
    torch.manual_seed(0)
    torch.testing.assert_close(state, torch.get_rng_state())
    torch.testing.assert_close(pyro.param("AutoMeanField.loc"), torch.ones(3))


def test_other_shapes_and_other_families_are_fitted_one_by_one():
    sizes = itertools.cycle([3, 4])

    def simulate(latents):
        return (dist.Normal(latents["loc"], 1.0).expand([next(sizes)]).sample(),)

    found = calibrate(conjugate, simulate, 20, model_args=(torch.zeros(3),), **QUIET)
    assert "one by one, since the data sets differ" in found.method
    assert len(found.probabilities) == 20
    assert uniformity_test(found.probabilities)[0] > 0.001
    options = {"num_simulations": 20, "model_args": (torch.zeros(3),), **QUIET}
    other = calibrate(conjugate, family="logistic", **options)
    assert "only Normal factors" in other.method
    normal = calibrate(conjugate, **options)
    np.testing.assert_allclose(other.probabilities, normal.probabilities, atol=0.05)


@pytest.mark.slow
def test_forward_kl_is_calibrated_where_reverse_kl_is_not():
    found = calibrate(
        regression,
        {"y": "y"},
        20,
        model_args=(X, None),
        objective=ForwardKL(),
        tolerance=0.2,
        **QUIET,
    )
    assert "moment_matching" in found.method
    assert "forward" in found.approximation
    assert "narrow" not in " ".join(found.table["verdict"])


# -- what goes wrong ---------------------------------------------------------------------------


def test_failed_and_unconverged_fits_are_counted(monkeypatch):
    solve_one = many_data._solve_one

    def failing(data_sets, index, *rest):
        if index in (3, 5):
            return ModelError("no start")
        return solve_one(data_sets, index, *rest)

    monkeypatch.setattr(many_data, "_solve_one", failing)
    found = calibrate(conjugate, num_simulations=30, model_args=(torch.zeros(3),), **QUIET)
    assert found.num_simulations == 28
    assert dict(found.failures) == {3: "no start", 5: "no start"}
    assert "2 fits failed" in str(found)
    assert "6.7%" in str(found)
    monkeypatch.undo()
    spent = calibrate(
        conjugate, num_simulations=20, model_args=(torch.zeros(3),), max_gradients=1, **QUIET
    )
    assert len(spent.unconverged) == 20
    assert "20 fits ended without having converged" in str(spent)


def test_missing_fits_forbid_a_clean_bill():
    failures = dict.fromkeys(range(100), "no start")
    found = Calibration(["a"], uniforms(1000, 1), failures=failures, num_asked=1100)
    assert found.verdict == "cannot tell"


def test_nothing_is_left_where_all_fits_fail(monkeypatch):
    monkeypatch.setattr(many_data, "_solve_one", lambda *_: ModelError("no start"))
    with pytest.raises(ModelError, match="20 of 20 fits failed.*no start"):
        calibrate(conjugate, num_simulations=20, model_args=(torch.zeros(3),), **QUIET)


def test_interrupt_returns_what_is_there(monkeypatch):
    solve_one = many_data._solve_one

    def interrupting(data_sets, index, *rest):
        if index == 70:
            _thread.interrupt_main()
        return solve_one(data_sets, index, *rest)

    monkeypatch.setattr(many_data, "_solve_one", interrupting)
    found = calibrate(conjugate, num_simulations=150, model_args=(torch.zeros(3),), **QUIET)
    assert found.is_interrupted
    assert 2 <= found.num_simulations < 150
    assert f"{found.num_simulations} of 150" in str(found)


def test_interrupt_of_fits_one_by_one(monkeypatch):
    calls = itertools.count()

    def interrupted(self, log_joint, seed):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return fit_one(self, log_joint, seed)

    from pyro_mf.fitting.refits import Refits

    fit_one = Refits._fit
    monkeypatch.setattr(Refits, "_fit", interrupted)
    found = calibrate(
        conjugate, num_simulations=20, model_args=(torch.zeros(3),), family="logistic", **QUIET
    )
    assert found.num_simulations == 4
    assert found.is_interrupted
    assert "too few" in str(found)


def improper(y):
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def scaled(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def with_factor(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((y - loc) ** 2))
    pyro.sample("x", dist.Normal(loc, 1.0), obs=y)


def scaled_by_data(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0 + y.abs()))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def lagged(y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * y[:-1], 1.0).to_event(1), obs=y[1:])


def without_data(y):
    pyro.sample("loc", dist.Normal(y, 1.0))


def with_param(y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, scale), obs=y)


@pytest.mark.parametrize(
    ("model", "y", "match"),
    [
        (improper, torch.tensor(0.0), "proper"),
        (scaled, torch.tensor(0.0), "poutine.scale"),
        (with_factor, torch.tensor(0.0), "pyro.factor 'y' has a density and draws nothing"),
        (scaled_by_data, torch.tensor(0.5), "depends on the data"),
        (lagged, torch.zeros(3), "not one of the model's arguments"),
        (without_data, torch.tensor(0.0), "observes nothing"),
        (with_param, torch.tensor(0.0), "learnable parameters"),
    ],
)
def test_models_that_cannot_be_calibrated_by_themselves_are_refused(model, y, match):
    with pytest.raises(ModelError, match=match):
        calibrate(model, num_simulations=20, model_args=(y,), **QUIET)


def test_a_function_serves_where_the_model_cannot_simulate():
    def simulate(latents):
        y = [torch.tensor(1.0)]
        for _ in range(3):
            y.append(latents["slope"] * y[-1] + torch.randn(()))
        return (torch.stack(y),)

    found = calibrate(lagged, simulate, 20, model_args=(torch.zeros(4),), **QUIET)
    assert found.method == "fits side by side"


@pytest.mark.parametrize(
    ("simulate", "error", "match"),
    [
        (lambda _: torch.zeros(3), TypeError, "must return a tuple.*got Tensor"),
        (lambda _: None, TypeError, "got NoneType"),
        (lambda _: {"z": torch.zeros(3)}, TypeError, "argument 'z'; the model's are"),
        (lambda _: (torch.full((3,), torch.nan),), ModelError, "simulation 0.*finite"),
        (lambda _: (torch.zeros(3), 1), ModelError, "simulation 0.*do not fit"),
        (lambda _: (torch.ones(3),), ModelError, "the same data for all 20 draws of the latents"),
        ({"y": "z"}, ModelError, "the argument 'z'; the model's arguments are"),
        ({"x": "y"}, ModelError, r"names the sites \['x'\]; the model observes \['y'\]"),
        ("model", TypeError, "simulate must be a function"),
    ],
)
def test_simulations_that_are_none_are_refused(simulate, error, match):
    with pytest.raises(error, match=match):
        calibrate(conjugate, simulate, 20, model_args=(torch.zeros(3),), **QUIET)


def test_data_that_turn_bad_later_are_named():
    count = itertools.count()

    def simulate(latents):
        return (torch.full((3,), torch.nan if next(count) == 4 else 0.0),)

    with pytest.raises(ModelError, match="simulation 4.*finite"):
        calibrate(conjugate, simulate, 20, model_args=(torch.zeros(3),), **QUIET)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_simulations": 19}, ValueError, "num_simulations must be at least 20"),
        ({"num_simulations": 30.0}, TypeError, "num_simulations must be an integer"),
        ({"num_draws": 5}, ValueError, "num_draws must be at least 99"),
        ({"linear_response": True, "objective": ForwardKL()}, ValueError, "forward KL"),
        ({"model_args": torch.zeros(3)}, TypeError, "model_args must be a tuple"),
        ({"solver": "magic"}, ValueError, "solver must be one of"),
    ],
)
def test_bad_options_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        calibrate(conjugate, **({"model_args": (torch.zeros(3),)} | QUIET | options))


def test_handlers_around_are_refused():
    with poutine.scale(scale=2.0), pytest.raises(ValueError, match="effect handlers"):
        calibrate(conjugate, model_args=(torch.zeros(3),), **QUIET)


# -- the picture and the print -----------------------------------------------------------------


def many_parameters():
    p = uniforms(100, 15)
    p[:, 4] = shifted(0.0, 0.4, 100, 1)[:, 0]
    names = ["scale", *(f"theta[{k}]" for k in range(14))]
    return Calibration(names, p, num_asked=100)


def test_picture_shows_the_worst_first(tmp_path):
    found = many_parameters()
    path = tmp_path / "calibration.png"
    figure = plot_calibration(found, path=path)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert len(titles) == 12
    assert titles[0] == "theta[3]"
    assert "12 of 15" in figure.get_suptitle()
    assert path.stat().st_size > 0
    plt.close(figure)
    some = plot_calibration(found, var_names=["scale", "theta[3]"])
    assert [axes.get_title(loc="left") for axes in some.axes] == ["theta[3]", "scale"]
    plt.close(some)


def test_picture_refuses_what_it_cannot_draw():
    with pytest.raises(TypeError, match="draws what calibrate returns; got dict"):
        plot_calibration({})
    with pytest.raises(ValueError, match=r"unknown parameters \['eta'\]"):
        plot_calibration(many_parameters(), var_names="eta")
    with pytest.raises(ValueError, match="max_panels"):
        plot_calibration(many_parameters(), max_panels=0)


def test_print_says_what_matters():
    found = many_parameters()
    text = str(found)
    assert text.splitlines()[0].endswith("NOT CALIBRATED")
    assert text.index("theta[3]") < text.index("scale")
    assert "at most 5%" in text
    assert max(map(len, text.splitlines())) <= 120
    assert repr(found) == "Calibration(not calibrated: 15 parameters, 100 simulations, 0 failed)"


def test_guides_families_stay_out_of_the_store():
    AutoMeanField(conjugate).setup(torch.zeros(3))
    before = set(pyro.get_param_store().keys())
    calibrate(
        conjugate, num_simulations=20, model_args=(torch.zeros(3),), family="logistic", **QUIET
    )
    assert set(pyro.get_param_store().keys()) == before
