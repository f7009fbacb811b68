"""Adaptive importance sampling: against Gaussians, heavy tails, bananas, and its own errors."""

import math

import pytest
import torch
from scipy import stats

from pyro_mf._errors import NonFiniteError
from pyro_mf.kernels import importance
from pyro_mf.kernels.importance import adaptive_importance
from pyro_mf.kernels.student_t import StudentT
from pyro_mf.kernels.weighted import WeightedDraws, temper, weighted_moments


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussian:
    """An unnormalised Gaussian: its log evidence is known."""

    def __init__(self, mean, covariance, log_evidence=3.0):
        self.mean, self.covariance, self.log_evidence = mean, covariance, log_evidence
        self.normal = torch.distributions.MultivariateNormal(mean, covariance)

    def __call__(self, z):
        return self.normal.log_prob(z) + self.log_evidence


def equicorrelated(size, rho=0.5):
    covariance = (1 - rho) * torch.eye(size) + rho * torch.ones(size, size)
    scale = torch.logspace(-2, 2, size)
    return Gaussian(10.0 * torch.arange(size), covariance * torch.outer(scale, scale))


def banana(z):
    return -0.5 * (z[:, 0] / 3) ** 2 - 0.5 * ((z[:, 1] - z[:, 0] ** 2) / 0.5) ** 2


@pytest.mark.parametrize("size", [1, 2, 10, 25])
def test_gaussian_moments_and_evidence_within_the_stated_errors(size):
    # Started a sd off with double the scales. z = 4 over at most 51 numbers.
    target = equicorrelated(size)
    sd = target.covariance.diagonal().sqrt()
    draws = adaptive_importance(
        target, target.mean + sd, 4.0 * target.covariance, generator=generator()
    )
    assert draws.trusted, draws.problems
    assert torch.maximum(draws.mean_error, draws.sd_error).max() <= 0.01
    assert (((draws.mean - target.mean) / sd).abs() < 4.0 * draws.mean_error).all()
    assert ((draws.sd / sd - 1.0).abs() < 4.0 * draws.sd_error).all()
    assert abs(draws.log_evidence - 3.0) < 4.0 * draws.log_evidence_se
    assert draws.log_evidence_se < 0.02


def test_stated_errors_are_the_spread_over_seeds():
    # 40 seeds know an sd to 11 %, ten coordinates of one design are averaged: within a factor 1.35.
    target = equicorrelated(10)
    sd = target.covariance.diagonal().sqrt()
    runs = [
        adaptive_importance(
            target, target.mean, target.covariance, generator=generator(seed), tolerance=1.0
        )
        for seed in range(40)
    ]
    for found, stated in (
        (torch.stack([r.mean / sd for r in runs]), [r.mean_error for r in runs]),
        (torch.stack([(r.sd / sd).log() for r in runs]), [r.sd_error for r in runs]),
        (
            torch.tensor([[r.log_evidence] for r in runs]),
            [torch.tensor([r.log_evidence_se]) for r in runs],
        ),
    ):
        spread = found.std(0).square().mean().sqrt()
        ratio = spread / torch.stack(stated).square().mean().sqrt()
        assert 1 / 1.35 < ratio < 1.35, ratio


def test_evidence_is_unbiased_from_a_bad_start():
    # 40 seeds, z = 4 by their own spread.
    target = equicorrelated(3)
    start = target.mean + target.covariance.diagonal().sqrt()
    ratios = torch.tensor(
        [
            math.exp(
                adaptive_importance(
                    target, start, target.covariance / 2, generator=generator(seed), tolerance=0.02
                ).log_evidence
                - target.log_evidence
            )
            for seed in range(40)
        ]
    )
    assert abs(ratios.mean() - 1.0) < 4.0 * ratios.std() / math.sqrt(40)


