"""The deterministic solver where it is easy to go wrong."""

from __future__ import annotations

import itertools
import math
import threading
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_mf import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.guides import AutoMeanField
from pyro_mf.solvers.deterministic import solve_deterministic, solve_from_many
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.lockstep import run_in_lockstep
from pyro_mf.solvers.outcome import silent


def solve(model, *args, **options):
    guide = AutoMeanField(model).setup(*args)
    outcome = solve_deterministic(LogJoint(model, args), guide, **options)
    loc, scale = (p.detach() for p in guide.flat_params())
    return outcome, loc, scale


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 10.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def improper_regression(x, y):
    real = constraints.independent(constraints.real, 1)
    weight = pyro.sample("weight", dist.ImproperUniform(real, (), (x.shape[1],)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("p", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


# -- draws and blocks --------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "size"), [(4, 1), (8, 3), (32, 100), (64, 5)])
def test_fixed_draws_have_the_moments_they_promise(num, size) -> None:
    draws = fixed_draws(num, size, seed=4)
    assert draws.shape == (num, size)
    assert torch.equal(draws[: num // 2], -draws[num // 2 :])
    torch.testing.assert_close(draws.square().mean(0), torch.ones(size))
    assert torch.equal(draws, fixed_draws(num, size, seed=4))
    assert not torch.equal(draws, fixed_draws(num, size, seed=5))


def test_fixed_draws_are_nearly_orthogonal() -> None:
    draws = fixed_draws(20, 10, seed=0)[:10]
    cosines = draws @ draws.T / torch.outer(draws.norm(dim=1), draws.norm(dim=1))
    independent = torch.randn(10, 10)
    control = independent @ independent.T
    control = control / torch.outer(independent.norm(dim=1), independent.norm(dim=1))
    off = ~torch.eye(10, dtype=torch.bool)
    assert float(cosines[off].abs().mean()) < 0.5 * float(control[off].abs().mean())


@pytest.mark.parametrize("num", [0, 3, -2])
def test_number_of_draws_is_even(num) -> None:
    with pytest.raises(ValueError, match="even and at least 2"):
        fixed_draws(num, 3)


def test_blocks_do_not_depend_on_their_size() -> None:
    log_joint = LogJoint(funnel)
    blocks, z = Blocks(log_joint), torch.randn(70, 10)
    value, gradient = blocks.value_and_grad(z)
    torch.testing.assert_close(value, log_joint(z))
    blocks.num_rows = 7
    again, gradient_again = blocks.value_and_grad(z)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(gradient_again, gradient)


def test_rows_of_a_block_shrink_with_the_data() -> None:
    x = torch.randn(400_000, 2)
    small, large = (
        Blocks(LogJoint(regression, (x[:n], (x[:n, 0] > 0).to(x)))) for n in (1_000, 400_000)
    )
    assert small.num_rows == 32
    assert not small.is_costly
    assert Blocks(LogJoint(funnel)).num_rows == 128
    assert large.is_costly
    one = large.log_joint.footprint.num_bytes
    assert 400_000 * 8 < one < 400_000 * 8 * 20
    assert large.num_rows * one <= max(4 * 2**20, one)


def test_a_draw_without_a_density_costs_nobody_else() -> None:
    """A Cholesky factor that fails, or an operation that raises, at one row."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        matrix = torch.stack(
            [torch.stack([z + 0.5, z * 0.0]), torch.stack([z * 0.0, z * 0.0 + 1.0])]
        )
        pyro.factor("f", torch.linalg.cholesky(matrix).sum())

    for backend in ("graph", "eager"):
        blocks = Blocks(LogJoint(model, backend=backend))
        value, gradient = blocks.value_and_grad(torch.tensor([[1.0], [-1.0], [4.0]]))
        assert value[1] == -math.inf
        assert gradient[1] == 0.0
        expected = torch.tensor([1.0 + 1.5**0.5, 1.0 + 4.5**0.5]) + dist.Normal(0.0, 1.0).log_prob(
            torch.tensor([1.0, 4.0])
        )
        torch.testing.assert_close(value[[0, 2]], expected)


# -- posteriors that are hard to start on --------------------------------------------------------


def test_location_far_from_zero() -> None:
    y = 1000.0 + 5.0 * torch.randn(50)

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 10_000.0))
        scale = pyro.sample("scale", dist.HalfCauchy(100.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    outcome, loc, scale = solve(model, y)
    assert outcome.converged
    assert abs(float(loc[0] - y.mean())) < 0.1 * float(scale[0])  # the solver's tolerance


def test_predictors_of_unlike_scales() -> None:
    """The optimum moves with the units of the predictors and not otherwise."""
    units = torch.tensor([1e-3, 1.0, 1e4])
    x = torch.randn(300, 3)
    y = (torch.rand(300) < torch.sigmoid(x[:, 0] - x[:, 1])).to(x)

    def model(x, y, units):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 10.0 / units).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)

    plain, loc, scale = solve(model, x, y, torch.ones(3))
    scaled, scaled_loc, scaled_scale = solve(model, x * units, y, units)
    assert plain.converged
    assert scaled.converged
    assert float(((scaled_loc * units - loc) / scale).abs().max()) < 1e-3
    torch.testing.assert_close(scaled_scale * units, scale, rtol=1e-3, atol=0.0)


def test_funnel() -> None:
    """Linear response finds the neck's own sd, 3, which the mean field shrinks to a half."""
    outcome, loc, scale = solve(funnel)
    assert outcome.converged
    assert abs(float(loc[0])) < 0.1
    assert float(scale[0]) < 0.6
    assert float(outcome.response.sd[0]) == pytest.approx(3.0, rel=1e-3)


def test_correlation_of_nearly_one_keeps_its_linear_response() -> None:
    """Fixed draws leave such scales far off, which is no kink; seeds agree in the true sds."""
    base = torch.randn(200, 1)
    x = 100.0 + base + 1e-3 * torch.randn(200, 6)
    y = (torch.rand(200) < torch.sigmoid(base[:, 0])).to(x)
    first, loc, _ = solve(regression, x, y, seed=0)
    second, other, _ = solve(regression, x, y, seed=1)
    assert first.converged
    assert second.converged
    assert first.refusal == second.refusal == ""
    assert float(((loc - other) / first.response.sd).abs().max()) < 0.3


def test_noise_is_measured_in_the_sds_that_are_believed() -> None:
    """Linear response inflates a horseshoe's global scale; its sd is no yardstick there."""
    x = torch.randn(60, 10)
    y = 2.0 * x[:, 0] + torch.randn(60)

    def horseshoe(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        with pyro.plate("p", 10):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(x @ (b * local * tau), 1.0), obs=y)

    ends = [solve(horseshoe, x, y, seed=seed) for seed in range(3)]
    done = [(loc, scale) for outcome, loc, scale in ends if outcome.converged]
    for (a, scale), (b, _) in itertools.pairwise(done):
        assert float(((a - b) / scale).abs().max()) < 0.5
    for outcome, _, _ in ends:
        assert outcome.converged or "sds" in outcome.message or "scale" in outcome.message


def test_a_symmetric_start_between_two_modes_is_left() -> None:
    """The gradient at the origin is zero; staying there costs 0.87 nats."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("modes", torch.logaddexp(-2 * (x - 2.0) ** 2, -2 * (x + 2.0) ** 2))

    outcome, loc, scale = solve(model)
    assert outcome.converged
    assert abs(float(loc.abs() - 2.0)) < 0.05
    assert abs(float(scale) - 0.5) < 0.01


def test_discrete_latents_are_summed_out() -> None:
    y = torch.cat([torch.randn(40) - 3.0, torch.randn(60) + 3.0])

    def model(y):
        weight = pyro.sample("weight", dist.Beta(1.0, 1.0))
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc[z.long()], 1.0), obs=y)

    outcome, loc, _ = solve(model, y)
    assert outcome.converged
    assert abs(abs(float(loc[1] - loc[2])) - 6.0) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_of_the_data_is_kept(dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        x = torch.randn(200, 3)
        y = (torch.rand(200) < torch.sigmoid(x[:, 0])).to(x)
        outcome, loc, scale = solve(regression, x, y)
    finally:
        torch.set_default_dtype(before)
    assert outcome.converged, outcome.message
    assert loc.dtype == scale.dtype == dtype
    assert float(outcome.response.sd[0]) == pytest.approx(float(scale[0]), rel=0.2)


# -- posteriors that cannot be fitted, and say so --------------------------------------------------


def test_separable_classes_run_away() -> None:
    x = torch.randn(50, 2)
    outcome, loc, _ = solve(improper_regression, x, (x[:, 0] > 0).to(x))
    assert outcome.stop_reason == "diverged"
    assert "weight" in outcome.message
    assert "proper prior" in outcome.message
    assert bool(torch.isfinite(loc).all())
    proper, _, _ = solve(regression, x, (x[:, 0] > 0).to(x))
    assert proper.converged


def test_latents_that_are_loose_together_are_named() -> None:
    x = torch.randn(30)
    y = (torch.rand(30) < 0.5).to(x)
    outcome, _, _ = solve(improper_regression, torch.stack([x, x], 1), y)
    assert outcome.stop_reason in ("budget", "diverged")
    assert "weight[0], weight[1]" in outcome.message


def test_flat_latent_is_refused() -> None:
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))

    with pytest.raises(ModelError, match=r"'b'.*improper"):
        solve(model)


def test_impossible_data_are_refused() -> None:
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(z > 1e9, 0.0, -torch.inf))

    with pytest.raises(ModelError, match="no point with a finite log density"):
        solve(model)


def test_hard_wall_inside_a_support_is_named() -> None:
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.factor("wall", torch.where(z < 1.0, 0.0, -torch.inf))

    outcome, loc, scale = solve(model)
    assert outcome.stop_reason == "budget"
    assert "hard walls" in outcome.message
    assert bool(torch.isfinite(loc).all() & torch.isfinite(scale).all())


def test_jumps_are_no_gradient() -> None:
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal((3.0 * z).round() / 3.0, 1.0), obs=torch.tensor(4.0))

    with pytest.raises(ModelError, match="is not its derivative"):
        solve(model)


def test_kinks_have_no_linear_response() -> None:
    """All the curvature of an absolute value is in one point, which no draw hits."""

    def model():
        z = pyro.sample("z", dist.Laplace(1.0, 2.0))
        pyro.sample("y", dist.Laplace(z.abs(), 1.0), obs=torch.tensor(3.0))

    outcome, _, _ = solve(model)
    assert outcome.response is None
    assert "kinks" in outcome.refusal


# -- ends before the end -----------------------------------------------------------------------


def test_interrupt_keeps_the_best_point() -> None:
    x = torch.randn(200, 3)
    y = (torch.rand(200) < torch.sigmoid(x[:, 0])).to(x)
    whole, _, _ = solve(regression, x, y)

    def stop(progress):
        if progress.gradients == whole.num_gradients - 2:
            raise KeyboardInterrupt

    outcome, loc, scale = solve(regression, x, y, report=stop)
    assert outcome.stop_reason == "interrupted"
    assert outcome.elbo == pytest.approx(whole.elbo, abs=0.5)
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(loc).all())


def test_budget_is_kept() -> None:
    outcome, loc, _ = solve(funnel, max_gradients=7)
    assert outcome.stop_reason == "budget"
    assert outcome.num_gradients == 7
    assert len(outcome.losses) <= 7
    assert math.isfinite(outcome.elbo)
    assert bool(torch.isfinite(loc).all())


def test_same_seed_same_bits() -> None:
    state = torch.get_rng_state()
    first, loc, scale = solve(funnel, seed=5)
    second, loc_again, scale_again = solve(funnel, seed=5)
    assert torch.equal(loc, loc_again)
    assert torch.equal(scale, scale_again)
    assert first.losses == second.losses
    assert torch.equal(state, torch.get_rng_state())
    _, other, _ = solve(funnel, seed=6)
    assert not torch.equal(loc, other)


# -- several starts at once ---------------------------------------------------------------------


def two_modes(y):
    weight = pyro.sample("weight", dist.Beta(5.0, 5.0))
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        logits = torch.stack([dist.Normal(m, 1.0).log_prob(y) for m in loc], -1)
        mixed = torch.logaddexp(weight.log() + logits[:, 0], (-weight).log1p() + logits[:, 1])
        pyro.factor("y", mixed)


def test_starts_in_lockstep_end_where_each_would_alone() -> None:
    y = torch.cat([torch.randn(30) - 3.0, torch.randn(30) + 3.0])
    guide = AutoMeanField(two_modes).setup(y)
    log_joint = LogJoint(two_modes, (y,))
    before = [p.detach().clone() for p in guide.flat_params()]
    seeds = [0, 1, 2, 3]
    found = solve_from_many(log_joint, guide, seeds, reports=[silent] * 4)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.flat_params(), strict=True))
    assert log_joint._value_and_grad.num_captures == 1
    for k, (outcome, (loc, _)) in enumerate(found):
        alone, expected, scale = solve(two_modes, y, seed=seeds[k], disperse=k > 0)
        assert outcome.converged == alone.converged
        assert float(((loc - expected) / scale).abs().max()) < 1e-4
    swapped = {bool(loc[1] < loc[2]) for _, (loc, _) in found}
    assert swapped == {True, False}  # labels may be swapped, and dispersed starts find both


def test_starts_in_lockstep_run_the_model_in_one_thread_at_a_time() -> None:
    running = threading.Lock()
    clashes = []

    def slow(y):
        if not running.acquire(blocking=False):
            clashes.append(threading.current_thread().name)
            running.acquire()
        try:
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
            time.sleep(0.01)  # long enough for other threads to come in
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        finally:
            running.release()

    y = torch.tensor(1.0)
    found = solve_from_many(
        LogJoint(slow, (y,)), AutoMeanField(slow).setup(y), range(8), reports=[silent] * 8
    )
    assert all(outcome.converged for outcome, _ in found)
    assert not clashes


def test_members_of_a_lockstep_may_ask_for_unlike_numbers_of_rows() -> None:
    def job(rows):
        def ask(evaluate):
            z = torch.arange(float(rows))[:, None]
            return [evaluate(z + i) for i in range(3)]

        return ask

    counts = [1, 4, 2]
    for rows, answers in zip(
        counts, run_in_lockstep(lambda z: (z.sum(-1), 2 * z), [job(n) for n in counts]), strict=True
    ):
        for i, (value, gradient) in enumerate(answers):
            expected = torch.arange(float(rows)) + i
            assert torch.equal(value, expected)
            assert torch.equal(gradient, 2 * expected[:, None])


def test_interrupt_ends_every_start() -> None:
    def stop(progress):
        if progress.gradients == 20:
            raise KeyboardInterrupt

    results = run_in_lockstep(
        lambda z: (z.sum(-1), z), [lambda f: f(torch.ones(2, 3))[0].sum() for _ in range(3)]
    )
    assert [float(r) for r in results] == [6.0, 6.0, 6.0]
    guide = AutoMeanField(funnel).setup()
    found = solve_from_many(LogJoint(funnel), guide, [0, 1], reports=[stop, stop])
    for outcome, (loc, scale) in found:
        assert outcome.stop_reason == "interrupted"
        assert bool(torch.isfinite(loc).all() & (scale > 0).all())


def test_a_start_that_fails_does_not_hold_up_the_others() -> None:
    def fail(evaluate):
        evaluate(torch.ones(1, 1))
        raise ModelError("no start")

    def succeed(evaluate):
        return [float(evaluate(torch.full((1, 1), float(i)))[0]) for i in range(5)]

    results = run_in_lockstep(lambda z: (z.sum(-1), z), [succeed, fail, succeed])
    assert results[0] == results[2] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert isinstance(results[1], ModelError)


def test_an_interrupt_inside_the_density_reaches_all_and_hangs_nobody() -> None:
    calls = []

    def density(z):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return z.sum(-1), z

    def job(evaluate):
        return [float(evaluate(torch.ones(1, 1))[0]) for _ in range(3)]

    results = run_in_lockstep(density, [job, job])
    assert all(isinstance(r, KeyboardInterrupt) for r in results)


def test_guides_locations_are_the_start() -> None:
    """The one mode that the guide begins at is the one that is found."""
    y = torch.cat([torch.randn(30) - 3.0, torch.randn(30) + 3.0])
    signs = []
    for first in (-3.0, 3.0):
        start = {"loc": torch.tensor([first, -first]), "weight": torch.tensor(0.5)}
        guide = AutoMeanField(two_modes, init_loc_fn=lambda site, s=start: s[site["name"]]).setup(y)
        solve_deterministic(LogJoint(two_modes, (y,)), guide)
        signs.append(float(guide.locs.loc[0].detach()) * first > 0)
    assert signs == [True, True]
