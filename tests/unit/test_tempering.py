"""Tempered SMC: modes in the right proportion, evidence, and what it says when it fails."""

import math

import pytest
import torch

from pyro_mf._errors import NonFiniteError
from pyro_mf.kernels import annealing
from pyro_mf.kernels.annealing import AnnealedRun
from pyro_mf.kernels.student_t import StudentT
from pyro_mf.kernels.tempering import tempered_smc

LOG_EVIDENCE = 5.0


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wide(size, variance=4.0):
    return StudentT(torch.zeros(size), math.sqrt(variance) * torch.eye(size), 7.0)


def gradient_of(log_density):
    """An ``Evaluate`` from a differentiable function of rows."""

    def evaluate(z):
        z = z.detach().requires_grad_()
        value = log_density(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    return evaluate


def gaussian(z):
    size = z.shape[1]
    constant = LOG_EVIDENCE - 0.5 * size * math.log(2 * math.pi)
    return constant - 0.5 * z.square().sum(1), -z


def product_of_modes(weight):
    """In every coordinate weight N(-2, .25) + (1 - weight) N(2, .25): mean, variance known."""

    @gradient_of
    def evaluate(z):
        low = math.log(weight) - 2.0 * (z + 2.0) ** 2
        high = math.log(1.0 - weight) - 2.0 * (z - 2.0) ** 2
        constant = 0.5 * math.log(2 * math.pi * 0.25)
        return (torch.logaddexp(low, high) - constant).sum(1) + LOG_EVIDENCE

    mean = 2.0 - 4.0 * weight
    return evaluate, mean, 0.25 + 4.0 - mean**2


@pytest.mark.parametrize(("size", "weight"), [(1, 0.5), (1, 0.8), (3, 0.7)])
def test_modes_in_the_right_proportion(size, weight):
    # z = 5: the error is read off a few runs only.
    density, mean, variance = product_of_modes(weight)
    draws = tempered_smc(
        density, wide(size), generator=generator(), num_particles=256, num_sweeps=3, tolerance=0.1
    )
    assert draws.trusted, draws.problems
    off = (draws.mean - mean).abs() / math.sqrt(variance)
    assert (off < 5.0 * draws.mean_error + 0.01).all(), (off, draws.mean_error)
    assert ((draws.sd / math.sqrt(variance) - 1.0).abs() < 5.0 * draws.sd_error + 0.01).all()
    assert abs(draws.log_evidence - LOG_EVIDENCE) < 5.0 * draws.log_evidence_se + 0.02
    assert all(t[-1] == 1.0 for t in draws.temperatures)
    torch.testing.assert_close(draws.log_density, density(draws.z)[0])


def evidence_ratios(num, size=2):
    found = []
    for seed in range(num):
        run = AnnealedRun(gaussian, wide(size), 64, 10**6, generator(seed))
        run.anneal()
        found.append(math.exp(run.log_evidence - LOG_EVIDENCE))
    return torch.tensor(found)


def deviation(ratios):
    return abs(float((ratios.mean() - 1.0) / ratios.std())) * math.sqrt(len(ratios))


def test_evidence_is_unbiased_over_many_small_runs(monkeypatch):
    # z = 4 by their own spread. Temperatures that depend on the particles bias it by 1 / N only.
    assert deviation(evidence_ratios(100)) < 4.0

    # Negative control: particles that are not resampled by their weights.
    def unweighted(self, weights, right=AnnealedRun._resample):
        right(self, torch.full_like(weights, 1.0 / len(weights)))

    monkeypatch.setattr(annealing.AnnealedRun, "_resample", unweighted)
    monkeypatch.setattr(annealing, "_MAX_MOVES", 0)
    monkeypatch.setattr(annealing.AnnealedRun, "_move", lambda self, t: self.acceptance.append(1.0))
    assert deviation(evidence_ratios(100, size=6)) > 4.0


def test_systematic_resampling_keeps_each_particle_as_often_as_its_weight_says():
    run = AnnealedRun(gaussian, wide(1), 1000, 10**6, generator())
    weights = torch.softmax(3.0 * torch.randn(1000), 0)
    before = run.z.clone()
    run._resample(weights)
    counts = (run.z == before.T).sum(0)
    assert counts.sum() == 1000
    assert ((counts - 1000 * weights).abs() < 1.0 + 1e-9).all()


def test_flags_a_region_that_the_base_and_the_moves_do_not_reach():
    # A wall: half of the target that no particle starts in and no trajectory crosses.
    def walled(z):
        value, gradient = gaussian(z)
        outside = z[:, 0] < 0
        return value.masked_fill(outside, -math.inf), gradient.masked_fill(outside[:, None], 0.0)

    draws = tempered_smc(
        walled, wide(2), generator=generator(), num_particles=256, num_sweeps=5, tolerance=0.2
    )
    assert any("a region next to the draws is missing" in p for p in draws.problems)


def test_says_when_the_budget_was_spent_on_the_way():
    narrow = gradient_of(lambda z: -0.5e6 * (z - 3.0).square().sum(1))
    draws = tempered_smc(
        narrow, wide(3), generator=generator(), num_particles=64, num_sweeps=1, max_evaluations=100
    )
    assert "spent their budget on the way" in draws.problems[0]
    assert math.isnan(draws.khat)


def test_a_target_without_overlap_is_an_error():
    def nowhere(z):
        return z.new_full((len(z),), -math.inf), torch.zeros_like(z)

    with pytest.raises(NonFiniteError, match="no path to it"):
        tempered_smc(nowhere, wide(2), generator=generator())


@pytest.mark.parametrize(
    "change", [{"num_particles": 8}, {"num_sweeps": 0}, {"tolerance": 0.0}, {"tolerance": math.nan}]
)
def test_bad_arguments(change):
    with pytest.raises(ValueError, match="expected num_particles of at least 16"):
        tempered_smc(gaussian, wide(2), generator=generator(), **change)


def test_same_seed_same_draws_and_no_global_randomness():
    before = torch.get_rng_state()
    first, second = (
        tempered_smc(
            gaussian, wide(2), generator=generator(3), num_particles=32, num_sweeps=1, tolerance=1.0
        )
        for _ in range(2)
    )
    assert torch.equal(first.z, second.z)
    assert first.log_evidence == second.log_evidence
    assert torch.equal(torch.get_rng_state(), before)
