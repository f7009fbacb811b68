"""Mixtures of Student-t's as proposals: densities, fits, and posteriors of several modes."""

import math

import pytest
import torch

from pyro_mf.kernels import importance
from pyro_mf.kernels.agreement import find_disagreement
from pyro_mf.kernels.importance import importance_from
from pyro_mf.kernels.mixture import StudentMixture, fit_mixture
from pyro_mf.kernels.student_t import StudentT
from pyro_mf.kernels.weighted import WeightedDraws

WEIGHT, FAR, SIZE = 0.3, 4.0, 3
MEAN = (1.0 - 2.0 * WEIGHT) * FAR
SD = math.sqrt(1.0 + FAR**2 - MEAN**2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def product(z):
    """Eight modes: in each coordinate one at -4 of weight .3 and one at 4; integrates to one."""
    constant = 0.5 * math.log(2 * math.pi)
    low = math.log(WEIGHT) - 0.5 * (z + FAR) ** 2
    high = math.log(1.0 - WEIGHT) - 0.5 * (z - FAR) ** 2
    return (torch.logaddexp(low, high) - constant).sum(1)


def draws_of_product(num, seed=0):
    signs = (torch.rand(num, SIZE, generator=generator(seed)) > WEIGHT).double() * 2.0 - 1.0
    return FAR * signs + torch.randn(num, SIZE, generator=generator(seed + 1))


def sample_of(z, units=100):
    zeros = torch.zeros(len(z))
    return WeightedDraws(z, zeros, product(z), 1, units, math.nan, len(z))


def two_far_apart():
    tril = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    near = StudentT(torch.zeros(2), tril, 7.0)
    return StudentMixture(
        torch.tensor([0.3, 0.7]), [near, StudentT(torch.full((2,), 50.0), torch.eye(2), 7.0)]
    )


def test_log_prob_is_that_of_the_mixture():
    mixture = two_far_apart()
    z = mixture.sample(512, generator())
    expected = (
        0.3 * mixture.components[0].log_prob(z).exp()
        + 0.7 * mixture.components[1].log_prob(z).exp()
    )
    torch.testing.assert_close(mixture.log_prob(z).exp(), expected)


def test_every_net_has_the_components_in_proportion():
    z = two_far_apart().sample(4 * 256, generator())
    counts = (z[:, 0] > 25.0).reshape(4, 256).sum(1)
    assert ((counts - 0.7 * 256).abs() < 2).all()


def test_draws_have_the_density_claimed():
    # A wider normalised density's importance weights average to one: z = 4.
    mixture = two_far_apart()
    wide = StudentMixture(
        torch.tensor([0.5, 0.5]),
        [StudentT(c.loc, 1.5 * c.scale_tril, 9.0) for c in mixture.components],
    )
    z = wide.sample(64 * 256, generator())
    ratio = (mixture.log_prob(z) - wide.log_prob(z)).exp().reshape(64, 256).mean(1)
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / 8.0


def test_modes_come_out_more_precise_than_the_draws_that_show_them():
    # z = 4 over seven numbers; the draws given know a mean to .03 sds only.
    rough = draws_of_product(1000)
    start = fit_mixture(rough, torch.zeros(1000), generator=generator())
    draws = importance_from(
        product, start, generator=generator(), tolerance=0.01, reference=sample_of(rough)
    )
    assert draws.trusted, draws.problems
    assert draws.num_evaluations <= 40_000
    assert ((draws.mean - MEAN).abs() / SD < 4.0 * draws.mean_error).all()
    assert ((draws.sd / SD).log().abs() < 4.0 * draws.sd_error).all()
    assert abs(draws.log_evidence) < 4.0 * draws.log_evidence_se
    assert draws.log_evidence_se < 0.02


def test_stated_errors_are_the_spread_over_seeds():
    # 20 seeds, three coordinates: a spread is known to about 10 %.
    rough = draws_of_product(1000)
    start = fit_mixture(rough, torch.zeros(1000), generator=generator())
    runs = [importance_from(product, start, generator=generator(s), tolerance=1) for s in range(20)]
    spread = torch.stack([run.mean / SD for run in runs]).std(0).square().mean().sqrt()
    stated = torch.stack([run.mean_error for run in runs]).square().mean().sqrt()
    assert 1 / 1.4 < spread / stated < 1.4


def without_a_mode(z):
    return z[(z[:, 0] > 0) | (z[:, 1] > 0)]


def test_a_mode_that_the_draws_lack_shows_only_against_draws_that_have_it():
    # Negative control: .3 squared of the mass is beyond the proposal. Weights do not tell of it.
    full = draws_of_product(4000)
    part = without_a_mode(full)
    start = fit_mixture(part, torch.zeros(len(part)), generator=generator())
    narrow = StudentMixture(start.shares[:-1] / start.shares[:-1].sum(), start.components[:-1])

    class Fixed:
        sample, log_prob = narrow.sample, narrow.log_prob

        def matched(self, z, log_weights):
            return self

    unaware = importance_from(product, Fixed(), generator=generator(), tolerance=0.03)
    aware = importance_from(
        product, Fixed(), generator=generator(), tolerance=0.03, reference=sample_of(full)
    )
    assert unaware.log_evidence < -0.05
    assert unaware.trusted
    assert "lie where the proposal hardly goes" in aware.problems[-1]


def test_draws_of_one_target_agree():
    # 20 pairs, thresholds of four standard errors.
    for seed in range(20):
        draws = sample_of(draws_of_product(1000, 100 + seed))
        assert not find_disagreement(draws, product, sample_of(draws_of_product(2000, 200 + seed)))


def test_the_widest_component_keeps_its_share():
    rough = draws_of_product(1000)
    mixture = fit_mixture(rough, torch.zeros(1000), generator=generator())
    for _ in range(3):
        mixture = mixture.matched(rough, torch.zeros(1000))
        assert float(mixture.shares[-1]) == pytest.approx(0.1)
        assert float(mixture.shares.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(mixture.components[-1].loc, rough.mean(0))


def test_steps_of_em_raise_the_likelihood():
    rough = draws_of_product(2000)
    first = fit_mixture(rough[:200], torch.zeros(200), generator=generator())
    second = first.matched(rough, torch.zeros(2000))
    assert second.log_prob(rough).mean() > first.log_prob(rough).mean()


def test_a_fit_to_weighted_draws_is_one_to_draws_as_often_as_weighed():
    z = torch.randn(4000, 2, generator=generator())
    log_weights = z[:, 0] - 0.5  # moves the mean to one
    mixture = fit_mixture(z, log_weights, generator=generator())
    mean = mixture.sample(4096, generator()).mean(0)
    assert (mean - torch.tensor([1.0, 0.0])).abs().max() < 0.1


def test_same_seed_same_draws_and_no_global_randomness():
    before = torch.get_rng_state()
    rough = draws_of_product(500)
    first, second = (
        importance_from(
            product,
            fit_mixture(rough, torch.zeros(500), generator=generator(3)),
            generator=generator(4),
        )
        for _ in range(2)
    )
    assert torch.equal(first.z, second.z)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="spread in all 3 dimensions"):
        fit_mixture(torch.ones(100, 3), torch.zeros(100), generator=generator())
    start = two_far_apart()
    with pytest.raises(ValueError, match="tolerance must be positive"):
        importance.importance_from(product, start, generator=generator(), tolerance=0.0)
    with pytest.raises(ValueError, match="max_evaluations must be at least 1"):
        importance.importance_from(product, start, generator=generator(), max_evaluations=0)


def test_draws_too_rough_to_compare_with_are_no_proof():
    draws = sample_of(draws_of_product(4000))
    found = find_disagreement(draws, product, sample_of(draws_of_product(60), units=60))
    assert "too rough" in found[-1]
