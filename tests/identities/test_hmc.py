"""Hamiltonian transitions: exact identities, then that the target stays where it is."""

import math

import pytest
import torch

from pyro_mf.kernels import HMCState, Metric, hmc_transition
from pyro_mf.kernels.transition import leapfrog


def banana(z):
    """A curved density in two dimensions."""
    x, y = z.unbind(-1)
    bend = y - x.square()
    value = -0.5 * x.square() - 2.0 * bend.square()
    return value, torch.stack([-x + 8.0 * x * bend, -4.0 * bend], -1)


def log_gamma(z):
    """Logarithms of exponential draws, in one dimension: skewed."""
    value = (z - z.exp()).sum(-1)
    return value, 1.0 - z.exp()


def correlated(seed=0, size=3):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator).tril()
    factor.diagonal().abs_().add_(0.5)
    return factor


def gaussian(factor):
    precision = torch.cholesky_inverse(factor)
    return lambda z: (-0.5 * (z @ precision * z).sum(-1), -z @ precision)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_trajectory_is_reversible():
    z, momentum = torch.randn(2, 50, 2)
    metric, step = Metric(correlated(size=2)), torch.rand(50, 1) * 0.05
    begin = HMCState.at(banana, z)
    end, last = leapfrog(banana, begin, momentum, step, 9, metric)
    back, first = leapfrog(banana, end, -last, step, 9, metric)
    assert float((end.z - z).norm()) > 1.0
    torch.testing.assert_close(back.z, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-first, momentum, rtol=1e-9, atol=1e-9)


def test_a_trajectory_keeps_volumes():
    metric, step = Metric(torch.tensor([0.7, 1.3])), torch.full((1, 1), 0.3)

    def move(both):
        z, momentum = both[None].split(2, 1)
        end, last = leapfrog(banana, HMCState.at(banana, z), momentum, step, 5, metric)
        return torch.cat([end.z, last], 1)[0]

    jacobian = torch.autograd.functional.jacobian(move, torch.tensor([0.3, -0.2, 1.0, 0.5]))
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-10)


def test_the_energy_error_is_of_second_order():
    z, momentum = torch.randn(2, 20, 2)
    metric, begin, errors = Metric(torch.ones(2)), HMCState.at(banana, z), []
    for num_steps in (200, 400):
        step = torch.full((1, 1), 1.0 / num_steps)
        end, last = leapfrog(banana, begin, momentum, step, num_steps, metric)
        kinetic = 0.5 * (last.square() - momentum.square()).sum(1)
        errors.append(end.log_density - begin.log_density - kinetic)
    assert float((errors[0] / errors[1]).median()) == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("is_dense", [True, False])
def test_a_metric_is_a_change_of_variables(is_dense):
    """Chains under a metric are those of the transformed density under the identity."""
    target = correlated(0)
    scale = correlated(1) if is_dense else torch.tensor([0.5, 1.0, 2.0])
    metric, identity = Metric(scale), Metric(torch.ones(3))
    density = gaussian(target)

    def transformed(y):
        value, gradient = density(metric.unwhiten(y))
        return value, gradient @ scale if is_dense else gradient * scale

    start = torch.randn(20, 3)
    state, acceptance = HMCState.at(density, metric.unwhiten(start)), None
    other = HMCState.at(transformed, start)
    one, two = generator(), generator()
    for _ in range(5):
        state, acceptance = hmc_transition(density, state, 0.4, 3, metric, one)
        other, same = hmc_transition(transformed, other, 0.4, 3, identity, two)
        torch.testing.assert_close(acceptance, same)
    torch.testing.assert_close(state.z, metric.unwhiten(other.z))
    assert 0.1 < float(acceptance.mean()) < 1.0


def test_a_gaussian_in_its_own_metric_is_a_circle():
    """Leapfrog on a harmonic oscillator: one period takes 2 pi / (2 arcsin(h / 2) / h)."""
    factor = correlated()
    num_steps = 24
    step = 2.0 * math.sin(math.pi / num_steps)
    state = HMCState.at(gaussian(factor), torch.randn(10, 3))
    moved, _ = leapfrog(
        gaussian(factor),
        state,
        Metric(factor).momentum(torch.randn(10, 3)),
        torch.full((1, 1), step),
        num_steps,
        Metric(factor),
    )
    torch.testing.assert_close(moved.z, state.z)