def test_without_the_mixture_of_all_rounds_the_answer_is_wrong(monkeypatch):
    # Negative control: on a target that no Student-t fits well, each round is weighted by the last
    # round's proposal alone. The mean of 20 runs, z = 4.
    def four_modes(z):  # of sd 0.2 each
        distance = (z.abs() - 4.0).square().sum(-1)
        return -0.5 * distance / 0.04

    def deviation():
        found = torch.tensor(
            [
                adaptive_importance(
                    four_modes,
                    torch.zeros(2),
                    100.0 * torch.eye(2),
                    generator=generator(seed),
                    max_evaluations=12_000,
                ).log_evidence
                for seed in range(20)
            ]
        )
        error = found.exp() / (4 * 2 * math.pi * 0.04) - 1.0
        return abs(float(error.mean() / error.std())) * math.sqrt(20)

    def by_last_proposal(self, problems=()):
        log_sum = self.proposals[-1].log_prob(self.z) + math.log(len(self.proposals))
        kept, self.log_sum = self.log_sum, log_sum
        draws = weighted(self, problems)
        self.log_sum = kept
        return draws

    honest = deviation()
    weighted = importance._Rounds.weighted
    monkeypatch.setattr(importance._Rounds, "weighted", by_last_proposal)
    assert honest < 4.0 < deviation()


@pytest.mark.parametrize("far", [3.0, 30.0])
def test_recovers_from_a_bad_start(far):
    target = equicorrelated(4)
    sd = target.covariance.diagonal().sqrt()
    draws = adaptive_importance(
        target, target.mean + far * sd, torch.diag(sd**2) / 9, generator=generator()
    )
    assert draws.trusted, draws.problems
    assert ((draws.mean - target.mean) / sd).abs().max() < 0.05


def test_flags_a_banana():
    draws = adaptive_importance(banana, torch.zeros(2), torch.eye(2), generator=generator())
    assert not draws.trusted
    assert any("k-hat" in p or "still moved" in p or "standard error" in p for p in draws.problems)


def test_flags_tails_heavier_than_its_own():
    # A Cauchy in five dimensions has no moments; against t weights of 7 degrees of freedom its
    # index is 1 - 1 / 7 > 0.7.
    def cauchy(z):
        return -3.0 * torch.log1p(z.square().sum(-1))

    draws = adaptive_importance(
        cauchy, torch.zeros(5), torch.eye(5), generator=generator(), max_evaluations=20_000
    )
    assert not draws.trusted, (draws.khat, draws.mean_error, draws.sd_error)


def test_says_when_the_budget_was_too_small():
    target = equicorrelated(5)
    draws = adaptive_importance(
        target, target.mean, target.covariance, generator=generator(), max_evaluations=1
    )
    assert draws.num_evaluations == 2048
    assert "spent after 1 of at least 3 rounds" in draws.problems[-1]


@pytest.mark.parametrize(("budget", "count"), [(50_000, 10_240), (7000, 6144)])
def test_draws_at_least_as_many_as_asked_if_the_budget_allows_it(budget, count):
    target = equicorrelated(3)
    draws = adaptive_importance(
        target,
        target.mean,
        target.covariance,
        generator=generator(),
        tolerance=0.1,
        max_evaluations=budget,
        min_draws=10_000,
    )
    assert draws.trusted, draws.problems
    assert len(draws.z) == count


def test_draws_without_density_have_no_weight():
    # Half of a Gaussian: mean sqrt(2 / pi), variance 1 - 2 / pi, evidence 1/2; NaN or inf outside.
    def half(z):
        value = torch.distributions.Normal(0.0, 1.0).log_prob(z).squeeze(1)
        value = torch.where(z[:, 0] < 0, torch.nan, value)
        return torch.where(z[:, 0] < -1, torch.inf, value)

    draws = adaptive_importance(half, torch.zeros(1), torch.eye(1), generator=generator())
    assert abs(draws.mean[0] - math.sqrt(2 / math.pi)) < 4 * draws.mean_error[0] * draws.sd[0]
    assert abs(draws.log_evidence - math.log(0.5)) < 4 * draws.log_evidence_se
    assert (draws.log_weights[draws.z[:, 0] < 0] == -math.inf).all()


