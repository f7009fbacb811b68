"""Arithmetic on log weights: against closed forms, ArviZ, and tails of known index."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_mf.weights import effective_sample_size, normalize, psis


def pareto_log_weights(k: float, draws: int, seed: int) -> torch.Tensor:
    """Log of Pareto weights whose tail index is exactly ``k``."""
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(seed))
    return -k * torch.log(uniform)


def test_normalize_sums_to_one_at_any_offset():
    log_weights = torch.tensor([0.0, 1.0, 2.0, -math.inf])
    for offset in (0.0, 1e4, -1e4):
        weights = normalize(log_weights + offset).exp()
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
        torch.testing.assert_close(weights[2] / weights[1], torch.tensor(math.e))
        assert weights[3] == 0


def test_normalize_works_over_draws_first():
    log_weights = torch.randn(7, 3)
    torch.testing.assert_close(normalize(log_weights).exp().sum(0), torch.ones(3))
    torch.testing.assert_close(normalize(log_weights)[:, 1], normalize(log_weights[:, 1]))


def test_effective_sample_size_closed_forms():
    assert effective_sample_size(torch.full((50,), 3.0)).item() == pytest.approx(50.0)
    assert effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf])).item() == 1.0
    # weights 1 and 3: (1 + 3)^2 / (1 + 9)
    assert effective_sample_size(torch.tensor([0.0, math.log(3.0)])).item() == pytest.approx(1.6)


@pytest.mark.parametrize("draws", [25, 100, 225, 1000, 5000])
@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.7, 1.3])
def test_psis_agrees_with_arviz(draws, k):
    import arviz as az

    excess = stats.genpareto(k).rvs(draws, random_state=draws)
    log_weights = torch.from_numpy(np.log1p(excess))
    result = psis(log_weights)
    if hasattr(az, "psislw"):
        expected, khat = az.psislw(log_weights.numpy().copy())
        assert result.khat == pytest.approx(float(khat), abs=1e-8)
        np.testing.assert_allclose(result.log_weights.numpy(), expected, atol=1e-8)
    elif draws >= 100:
        # ArviZ 1.x negates its input; above 225 draws its tail differs by a draw or two.
        from arviz_stats.base import array_stats

        expected, khat = array_stats.psislw(-log_weights.numpy())
        exact = draws <= 225
        assert result.khat == pytest.approx(float(khat), abs=1e-8 if exact else result.khat_se / 2)
        if exact:
            np.testing.assert_allclose(result.log_weights.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_khat_finds_a_known_index_and_states_its_spread(k):
    # 200 replicates: the mean is known to se/sqrt(200), so z = 5 sees a bias of a third of one se.
    # k-hat shrinks towards 0.5 with the weight of ten points of the tail.
    draws, replicates = 4000, 200
    results = [psis(pareto_log_weights(k, draws, seed)) for seed in range(replicates)]
    khats = torch.tensor([r.khat for r in results])
    tail = math.ceil(3.0 * math.sqrt(draws))
    expected = (tail * k + 5.0) / (tail + 10.0)
    error = khats.std() / math.sqrt(replicates)
    assert abs(khats.mean() - expected) < 5.0 * error + 0.01, (khats.mean(), expected, error)
    stated = torch.tensor([r.khat_se for r in results]).mean()
    # The sd of an sd from 200 replicates is 5 %; z = 4, and 10 % for asymptotics.
    assert abs(khats.std() / stated - 1.0) < 0.3, (khats.std(), stated)


def test_smoothing_helps_where_weights_are_heavy():
    # E[w] under weights with index 0.7 is 1/(1 - 0.7); the smoothed sum must be nearer on average.
    k, truth = 0.7, 1.0 / 0.3
    raw, smooth = [], []
    for seed in range(300):
        log_weights = pareto_log_weights(k, 500, seed)
        result = psis(log_weights)
        top = result.log_weights.exp()
        # Undo the normalisation through an element outside the tail, which smoothing leaves alone.
        low = log_weights.argmin()
        smooth.append((top / top[low] * log_weights[low].exp()).mean())
        raw.append(log_weights.exp().mean())
    error = {
        n: (torch.stack(x) - truth).square().mean() for n, x in {"r": raw, "s": smooth}.items()
    }
    assert error["s"] < error["r"]


def test_constant_weights_have_no_tail():
    for log_weights in (torch.full((100,), -3.7), 1e-8 * torch.randn(100)):
        result = psis(log_weights)
        assert result.khat == -math.inf
        assert result.good
        assert result.khat_se == 0.0
        assert result.ess == pytest.approx(100.0)


def test_a_shared_largest_weight_is_a_bound():
    log_weights = torch.zeros(1000)
    log_weights[:400] = -1.0
    assert psis(log_weights).khat == -math.inf


def test_few_weights_that_carry_everything_are_bad():
    log_weights = torch.full((1000,), -math.inf)
    log_weights[:3] = torch.tensor([0.0, 1.0, 2.0])
    result = psis(log_weights)
    assert result.khat == math.inf
    assert not result.good
    assert 1.0 <= result.ess <= 3.0


def test_weights_of_zero_are_allowed():
    log_weights = torch.cat([torch.randn(500), torch.full((500,), -math.inf)])
    result = psis(log_weights)
    assert math.isfinite(result.khat)
    assert (result.log_weights[500:] == -math.inf).all()


def test_threshold_is_stricter_for_few_draws():
    assert psis(torch.randn(100)).threshold == pytest.approx(0.5)
    assert psis(torch.randn(10_000)).threshold == pytest.approx(0.7)


def test_nothing_changes_with_an_added_constant_or_order():
    log_weights = pareto_log_weights(0.6, 800, 1)
    base = psis(log_weights)
    shifted = psis(log_weights + 1234.5)
    assert shifted.khat == pytest.approx(base.khat, abs=1e-8)
    perm = torch.randperm(800)
    torch.testing.assert_close(psis(log_weights[perm]).log_weights, base.log_weights[perm])


def test_single_precision_is_kept_and_fitted_in_double():
    log_weights = pareto_log_weights(0.6, 800, 1)
    result = psis(log_weights.to(torch.float32))
    assert result.log_weights.dtype == torch.float32
    assert result.khat == pytest.approx(psis(log_weights).khat, abs=1e-4)


def test_gradients_do_not_flow_through_a_diagnostic():
    log_weights = torch.randn(100, requires_grad=True)
    assert not psis(log_weights).log_weights.requires_grad


@pytest.mark.parametrize(
    ("log_weights", "match"),
    [
        (torch.tensor([0.0, math.nan] * 20), "20 of 40 are NaN"),
        (torch.tensor([0.0, math.inf] * 20), r"NaN or \+inf"),
        (torch.full((40,), -math.inf), "every log weight is -inf"),
        (torch.zeros(24), "at least 25 draws to see a tail; got 24"),
        (torch.zeros(30, 2), r"shape \(S,\); got \(30, 2\)"),
    ],
)
def test_bad_weights_are_refused(log_weights, match):
    with pytest.raises(ValueError, match=match):
        psis(log_weights)
