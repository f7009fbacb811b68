"""Parallel chains: what they adapt to, what they find, and what they say when they do not."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf._errors import NonFiniteError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.kernels import Metric, ParallelHMC, initialise, measure_mixing
from pyro_mf.kernels.adaptation import LengthSearch, StepSize, renewal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(covariance):
    precision = torch.linalg.inv(covariance)
    return lambda z: (-0.5 * (z @ precision * z).sum(-1), -z @ precision)


def autoregressive(rho):
    """A stationary autoregression with variance one, as a density of its whole path."""

    def density(z):
        error = (z[:, 1:] - rho * z[:, :-1]) / (1 - rho**2)
        value = -0.5 * z[:, 0].square() - 0.5 * (1 - rho**2) * error.square().sum(-1)
        gradient = torch.zeros_like(z)
        gradient[:, 0] = -z[:, 0]
        gradient[:, 1:] -= error
        gradient[:, :-1] += rho * error
        return value, gradient

    return density


def funnel(z):
    """Neal's funnel in ten dimensions: log variance 3 N(0, 1) of the nine others."""
    v, x = z[:, 0], z[:, 1:]
    squares = x.square().sum(-1) * (-v).exp()
    value = -v.square() / 18 - 0.5 * squares - 4.5 * v
    first = -v / 9 + 0.5 * squares - 4.5
    return value, torch.cat([first[:, None], -x * (-v).exp()[:, None]], 1)


def run(density, metric, *, num_chains=32, warm_up=120, num_iterations=100, seed=0):
    source = generator(seed)
    loc = torch.zeros(len(metric.scale))
    z = initialise(density, loc, metric, num_chains, generator=source)
    chains = ParallelHMC(density, z, metric, generator=source)
    chains.warm_up(warm_up)
    return chains, chains.sample(num_iterations)


def assert_standard(draws, sd=1.0):
    """Mean zero and the sd given, within 5 of the standard errors that the chains state."""
    found = measure_mixing(draws.z)
    assert found.worst_rhat < 1.1
    assert len(found.stuck) == 0
    mean, spread = draws.z.mean((0, 1)) / sd, draws.z.std((0, 1)) / sd
    assert float((mean / found.mcse_mean).abs().max()) < 5.0
    assert float(((spread - 1.0) / found.mcse_sd).abs().max()) < 5.0
    return found


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("factor", [0.01, 1.0, 100.0])
def test_unequal_scales_are_found_from_a_wrong_metric(is_dense, factor):
    sd = torch.tensor([1e-3, 1.0, 1e3])
    covariance = (0.3 + 0.7 * torch.eye(3)) * torch.outer(sd, sd)
    scale = factor * sd
    metric = Metric(scale.diag() if is_dense else scale)
    chains, draws = run(gaussian(covariance), metric, warm_up=200)
    found = assert_standard(draws, sd)
    assert float(found.ess_squares.min()) > 600  # of 3200 draws
    assert 0.65 < float(chains.acceptance.mean()) < 0.92
    ratio = chains.metric.unwhiten(torch.eye(3)).square().sum(0).sqrt() / sd
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.25


def test_a_correlated_gaussian_in_100_dimensions():
    covariance = 0.5 + 0.5 * torch.eye(100)
    metric = Metric(torch.linalg.cholesky(covariance))
    chains, draws = run(gaussian(covariance), metric)
    found = assert_standard(draws)
    assert float(found.ess.min()) > 1000
    assert chains.num_gradients < 900
    torch.testing.assert_close(draws.log_density.mean(), torch.tensor(-50.0), atol=1.5, rtol=0)


def test_trajectories_get_longer_where_the_metric_lacks_correlations():
    density = autoregressive(0.9)
    chains, draws = run(density, Metric(torch.full((200,), 0.3)), num_iterations=60)
    assert chains.length > 3.0
    assert_standard(draws)


def test_few_draws_leave_a_good_metric_as_it_is():
    draws = torch.randn(64, 200)  # the sample covariance is singular
    kept = Metric(torch.eye(200)).updated(draws, 64.0).covariance
    eigenvalues = torch.linalg.eigvalsh(kept)
    assert 0.8 < float(eigenvalues[0]) <= float(eigenvalues[-1]) < 1.25


