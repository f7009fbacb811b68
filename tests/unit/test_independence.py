"""Independence kernels: they keep their target, whatever is proposed, and reject what has none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.kernels.independence import (
    ConditionalImportance,
    DefensiveMixture,
    IndependenceChains,
)
from pyro_mf.objectives.forward_estimators import normalised

# METHODS: the skew-normal of Markovian score climbing, by quadrature.
MEAN, SD = 2.06478, 1.24558


class Gaussian:
    """A proposal over one dimension."""

    def __init__(self, loc: float, scale: float) -> None:
        self._dist = torch.distributions.Normal(torch.tensor(loc), torch.tensor(scale))

    def sample(self, num_draws: int) -> Tensor:
        return self._dist.sample((num_draws, 1))

    def log_prob(self, z: Tensor) -> Tensor:
        return self._dist.log_prob(z).sum(-1)


def skew_normal(z: Tensor) -> Tensor:
    x = (z[..., 0] - 0.5) / 2.0
    return -0.5 * x.square() + torch.special.log_ndtr(5.0 * x)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def chains(start: Tensor, density=skew_normal) -> IndependenceChains:
    return IndependenceChains(density, start, generator=generator())


def exact_draws(count: int) -> Tensor:
    tilt = 5.0 / math.sqrt(26.0)
    noise = torch.randn(2, count)
    return (0.5 + 2.0 * (tilt * noise[0].abs() + noise[1] / math.sqrt(26.0)))[:, None]


def has_target_moments(z: Tensor) -> bool:
    # z = 4: false alarms once in 16,000; with 20,000 draws it sees errors of 0.035.
    error = 4 * SD / math.sqrt(len(z))
    return abs(float(z.mean()) - MEAN) < error and abs(float(z.std()) - SD) < error


def test_parallel_chains_keep_the_target() -> None:
    proposal = Gaussian(MEAN, SD)
    run = chains(exact_draws(20_000))
    for _ in range(5):
        run.step(proposal)
    assert has_target_moments(run.z)
    assert 0.5 < run.acceptance < 0.95
    assert run.num_evaluations == 6 * 20_000
    assert not has_target_moments(proposal.sample(20_000) * 1.05)  # negative control


def test_parallel_chains_reach_the_target_from_afar_with_bounded_weights() -> None:
    # Without the heavy-tailed share the weights are unbounded, and the right tail fills slowly.
    narrow = Gaussian(1.0, 0.5)
    proposal = DefensiveMixture(narrow, 0.5, torch.ones(1), torch.full((1,), 1.5))
    run = chains(narrow.sample(20_000))
    for _ in range(60):
        run.step(proposal)
    assert has_target_moments(run.z)


def test_conditional_importance_sampling_has_no_bias_at_ten_candidates() -> None:
    proposal = DefensiveMixture(Gaussian(MEAN, SD), 0.3, torch.full((1,), MEAN), torch.ones(1))
    run = ConditionalImportance(skew_normal, torch.zeros(1), 10, generator=generator())
    moments = []
    for _ in range(4000):
        run.step(proposal)
        weights, z = run.log_weights.exp(), run.candidates[:, 0] - MEAN
        moments.append(torch.stack([(weights * z).sum(), (weights * z.square()).sum()]))
    kept = torch.stack(moments[100:])
    blocks = kept.reshape(39, 100, 2).mean(1)  # blocks much longer than the chain's memory
    error = blocks.std(0) / math.sqrt(len(blocks))
    expected = torch.tensor([0.0, SD**2])
    assert bool(((kept.mean(0) - expected).abs() < 4 * error).all())
    assert 4 * float(error[1]) < SD**2 - 1.199**2  # negative control: it would see snis's bias


@pytest.mark.parametrize(
    ("count", "loc", "scale"), [(2, 2.041, 1.084), (5, 2.049, 1.166), (10, 2.053, 1.199)]
)
def test_plain_importance_sampling_has_the_published_wrong_fixed_point(count, loc, scale) -> None:
    def moments(loc: float, scale: float) -> tuple[Tensor, Tensor]:
        proposal = Gaussian(loc, scale)
        z = proposal.sample(1_000_000 // count * count)
        log_weights = (skew_normal(z) - proposal.log_prob(z)).reshape(count, -1)
        weights, z = normalised(log_weights), z.reshape(count, -1)
        values = torch.stack([(weights * (z - loc)).sum(0), (weights * (z - loc).square()).sum(0)])
        return values.mean(1), values.std(1) / math.sqrt(values.shape[1])

    value, error = moments(loc, scale)
    # The gradient is zero where the weighted moments are the family's. The fixed point is given to
    # three digits, which its own two moments may be off by.
    tolerance = 4 * error + torch.tensor([1e-3, 2e-3 * scale])
    assert bool(((value - torch.tensor([0.0, scale**2])).abs() < tolerance).all())
    value, error = moments(MEAN, SD)  # negative control: forward KL's optimum is none for it
    assert float(value[1]) < SD**2 - 4 * float(error[1])


def test_proposals_without_density_are_turned_down() -> None:
    def half(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] > 0, -0.5 * z[:, 0].square(), -torch.inf)

    run = chains(torch.full((500, 1), 0.1), half)
    for _ in range(20):
        run.step(Gaussian(0.0, 1.0))
    assert bool((run.z > 0).all())
    assert 0.4 < run.acceptance < 0.6


def test_chain_without_density_takes_the_first_proposal_that_has_some() -> None:
    run = chains(torch.full((50, 1), -100.0), lambda z: torch.where(z[:, 0] > -9, 0.0, -torch.inf))
    run.step(Gaussian(0.0, 1.0))
    assert run.num_accepted == 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_density_that_is_not_a_number_is_no_reason_to_move(bad) -> None:
    run = chains(torch.zeros(5, 1), lambda z: torch.where(z[:, 0] == 0, 0.0, bad))
    run.step(Gaussian(1.0, 1.0))
    assert run.num_accepted == 0
    assert run.num_rejected.tolist() == [1] * 5


def test_no_candidate_with_density_is_an_error() -> None:
    run = ConditionalImportance(
        lambda z: torch.full((len(z),), -torch.inf), torch.zeros(2), 4, generator=generator()
    )
    with pytest.raises(NonFiniteError, match="not finite at any of 4 candidates"):
        run.step(_Flat())


class _Flat:
    def sample(self, num_draws: int) -> Tensor:
        return torch.rand(num_draws, 2)

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.zeros(len(z))


def test_state_goes_on_to_the_bit() -> None:
    proposal = Gaussian(MEAN, SD)

    def run_chains(steps: int, state=None) -> tuple[Tensor, dict]:
        run = chains(torch.zeros(7, 1))
        one = ConditionalImportance(skew_normal, torch.zeros(1), 5, generator=generator())
        if state is not None:
            run.load_state_dict(state["run"])
            one.load_state_dict(state["one"])
        for step in range(steps):
            torch.manual_seed(step + (0 if state is None else 3))
            run._generator.manual_seed(step + (0 if state is None else 3))
            one._generator.manual_seed(step + (0 if state is None else 3))
            run.step(proposal)
            one.step(proposal)
        state = {"run": run.state_dict(), "one": one.state_dict()}
        return torch.cat([run.z[:, 0], one.z, one.log_weights]), state

    whole, _ = run_chains(6)
    _, half = run_chains(3)
    resumed, state = run_chains(3, half)
    assert torch.equal(whole, resumed)
    assert state["run"]["num_steps"] == 6


def test_defensive_mixture_is_a_density_with_bounded_weights() -> None:
    mixture = DefensiveMixture(Gaussian(0.0, 0.5), 0.1, torch.zeros(1), torch.full((1,), 1.5))
    grid = torch.linspace(-400.0, 400.0, 400_001)[:, None]
    mass = torch.trapezoid(mixture.log_prob(grid).exp(), grid[:, 0])
    assert float(mass) == pytest.approx(1.0, abs=1e-5)
    ratio = -0.5 * grid[:, 0].square() - mixture.log_prob(grid)  # a wider Gaussian target
    assert float(ratio.max()) < 5.0
    draws = mixture.sample(20_000)
    far = float((draws.abs() > 2.5).double().mean())  # beyond all but the heavy-tailed part
    expected = float(torch.trapezoid(mixture.log_prob(grid[grid[:, 0] > 2.5]).exp(), dx=2e-3)) * 2
    assert abs(far - expected) < 4 * math.sqrt(expected / 20_000)
