"""Agreement of parallel chains and the errors of their means and sds: identities, calibration."""

import arviz
import pytest
import torch

from pyro_mf.kernels import measure_mixing
from pyro_mf.kernels.mixing import effective_sample_size, split_rhat, stuck_chains


def autoregression(rho, length, num_chains, size, seed=0):
    """Stationary chains (T, N, P) with variance one and autocorrelation rho."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, num_chains, size, generator=generator)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(rho * rows[-1] + (1 - rho**2) ** 0.5 * row)
    return torch.stack(rows)


def test_split_rhat_is_that_of_the_textbook():
    x = autoregression(0.5, 101, 4, 3) + torch.linspace(0, 1, 101)[:, None, None]
    halves = torch.cat([x[:50], x[-50:]], 1)
    within, between = halves.var(0).mean(0), 50 * halves.mean(0).var(0)
    expected = ((49 / 50 * within + between / 50) / within).clamp(min=1).sqrt()
    torch.testing.assert_close(split_rhat(x), expected)


@pytest.mark.skipif(arviz.__version__ >= "1", reason="another name there")
def test_rhat_and_effective_size_are_near_those_of_arviz():
    x = autoregression(0.8, 500, 8, 5)
    theirs = [x[:, :, i].T.numpy() for i in range(5)]
    rhat = torch.tensor([float(arviz.rhat(c, method="split")) for c in theirs])
    ess = torch.tensor([float(arviz.ess(c, method="mean")) for c in theirs])
    torch.testing.assert_close(split_rhat(x), rhat)
    assert bool((effective_sample_size(x) / ess - 1).abs().max() < 0.25)


def test_origin_and_unit_do_not_matter():
    x = autoregression(0.5, 64, 4, 2)
    found, scaled = measure_mixing(x), measure_mixing(1e3 + 1e2 * x)
    for name in ("rhat", "rhat_squares", "ess", "ess_squares", "mcse_mean", "mcse_sd"):
        torch.testing.assert_close(getattr(scaled, name), getattr(found, name))


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_effective_size_is_that_of_an_autoregression(rho):
    """Of z (1 - rho) / (1 + rho) per draw, of squares the same with rho squared."""
    found = measure_mixing(autoregression(rho, 400, 16, 40))
    for ess, r in ((found.ess, rho), (found.ess_squares, rho**2)):
        assert abs(float(ess.mean()) / (6400 * (1 - r) / (1 + r)) - 1) < 0.1


def test_wide_chains_are_transformed_in_parts(monkeypatch):
    x = autoregression(0.5, 20, 3, 7)
    whole = effective_sample_size(x)
    monkeypatch.setattr("pyro_mf.kernels.mixing._CHUNK_ELEMENTS", 120)
    torch.testing.assert_close(effective_sample_size(x), whole)


def test_errors_of_mean_and_sd_are_calibrated():
    # z-scores of 1000 means and sds have variance one; its se is 0.045. The negative control
    # takes draws as independent.
    x = autoregression(0.7, 100, 8, 1000)
    found = measure_mixing(x)
    z_mean = x.mean((0, 1)) / found.mcse_mean
    z_sd = (x.std((0, 1)) - 1.0) / found.mcse_sd
    for z in (z_mean, z_sd):
        assert 0.85 < float(z.square().mean()) < 1.3
    naive = x.mean((0, 1)) * 800**0.5
    assert float(naive.square().mean()) > 3.0


def test_chains_apart_know_their_mean_no_better_than_so_many_draws():
    offsets = 5.0 * torch.randn(16, 1)
    x = autoregression(0.0, 500, 16, 1) + offsets
    found = measure_mixing(x)
    assert float(found.ess) < 64  # of 8000 draws
    assert found.worst_rhat > 2.0


def test_a_spread_that_differs_shows_in_the_squares_alone():
    x = autoregression(0.0, 500, 8, 1) * torch.tensor([1.0, 3.0]).repeat(4)[:, None]
    found = measure_mixing(x)
    assert float(found.rhat) < 1.02
    assert float(found.rhat_squares) > 1.1


def test_two_modes_are_seen():
    x = autoregression(0.5, 200, 32, 2)
    one, half = x.clone(), x.clone()
    one[:, 7] += 6.0
    half[:, :16] += 6.0
    assert stuck_chains(one).tolist() == [7]
    assert measure_mixing(half).worst_rhat > 2.0
    assert measure_mixing(x).worst_rhat < 1.1


def test_chains_that_do_not_move_are_seen():
    x = autoregression(0.5, 200, 32, 2)
    x[:, 3] = x[0, 3]  # never
    x[5:195, 5] = x[5, 5]  # hardly
    assert stuck_chains(x).tolist() == [3, 5]
    still = torch.zeros(10, 4, 2)
    found = measure_mixing(still)
    assert found.stuck.tolist() == [0, 1, 2, 3]
    assert bool(torch.isfinite(found.mcse_sd).all())


def test_no_chain_is_called_stuck_by_chance():
    alarms = [len(stuck_chains(autoregression(0.8, 100, 64, 20, seed))) for seed in range(40)]
    assert sum(alarms) == 0


@pytest.mark.parametrize("function", [measure_mixing, split_rhat, effective_sample_size])
@pytest.mark.parametrize("shape", [(3, 2, 1), (10, 2)])
def test_wrong_shapes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"expected chains of shape \(T, N, P\)"):
        function(torch.zeros(shape))