def test_many_draws_replace_a_bad_metric():
    factor = torch.randn(5, 5).tril() + 3.0 * torch.eye(5)
    draws = torch.randn(4000, 5) @ factor.T
    found = Metric(torch.eye(5)).updated(draws, 4000.0).covariance
    distance = torch.linalg.eigvalsh(torch.linalg.solve(factor @ factor.T, found))
    assert 0.85 < float(distance.min()) <= float(distance.max()) < 1.15


def test_nothing_is_adapted_while_drawing():
    density = gaussian(torch.eye(4))
    chains, _ = run(density, Metric(torch.ones(4)), num_iterations=5)
    before = (chains.step_size, chains.length, chains.metric, chains.target_acceptance)
    chains.sample(20)
    assert before == (chains.step_size, chains.length, chains.metric, chains.target_acceptance)


def test_chains_go_on_from_their_state_to_the_bit():
    density = gaussian(torch.eye(4))
    chains, _ = run(density, Metric(torch.eye(4)), num_iterations=5)
    saved = copy.deepcopy(chains.state_dict())
    first = chains.sample(10).z
    chains.warm_up(50)
    then = chains.sample(10).z
    other = ParallelHMC(density, torch.zeros(32, 4), Metric(torch.ones(4)), generator=generator(9))
    other.load_state_dict(saved)
    assert torch.equal(other.sample(10).z, first)
    other.warm_up(50)
    assert torch.equal(other.sample(10).z, then)
    assert other.num_gradients == chains.num_gradients
    assert torch.equal(other.acceptance, chains.acceptance)


def test_gradients_are_counted_by_calls():
    calls = []
    density = gaussian(torch.eye(2))

    def counted(z):
        calls.append(len(z))
        return density(z)

    chains = ParallelHMC(counted, torch.zeros(8, 2), Metric(torch.ones(2)), generator=generator())
    chains.warm_up(60)
    chains.sample(20)
    assert chains.num_gradients == len(calls)
    assert set(calls) == {8}


def test_a_model_that_raises_at_a_proposal_rejects_it():
    """A correlation is needed, and anything on the line is proposed."""

    def model(x):
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        one = torch.ones_like(r)
        matrix = torch.stack([torch.stack([one, r]), torch.stack([r, one])])
        factor = torch.linalg.cholesky(matrix)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=x)

    x = torch.randn(20, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.75**0.5]])
    blocks = Blocks(LogJoint(model, (x,)))
    grid = torch.linspace(-0.999, 0.999, 2001)[:, None]
    density = blocks.values(grid).softmax(0)
    mean = float(density @ grid[:, 0])
    sd = float((density @ (grid[:, 0] - mean).square()).sqrt())
    source = generator()
    metric = Metric(torch.full((1,), 0.3))  # too wide, so that some proposals have no density
    z = initialise(blocks.value_and_grad, torch.full((1,), mean), metric, 16, generator=source)
    assert bool((z.abs() < 1).all())
    chains = ParallelHMC(blocks.value_and_grad, z, metric, generator=source)
    chains.sample(20)
    draws = chains.sample(60)
    assert 0 < chains.num_divergent < 800
    found = measure_mixing(draws.z)
    assert bool(torch.isfinite(draws.log_density).all())
    assert abs(float(draws.z.mean()) - mean) < 5 * sd * float(found.mcse_mean)
    assert abs(float(draws.z.std()) / sd - 1) < 5 * float(found.mcse_sd)


def test_a_funnel_does_not_pass_for_converged():
    chains, draws = run(funnel, Metric(torch.ones(10)), num_chains=64)
    found = measure_mixing(draws.z)
    assert found.worst_rhat > 1.1
    assert chains.target_acceptance > 0.8  # steps were made smaller where trajectories diverged


def test_chains_in_two_modes_do_not_pass_for_converged():
    def density(z):
        values = torch.stack([-0.5 * (z[:, 0] - 8).square(), -0.5 * (z[:, 0] + 8).square()])
        share = values.softmax(0)[0]
        return values.logsumexp(0), (8 * (2 * share - 1) - z[:, 0])[:, None]

    z = torch.cat([torch.full((31, 1), 8.0), torch.full((1, 1), -8.0)])
    chains = ParallelHMC(density, z, Metric(torch.ones(1)), generator=generator())
    chains.warm_up(60)
    found = measure_mixing(chains.sample(60).z)
    assert found.stuck.tolist() == [31]
    assert found.worst_rhat > 1.1