def test_all_weights_zero_is_an_error():
    for nothing in (-math.inf, math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="at all of 2048 draws"):
            adaptive_importance(
                lambda z, value=nothing: z.new_full((len(z),), value),
                torch.zeros(2),
                torch.eye(2),
                generator=generator(),
            )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loc": torch.zeros(3)}, r"covariance of shape \(D, D\)"),
        ({"covariance": -torch.eye(2)}, "positive definite"),
        ({"covariance": torch.full((2, 2), math.nan)}, "positive definite"),
        ({"loc": torch.tensor([0.0, math.nan])}, "loc finite"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1"),
        ({"degrees_of_freedom": 2.0}, "degrees_of_freedom must be above 2"),
    ],
)
def test_bad_arguments(change, match):
    arguments = {"loc": torch.zeros(2), "covariance": torch.eye(2), "generator": generator()}
    with pytest.raises(ValueError, match=match):
        adaptive_importance(lambda z: -z.square().sum(-1), **{**arguments, **change})


def test_same_seed_same_draws_and_no_global_randomness():
    before = torch.get_rng_state()
    first, second = (
        adaptive_importance(
            lambda z: -z.square().sum(-1), torch.zeros(2), torch.eye(2), generator=generator(7)
        )
        for _ in range(2)
    )
    assert torch.equal(first.z, second.z)
    assert torch.equal(torch.get_rng_state(), before)


def test_student_t_agrees_with_scipy():
    scale_tril = torch.linalg.cholesky(equicorrelated(3).covariance)
    t = StudentT(torch.tensor([1.0, 2.0, 3.0]), scale_tril, 5.0)
    z = t.sample(1000, generator())
    expected = stats.multivariate_t(t.loc.numpy(), (scale_tril @ scale_tril.T).numpy(), df=5.0)
    torch.testing.assert_close(t.log_prob(z), torch.from_numpy(expected.logpdf(z.numpy())))
    point = z[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(t.log_prob(point).sum(), point)
    torch.testing.assert_close(t.value_and_grad(z[:5])[1], gradient)
    # A whitened coordinate is univariate t: Kolmogorov-Smirnov, and nets only come closer.
    white = torch.linalg.solve_triangular(scale_tril, (z - t.loc).T, upper=False).T
    assert stats.kstest(white[:, 2].numpy(), stats.t(5.0).cdf).pvalue > 1e-3


def weighted(z, strata, units):
    zeros = torch.zeros(len(z))
    return WeightedDraws(z, zeros, zeros, strata, units, khat=0.0, num_evaluations=len(z))


def test_errors_of_equal_weights_are_the_classical_ones():
    z = torch.randn(500, 2)
    draws = weighted(z, 1, 500)
    torch.testing.assert_close(draws.expectation(z)[1], z.std(0) / math.sqrt(500))
    assert draws.log_evidence_se == pytest.approx(0.0, abs=1e-12)
    assert draws.ess == pytest.approx(500.0)
    means = z.reshape(100, 5, 2).mean(1)
    torch.testing.assert_close(weighted(z, 1, 100).expectation(z)[1], means.std(0) / 10.0)


def test_differences_between_strata_are_no_error():
    z = torch.cat([torch.randn(100, 1), 1000.0 + torch.randn(100, 1)])
    error = weighted(z, 2, 100).expectation(z)[1]
    expected = (z[:100].var(0) + z[100:].var(0)).sqrt() * 10.0 / 200.0
    torch.testing.assert_close(error, expected)


def test_one_unit_knows_no_error():
    z = torch.randn(10, 1)
    assert weighted(z, 10, 1).expectation(z)[1].isinf().all()


def test_weighted_moments_count_a_draw_by_its_weight():
    z = torch.randn(20, 3)
    weights = torch.randint(1, 4, (20,))
    mean, covariance = weighted_moments(z, weights / weights.sum())
    repeated = z.repeat_interleave(weights, 0)
    torch.testing.assert_close(mean, repeated.mean(0))
    torch.testing.assert_close(covariance, torch.cov(repeated.T, correction=0))


def test_temper_reaches_its_target():
    from pyro_mf.weights import effective_sample_size

    log_weights = 10.0 * torch.randn(1000)
    power = temper(log_weights, 500.0)
    assert float(effective_sample_size(power * log_weights)) == pytest.approx(500.0, rel=1e-3)
    assert temper(0.01 * log_weights, 500.0) == 1.0
    assert temper(torch.tensor([0.0, -math.inf]), 2.0) > 0.0
