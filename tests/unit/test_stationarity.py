"""Stationarity of series and the error of their means: identities, then calibration."""

import arviz
import pytest
import torch

from pyro_mf.solvers.averaging import Average, compare, extrapolate, stationary_average
from pyro_mf.solvers.stationarity import (
    effective_sample_size,
    leading_components,
    mc_error,
    rhat_by_chance,
    split_rhat,
)
from pyro_mf.solvers.window import Window


def autoregression(rho, length, count, seed=0):
    """Stationary series (T, P) with variance one and autocorrelation rho."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, count, generator=generator, dtype=torch.float64)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(rho * rows[-1] + (1 - rho**2) ** 0.5 * row)
    return torch.stack(rows)


def test_split_rhat_is_that_of_the_textbook():
    x = autoregression(0.5, 101, 3) + torch.linspace(0, 1, 101)[:, None]
    first, second = x[:50], x[-50:]
    within = (first.var(0) + second.var(0)) / 2
    between = 50 * torch.stack([first.mean(0), second.mean(0)]).var(0)
    expected = ((49 / 50 * within + between / 50) / within).clamp(min=1).sqrt()
    torch.testing.assert_close(split_rhat(x), expected)


def test_split_rhat_does_not_depend_on_origin_and_unit():
    x = autoregression(0.5, 64, 2)
    torch.testing.assert_close(split_rhat(x), split_rhat(1e6 + 1e3 * x))


def test_constants_are_stationary_and_steps_are_not():
    step = (torch.arange(16) >= 8).double()
    series = torch.stack([torch.ones(16), step], 1)
    rhat = split_rhat(series)
    assert rhat[0] == 1.0
    assert torch.isinf(rhat[1])
    assert effective_sample_size(series)[0] == 16
    assert mc_error(series)[0] == 0


def test_too_short_a_series_is_refused():
    with pytest.raises(ValueError, match="at least 4 rows; got 3"):
        split_rhat(torch.zeros(3, 1))


def test_false_alarms_of_rhat_come_as_often_as_said():
    # 400 windows of 10 series: 5 % false alarms, se 1.1 %; z = 4 sees a factor of two.
    alarms = 0
    for seed in range(400):
        x = autoregression(0.0, 96, 10, seed)
        alarms += bool(split_rhat(x).max() > rhat_by_chance(10, 96))
    assert abs(alarms / 400 - 0.05) < 4 * 0.011


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_effective_sample_size_is_that_of_an_autoregression(rho):
    length = 2000
    ess = effective_sample_size(autoregression(rho, length, 200)).mean()
    assert abs(float(ess) / (length * (1 - rho) / (1 + rho)) - 1) < 0.12


@pytest.mark.skipif(arviz.__version__ >= "1", reason="another name there")
def test_effective_sample_size_is_near_that_of_arviz():
    x = autoregression(0.8, 1000, 5)
    theirs = torch.tensor([float(arviz.ess(c[None].numpy(), method="mean")) for c in x.T])
    assert bool((effective_sample_size(x) / theirs - 1).abs().max() < 0.25)


def test_error_of_a_mean_is_calibrated():
    # z-scores of 2000 means have variance one; its se is 0.032, the estimate's own noise adds 5 %.
    x = autoregression(0.7, 128, 2000)
    z = x.mean(0) / mc_error(x)
    assert 0.9 < float(z.square().mean()) < 1.3


def test_a_common_drift_that_hides_in_every_parameter_shows_in_a_component():
    x = autoregression(0.0, 128, 200)
    drifting = x + 0.2 * torch.linspace(-1, 1, 128)[:, None]
    limit = rhat_by_chance(200, 128)
    assert float(split_rhat(drifting).max()) < limit  # not seen by any one parameter
    assert float(split_rhat(leading_components(drifting)).max()) > limit + 0.1
    assert float(split_rhat(leading_components(x)).max()) < limit


def test_window_keeps_means_of_all_iterates():
    x = torch.arange(1000.0)[:, None]
    window = Window(x[0], block_size=1)
    for row in x:
        window.add(row)
    blocks, size = window.blocks, window.block_size
    whole = x[: len(blocks) * size].view(len(blocks), size)
    torch.testing.assert_close(blocks.squeeze(1), whole.mean(1))
    assert len(blocks) < 128


def test_a_window_goes_on_from_its_state():
    x = autoregression(0.3, 500, 2)
    one, other = Window(x[0]), Window(x[0])
    for row in x[:301]:
        one.add(row)
        other.add(row)
    other = Window.from_state(other.state())
    for row in x[301:]:
        assert one.add(row) == other.add(row)
    assert torch.equal(one.blocks, other.blocks)


def test_the_way_to_the_optimum_is_dropped():
    x = autoregression(0.0, 128, 3)
    x[:30] += torch.linspace(50, 0, 30)[:, None]
    average = stationary_average(x, torch.ones(3))
    assert average is not None
    assert bool((average.mean.abs() < 5 * average.error).all())


def test_what_drifts_or_whose_spread_shrinks_is_not_averaged():
    x = autoregression(0.0, 128, 3)
    units = torch.ones(3)
    assert stationary_average(x, units) is not None
    assert stationary_average(x + torch.linspace(0, 3, 128)[:, None], units) is None
    assert stationary_average(x * torch.logspace(1, -2, 128)[:, None], units) is None


def test_verdicts():
    units, se = torch.tensor([1.0, 10.0]), torch.tensor([0.02, 0.2])
    at = lambda shift, error: Average(shift * units, error * se / 0.02)  # noqa: E731
    assert compare(None, at(0.0, 0.2), units).verdict(0.1) == "longer"
    assert compare(None, at(0.0, 0.04), units).verdict(0.1) == "finer"
    assert compare(at(0.0, 0.02), at(0.0, 0.02), units).verdict(0.1) == "done"
    assert compare(at(0.0, 0.02), at(0.2, 0.02), units).verdict(0.1) == "finer"
    assert compare(at(0.0, 0.02), at(0.0, 0.04), units).verdict(0.1) == "longer"


def test_a_bias_that_is_seen_is_extrapolated_and_noise_is_not():
    exact = torch.zeros(3)
    known, unknown = torch.full((3,), 1e-6), torch.ones(3)
    previous, current = Average(exact + 0.4, known), Average(exact + 0.2, known)
    torch.testing.assert_close(extrapolate(previous, current), exact, atol=1e-6, rtol=0)
    vague = Average(current.mean, unknown)
    assert torch.equal(extrapolate(previous, vague), vague.mean)
    assert torch.equal(extrapolate(current, current), current.mean)
