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


def gaussian_log_weights(kind: str, size: int, rho: float, draws: int, seed: int):
    """Mean-field against unit normals of equal correlation: log weights and their exact index."""
    covariance = torch.full((size, size), rho) + (1.0 - rho) * torch.eye(size)
    precision = torch.linalg.inv(covariance)
    sd = precision.diagonal().rsqrt() if kind == "reverse" else torch.ones(size)
    scaled = precision * torch.outer(sd, sd)
    noise = torch.randn(draws, size, generator=torch.Generator().manual_seed(seed))
    log_weights = 0.5 * noise.square().sum(1) - 0.5 * ((noise @ scaled) * noise).sum(1)
    return log_weights, 1.0 - float(torch.linalg.eigvalsh(scaled)[0])


GAUSSIAN = [("reverse", 2, 0.5), ("forward", 2, 0.5), ("reverse", 10, 0.5), ("forward", 10, 0.9)]


@pytest.mark.parametrize("draws", [200, 2000])
@pytest.mark.parametrize(("kind", "size", "rho"), GAUSSIAN)
def test_psis_agrees_with_arviz_on_mean_field_weights(kind, size, rho, draws):
    import arviz as az

    log_weights, _ = gaussian_log_weights(kind, size, rho, draws, seed=3)
    result = psis(log_weights)
    if hasattr(az, "psislw"):
        expected, khat = az.psislw(log_weights.numpy().copy())
        assert result.khat == pytest.approx(float(khat), abs=1e-8)
        np.testing.assert_allclose(result.log_weights.numpy(), expected, atol=1e-8)
    else:  # negated inside; a tail that differs by a draw or two
        from arviz_stats.base import array_stats

        _, khat = array_stats.psislw(-log_weights.numpy())
        assert result.khat == pytest.approx(float(khat), abs=result.khat_se / 2)


@pytest.mark.parametrize(
    ("kind", "size", "rho", "low", "high"),
    [
        ("reverse", 2, 0.5, -0.1, 0.05),
        ("forward", 2, 0.5, -0.1, 0.1),
        ("reverse", 2, 0.9, -0.2, 0.0),
        ("reverse", 10, 0.5, -0.2, 0.0),
        ("forward", 10, 0.5, -0.3, 0.0),
        ("forward", 10, 0.9, 1.0, 3.0),  # 1000 draws are far from its limit
    ],
)
def test_khat_of_gaussian_weights_is_near_its_limit_where_documented(kind, size, rho, low, high):
    # The index is 1 - lambda_min of the scaled precision; 5 standard errors of a mean of 100 beyond
    # the offsets stated.
    found = [gaussian_log_weights(kind, size, rho, 1000, seed) for seed in range(100)]
    khats = torch.tensor([psis(log_weights).khat for log_weights, _ in found])
    offset, slack = float(khats.mean()) - found[0][1], 5.0 * float(khats.std()) / 10.0
    assert low - slack < offset < high + slack, offset


def bounded(k):
    """Generalised Pareto weights with a negative index: bounded."""
    return lambda seed: torch.log1p(
        -(torch.rand(1000, generator=torch.Generator().manual_seed(seed)) ** -k)
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(bounded(-0.8), id="bounded"),
        pytest.param(bounded(-0.3), id="slightly bounded"),
        pytest.param(lambda seed: pareto_log_weights(0.3, 1000, seed), id="light"),
        pytest.param(lambda seed: pareto_log_weights(1.2, 1000, seed), id="heavy"),
        pytest.param(lambda seed: gaussian_log_weights("reverse", 10, 0.5, 1000, seed)[0]),
        pytest.param(lambda seed: gaussian_log_weights("forward", 2, 0.9, 1000, seed)[0]),
        # The density of these weights rises to their largest: k-hat is below -1.
        pytest.param(
            lambda seed: (
                -1.5 * torch.randn(1000, generator=torch.Generator().manual_seed(seed)).square()
            ),
            id="wide",
        ),
    ],
)
def test_the_stated_error_covers_how_khat_scatters(make):
    # 95 % of 300 within two standard errors of their mean; z = 4 of a binomial, and 1 % for
    # asymptotics.
    results = [psis(make(seed)) for seed in range(300)]
    khats = torch.tensor([r.khat for r in results])
    errors = torch.tensor([r.khat_se for r in results])
    assert (errors > 0.0).all()
    share = ((khats - khats.mean()).abs() < 2.0 * errors).double().mean()
    assert 0.89 < share, share
    assert 0.7 < khats.std() / errors.mean() < 1.3, (khats.std(), errors.mean())


def test_log_mean_is_the_log_evidence():
    assert psis(torch.full((100,), -3.7)).log_mean == pytest.approx(-3.7)
    noise = torch.randn(20_000)  # q twice as wide as p, whose constant is e^5
    log_weights = 5.0 + math.log(2.0) - 1.5 * noise.square()
    result = psis(log_weights)
    error = math.sqrt(1.0 / result.ess - 1.0 / 20_000)
    assert abs(result.log_mean - 5.0) < 4.0 * error < 0.1
    # Smoothing moves the tail only, and the normalised weights by the same constant.
    low = log_weights.argmin()
    shift = float(log_weights[low] - result.log_weights[low]) - math.log(20_000)
    assert result.log_mean == pytest.approx(shift)


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


def test_psis_takes_integers_for_numbers_and_no_arrays():
    weights = torch.arange(100)
    assert torch.equal(psis(weights).log_weights, psis(weights.double()).log_weights)
    with pytest.raises(TypeError, match="tensor"):
        psis(weights.numpy())