def z_scores(density, start, *, step, num_steps, always=False, num_iterations=12):
    """How far mean and mean square are, in standard errors, from what ``start`` is drawn from."""
    metric, source = Metric(torch.ones(start.shape[1])), generator(1)
    state = HMCState.at(density, start)
    for _ in range(num_iterations):
        if always:  # the negative control: every proposal is taken
            noise = torch.randn(start.shape, generator=source)
            state, _ = leapfrog(density, state, noise, torch.tensor([[step]]), num_steps, metric)
        else:
            state, acceptance = hmc_transition(density, state, step, num_steps, metric, source)
    assert always or 0.3 < float(acceptance.mean()) < 0.95
    values = torch.stack([state.z, state.z.square()])
    before = torch.stack([start, start.square()])
    error = ((values.var(1) + before.var(1)) / len(start)).sqrt()
    return ((values.mean(1) - before.mean(1)) / error).abs().max()


def test_a_skewed_target_stays_as_it_is():
    # 40,000 chains: z = 4.5 sees a shift of 3 % of a sd.
    start = torch.distributions.Exponential(1.0).sample((40_000, 1)).log()
    arguments = {"step": 1.2, "num_steps": 2}
    assert float(z_scores(log_gamma, start, **arguments)) < 4.5
    assert float(z_scores(log_gamma, start, **arguments, always=True)) > 20.0


def test_rejections_at_the_edge_of_the_density_are_right():
    """A half-normal: no density below zero, where a trajectory may go on and come back."""

    def half(z):
        inside = z[:, 0] > 0
        value = torch.where(inside, -0.5 * z.square().sum(-1), -torch.inf)
        return value, torch.where(inside[:, None], -z, 0.0)

    start = torch.randn(40_000, 1).abs()
    arguments = {"step": 0.4, "num_steps": 3}
    assert float(z_scores(half, start, **arguments)) < 4.5
    outside = HMCState.at(half, start)
    moved, _ = hmc_transition(half, outside, 0.4, 3, Metric(torch.ones(1)), generator())
    assert bool((moved.z > 0).all())
    assert float(z_scores(half, start, **arguments, always=True)) > 20.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_trajectory_that_passes_a_bad_point_is_rejected(bad):
    """Also where its end is good."""
    calls = []

    def density(z):
        calls.append(z)
        value, gradient = -0.5 * z.square().sum(-1), -z
        if len(calls) == 3:  # the second of three steps of chain 1
            value[1] = bad
        return value, gradient

    state = HMCState.at(density, torch.zeros(4, 2))
    metric = Metric(torch.ones(2))
    moved, acceptance = hmc_transition(density, state, 0.1, 3, metric, generator())
    assert acceptance[1] == 0.0
    assert float(acceptance[[0, 2, 3]].min()) > 0.99
    torch.testing.assert_close(moved.z[1], state.z[1])
    assert bool(torch.isfinite(moved.log_density).all())


def test_a_metric_knows_its_inverse():
    z = torch.randn(5, 4, 3)
    for metric in (Metric(correlated()), Metric(torch.tensor([0.1, 1.0, 10.0]))):
        torch.testing.assert_close(metric.whiten(metric.unwhiten(z)), z)
        noise = z[0]
        momentum = metric.momentum(noise)
        energy = (momentum * metric.velocity(momentum)).sum(-1)
        torch.testing.assert_close(energy, noise.square().sum(-1))


def test_a_metric_from_draws_does_not_depend_on_units():
    draws, factor, unit = torch.randn(200, 3), correlated(), torch.tensor([1e-3, 1.0, 1e3])
    found = Metric(factor).updated(draws, 200.0)
    scaled = Metric(unit[:, None] * factor).updated(draws * unit, 200.0)
    torch.testing.assert_close(scaled.scale, unit[:, None] * found.scale)