def test_chains_that_never_move_are_seen():
    """The gradient points the wrong way by far: nothing is ever accepted."""

    def density(z):
        return -0.5 * z.square().sum(-1), 1e9 * (1.0 + z.square())

    chains = ParallelHMC(density, torch.ones(8, 1), Metric(torch.ones(1)), generator=generator())
    draws = chains.sample(20)
    assert float(chains.acceptance.max()) < 1e-6
    assert chains.num_divergent == 8 * 20
    assert measure_mixing(draws.z).stuck.tolist() == list(range(8))


@pytest.mark.parametrize("is_dense", [True, False])
def test_warming_up_where_nothing_moves_ends_all_the_same(is_dense):
    def density(z):
        return torch.where((z == 1.0).all(-1), 0.0, -torch.inf), torch.zeros_like(z)

    metric = Metric(torch.eye(2) if is_dense else torch.ones(2))
    chains = ParallelHMC(density, torch.ones(8, 2), metric, generator=generator())
    chains.warm_up(40)
    draws = chains.sample(10)
    assert bool((draws.z == 1.0).all())  # also where steps have become too small to be seen
    assert measure_mixing(draws.z).stuck.tolist() == list(range(8))


def test_a_step_size_is_found_from_far_off():
    for value in (1e-2, 1e2):
        step = StepSize(value, 0.8)
        for _ in range(60):
            step.update(math.erfc(0.25 * step.value**2))
        step.settle()
        assert math.erfc(0.25 * step.value**2) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("best", "found"), [(0.5, 4 / 9), (1.1, 1.0), (2.0, 2.25)])
def test_a_length_is_searched_upwards_then_downwards(best, found):
    search = LengthSearch(1.0)
    while not search.is_done:
        search.report(math.exp(-4.0 * math.log(search.length / best) ** 2))
    assert search.length == search.best == pytest.approx(found)


def test_renewal_is_that_of_an_autoregression():
    noise = torch.randn(40, 64, 3)
    rows = [noise[0]]
    for row in noise[1:]:
        rows.append(0.8 * rows[-1] + 0.6 * row)
    found = renewal(torch.stack(rows))[:3]
    torch.testing.assert_close(found, torch.full((3,), 0.2 / 1.8), atol=0.03, rtol=0)
    assert float(renewal(torch.randn(64, 3).expand(10, -1, -1)).max()) == 0.0


@pytest.mark.parametrize("z", [torch.zeros(3), torch.zeros(1, 2), torch.zeros(4, 3)])
def test_positions_of_the_wrong_shape_are_refused(z):
    with pytest.raises(ValueError, match=r"expected positions of shape \(N, 2\)"):
        ParallelHMC(gaussian(torch.eye(2)), z, Metric(torch.ones(2)), generator=generator())


def test_chains_do_not_begin_where_there_is_no_density():
    def density(z):
        return torch.where(z[:, 0] > 0, 0.0, -torch.inf), torch.zeros_like(z)

    z = torch.tensor([[1.0], [-1.0]])
    with pytest.raises(NonFiniteError, match="1 of 2 chains begin where"):
        ParallelHMC(density, z, Metric(torch.ones(1)), generator=generator())
    with pytest.raises(NonFiniteError, match="4 of 4 chains found no starting point"):
        initialise(density, torch.tensor([-9.0]), Metric(torch.ones(1)), 4, generator=generator())


def test_a_short_warm_up_is_refused():
    chains = ParallelHMC(
        gaussian(torch.eye(2)), torch.zeros(4, 2), Metric(torch.ones(2)), generator=generator()
    )
    with pytest.raises(ValueError, match="at least 40 iterations; got 10"):
        chains.warm_up(10)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (torch.ones(2, 3), "must have shape"),
        (torch.tensor([1.0, 0.0]), "positive diagonal"),
        (torch.tensor([[1.0, 0.0], [math.nan, 1.0]]), "must be finite"),
    ],
)
def test_a_bad_metric_is_refused(scale, match):
    with pytest.raises(ValueError, match=match):
        Metric(scale)
