"""The stochastic solver: identities of its parts, exact optima, faults, resuming."""

import io
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_mf as mf
from pyro_mf._errors import ImproperWarning, ModelError, NonFiniteError
from pyro_mf.solvers.leaves import Leaves
from pyro_mf.solvers.noisy_loss import NoisyLoss
from pyro_mf.solvers.steps import Steps
from pyro_mf.solvers.stochastic import solve_stochastic
from pyro_mf.solvers.units import Units, guide_information

PRECISION = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.2], [0.0, 0.2, 1e4]], dtype=torch.float64)
LOC = torch.tensor([1.0, -2.0, 100.0], dtype=torch.float64)
DATA = torch.linspace(-1.0, 1.0, 40, dtype=torch.float64)


def gaussian():
    pyro.sample("z", dist.MultivariateNormal(LOC, precision_matrix=PRECISION))


def subsampled(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=20) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def local(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=20) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def empirical_bayes(x):
    tau = pyro.param("tau", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, tau))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def hand_written(x):
    loc = pyro.param("loc", torch.zeros(len(x)))
    scale = pyro.param("scale", 0.1 * torch.ones(len(x)), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale))


# -- parts -------------------------------------------------------------------------------------


def test_steps_do_not_depend_on_the_loss_unit():
    like = torch.zeros(3)
    one, other = Steps(like), Steps(like)
    for _ in range(50):
        gradient = torch.randn(3)
        a = one.direction(gradient, searching=True)
        b = other.direction(1024.0 * gradient, searching=True)
        torch.testing.assert_close(a, b)


def test_steps_of_skewed_noise_stay_where_the_mean_gradient_vanishes():
    # Exponential noise of mean zero: ours is zero within 4 standard errors. Adam's normalisation by
    # a second moment that contains the gradient is the control.
    generator = torch.Generator().manual_seed(1)
    noise = torch.empty(4000, 200).exponential_(generator=generator) - 1.0
    steps, square, ours, adams = Steps(noise[0]), torch.ones(200), [], []
    for t, gradient in enumerate(noise):
        move = steps.direction(gradient, searching=False)
        square.lerp_(gradient.square(), 0.01)
        if t >= 1000:
            ours.append(move.mean())
            adams.append((gradient / square.sqrt()).mean())
    ours, adams = torch.stack(ours), torch.stack(adams)
    se = 1.0 / math.sqrt(3000 * 200)
    assert abs(float(ours.mean())) < 4 * se
    assert float(adams.mean()) < -5 * se


def test_parameters_without_a_gradient_rest():
    steps = Steps(torch.zeros(2))
    for _ in range(30):
        move = steps.direction(torch.tensor([1.0, 0.0]), searching=True)
        assert move[1] == 0
    assert steps.boost[0] > 10
    assert steps.boost[1] == 1


@pytest.mark.parametrize("guide_class", [mf.AutoMeanField, AutoNormal])
def test_units_are_the_standard_deviation_and_that_of_a_log_scale(guide_class):
    model = gaussian
    guide = guide_class(model, init_scale=0.5)
    guide()
    loss = NoisyLoss(Trace_ELBO(), model, guide, (), {})
    leaves = loss.find_leaves()
    information = guide_information(guide, leaves, (), {}, 256)
    units = leaves.split(information.rsqrt())
    slope = 1 - math.exp(-0.5)  # of softplus where it is 0.5
    # relative se of a squared unit: sqrt(2 / S) and sqrt(14 / S), S = 256; z = 5
    for name, unit in zip(leaves.names, units, strict=True):
        is_loc = "loc" in name
        expected = 0.5 if is_loc else 0.5 / math.sqrt(2) / slope
        se = math.sqrt((2 if is_loc else 14) / 256) / 2
        assert bool(((unit / expected).log().abs() < 5 * se).all())


def test_the_information_of_a_local_latent_does_not_depend_on_the_minibatch():
    pyro.set_rng_seed(1)

    def guide(x):
        scale = pyro.param("s", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), scale))
        shared = pyro.param("shared", torch.tensor(0.0))
        with pyro.plate("data", len(x), subsample_size=20):
            pyro.sample("z", dist.Normal(shared, 2.0))

    guide(DATA)
    loss = NoisyLoss(Trace_ELBO(), local, guide, (DATA,), {})
    leaves = loss.find_leaves()
    information = guide_information(guide, leaves, (DATA,), {}, 200)
    by_name = dict(zip(leaves.names, leaves.split(information), strict=True))
    se = math.sqrt(2 / 200)
    assert abs(float(by_name["shared"]) / (40 / 4) - 1) < 5 * se
    assert abs(float(by_name["m"]) * 0.25 - 1) < 5 * se


def test_a_parameter_without_density_is_measured_by_the_loss():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoDelta(model)
    guide(DATA)
    loss = NoisyLoss(Trace_ELBO(), model, guide, (DATA,), {})
    leaves = loss.find_leaves()
    units = Units(loss, leaves)
    x = leaves.flatten()
    units.measure(x, num_draws=2, weight=1.0, curvature=True)
    torch.testing.assert_close(units.values, torch.tensor([40.25]).rsqrt())
    assert torch.equal(leaves.flatten(), x)


def test_leaves_are_those_that_svi_would_optimise():
    pyro.param("unused", torch.zeros(3))
    loss = NoisyLoss(mf.ReverseKL(), empirical_bayes, hand_written, (DATA,), {})
    leaves = loss.find_leaves()
    assert leaves.names == ("loc", "scale", "tau")
    assert leaves.size == 81
    assert leaves.describe(40) == "scale[0]"
    assert leaves.describe(80) == "tau"
    with pytest.raises(IndexError):
        leaves.describe(81)
    leaves.write(torch.arange(81.0))
    assert torch.equal(leaves.flatten(), torch.arange(81.0))
    assert isinstance(leaves, Leaves)


# -- exact optima ------------------------------------------------------------------------------


def test_the_optimum_of_a_gaussian_whose_scales_differ_and_that_is_far_away():
    # Optimum: the exact means, sds A_ii ** -1/2; the third is 10,000 sds from the start.
    guide, seen = mf.AutoMeanField(gaussian), []
    outcome = solve_stochastic(gaussian, guide, report=seen.append)
    loc, scale = (p.detach() for p in guide.flat_params())
    sd = PRECISION.diagonal().rsqrt()
    assert outcome.converged
    assert outcome.num_gradients < 4000
    assert float(((loc - LOC) / sd).abs().max()) < 0.1
    assert float((scale / sd).log().abs().max()) < 0.1
    d = PRECISION.diagonal().sqrt()
    evidence_gap = -0.5 * float((PRECISION / d[:, None] / d).logdet())
    assert abs(-outcome.elbo - evidence_gap) < 5 * outcome.elbo_se + 0.01
    assert outcome.num_gradients == len(outcome.losses)
    assert outcome.seconds.keys() == {"capture", "optimise", "evaluate"}
    assert seen[0].phase == "search"
    assert seen[-1].phase.startswith("averaging")
    assert seen[-1].gradients == outcome.num_gradients
    assert abs(seen[-1].elbo - outcome.elbo) < 5 * (seen[-1].elbo_se + outcome.elbo_se)


def test_a_subsampled_plate():
    guide = mf.AutoMeanField(subsampled)
    outcome = solve_stochastic(subsampled, guide, (DATA,), tolerance=0.2)
    assert outcome.converged, outcome.message
    (loc,), (scale,) = (p.tolist() for p in guide.flat_params())
    assert abs(loc) < 0.2 * 41**-0.5
    assert abs(math.log(scale * 41**0.5)) < 0.2


def test_a_learnable_prior_scale_and_a_guide_written_by_hand():
    # Empirical Bayes: tau^2 = mean(x^2) - 1, known to 1 / sqrt(2 N) of its logarithm.
    x = torch.tensor([2.1, -3.0, 0.4, 1.7, -2.2, 4.0, -0.3, 1.1])
    guide = mf.AutoMeanField(empirical_bayes)
    outcome = solve_stochastic(empirical_bayes, guide, (x,))
    tau2 = float(x.square().mean()) - 1
    assert outcome.converged
    unit = 1 / math.sqrt(2 * 8) * (1 + tau2) / tau2
    tau = pyro.param("tau").item()
    assert abs(math.log(tau / tau2**0.5)) < 0.1 * unit
    sd = (tau2 / (1 + tau2)) ** 0.5
    exact = x * tau2 / (1 + tau2)
    error = (guide.locs["z"].detach() - exact) / sd
    assert float(error.abs().max()) < 0.1


def test_a_point_estimate_by_a_stock_objective():
    def model():
        pyro.sample("z", dist.Normal(30.0, 0.01))

    guide = AutoDelta(model)
    outcome = solve_stochastic(model, guide, objective=Trace_ELBO())
    assert outcome.converged
    assert abs(guide.median()["z"].item() - 30.0) < 1e-5


@pytest.mark.slow
def test_errors_stay_below_the_tolerance_over_seeds():
    sd = PRECISION.diagonal().rsqrt()
    for seed in range(20):
        pyro.clear_param_store()
        guide = mf.AutoMeanField(gaussian)
        outcome = solve_stochastic(gaussian, guide, seed=seed)
        loc, scale = (p.detach() for p in guide.flat_params())
        assert outcome.converged
        assert float(((loc - LOC) / sd).abs().max()) < 0.1
        assert float((scale / sd).log().abs().max()) < 0.1


@pytest.mark.slow
def test_local_latents_of_a_subsampled_plate():
    guide = mf.AutoMeanField(local)
    outcome = solve_stochastic(local, guide, (DATA,))
    assert outcome.converged
    # means are the exact posterior's, (x + mu / 4) / 1.25 with mu = 0 by symmetry
    sd = 5**-0.5
    loc, scale = guide.locs["z"].detach(), guide.scales["z"].detach()
    assert float(((loc - 0.8 * DATA) / sd).abs().max()) < 0.15
    assert float((scale / sd).log().abs().max()) < 0.15


# -- stopping, faults, state -------------------------------------------------------------------


@pytest.mark.usefixtures("few_evaluations")
def test_same_seed_same_bits_and_the_program_s_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    guides = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        guides.append(mf.AutoMeanField(subsampled))
        outcome = solve_stochastic(subsampled, guides[-1], (DATA,), seed=seed, max_steps=40)
        assert outcome.stop_reason == "budget"
        assert "max_steps=40" in outcome.message
    one, same, other = (torch.cat(guide.flat_params()) for guide in guides)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.usefixtures("few_evaluations")
def test_a_run_goes_on_from_its_state_with_the_same_bits():
    def run(steps, state=None):
        pyro.clear_param_store()
        guide = mf.AutoMeanField(subsampled)
        outcome = solve_stochastic(subsampled, guide, (DATA,), max_steps=steps, state=state)
        return outcome, torch.cat(guide.flat_params())

    def restored(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    whole, expected = run(300)
    part, _ = run(77)  # in the search
    part, _ = run(250 - 77, restored(part.state))  # in the averaging
    rest, found = run(300 - 250, restored(part.state))
    assert torch.equal(found, expected)
    assert rest.losses == whole.losses
    assert rest.elbo == whole.elbo


@pytest.mark.usefixtures("few_evaluations")
@pytest.mark.usefixtures("few_evaluations")
def test_deterministic_sites_of_a_subsampled_fit_are_refused_by_their_name():
    with pytest.warns(mf.ConvergenceWarning):
        result = mf.fit(subsampled, (DATA,), max_gradients=20)
    assert list(result.summary().index) == ["mu"]
    with pytest.raises(ModelError, match=r"summary\(deterministic=True\) .* needs the full data"):
        result.summary(deterministic=True)


def test_a_state_of_another_guide_of_the_class_is_taken():
    first, second = mf.AutoMeanField(gaussian), mf.AutoMeanField(gaussian)
    part, again = (solve_stochastic(gaussian, guide, max_steps=5) for guide in (first, second))
    assert part.state["names"] != again.state["names"]
    rest = solve_stochastic(gaussian, second, max_steps=5, state=part.state)
    assert rest.losses[:5] == part.losses
    assert len(rest.losses) == 10


def test_a_state_of_other_parameters_is_refused():
    state = solve_stochastic(gaussian, mf.AutoMeanField(gaussian), max_steps=5).state
    with pytest.raises(ValueError, match="the state belongs to parameters"):
        solve_stochastic(subsampled, mf.AutoMeanField(subsampled), (DATA,), state=state)


@pytest.mark.usefixtures("few_evaluations")
@pytest.mark.parametrize("at", [3, 900])
def test_an_interrupt_keeps_the_best_so_far(at):
    calls = 0

    class Interrupted(mf.ReverseKL):
        def loss_and_grads(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return super().loss_and_grads(*args, **kwargs)

    guide = mf.AutoMeanField(subsampled)
    outcome = solve_stochastic(subsampled, guide, (DATA,), objective=Interrupted(8))
    assert outcome.stop_reason == "interrupted"
    assert len(outcome.losses) == at - 2  # one call finds the parameters
    assert math.isfinite(outcome.elbo)
    if at > 500:
        assert abs(guide.locs["mu"].item()) < 0.5 * 41**-0.5


@pytest.mark.usefixtures("few_evaluations")
def test_stock_svi_goes_on_after_a_fit():
    guide = mf.AutoMeanField(subsampled)
    solve_stochastic(subsampled, guide, (DATA,), max_steps=50)
    stored = pyro.get_param_store()
    assert torch.equal(stored["AutoMeanField.loc"], guide.flat_params()[0])
    assert all(leaf.grad is None for leaf in guide.flat_leaves())
    svi = SVI(subsampled, guide, pyro.optim.Adam({"lr": 1e-3}), mf.ReverseKL(8))
    assert math.isfinite(svi.step(DATA))


def test_an_improper_posterior_is_told():
    def model(x):
        pyro.sample("flat", dist.ImproperUniform(constraints.real, (), ()))
        subsampled(x)

    guide = mf.AutoMeanField(model)
    with pytest.warns(ImproperWarning):
        outcome = solve_stochastic(model, guide, (DATA,))
    assert outcome.stop_reason == "diverged"
    assert "falls without bound" in outcome.message
    assert "AutoMeanField.scale[0]" in outcome.message
    assert all(bool(torch.isfinite(p).all()) for p in guide.flat_params())


@pytest.mark.usefixtures("few_evaluations")
def test_draws_without_a_finite_density_are_passed_over():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(z > -1.0, 0.0, torch.nan) * z - 20 * z.square())

    guide = mf.AutoMeanField(model, init_scale=1.0)
    outcome = solve_stochastic(model, guide, max_steps=400)
    assert math.isfinite(outcome.elbo)
    assert any("not finite" in note for note in outcome.notes)


@pytest.mark.parametrize("objective", [None, Trace_ELBO()])
def test_a_density_that_is_nowhere_finite_is_refused(objective):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("impossible", z - torch.inf)

    guide = mf.AutoMeanField(model)
    with pytest.raises(NonFiniteError, match="at the start, at 10 of 10 tries"):
        solve_stochastic(model, guide, objective=objective)


@pytest.mark.usefixtures("few_evaluations")
def test_a_loss_that_cannot_be_followed_diverges_with_the_best_parameters():
    class Breaks(mf.ReverseKL):
        calls = 0

        def loss_and_grads(self, *args, **kwargs):
            self.calls += 1
            if self.calls > 20:
                raise NonFiniteError("no")
            return super().loss_and_grads(*args, **kwargs)

    guide = mf.AutoMeanField(gaussian)
    outcome = solve_stochastic(gaussian, guide, objective=Breaks(8))
    assert outcome.stop_reason == "diverged"
    assert "10 smaller learning rates did not help" in outcome.message
    assert len(outcome.notes) == 11
    assert math.isfinite(outcome.elbo)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1; got 0"),
        ({"max_steps": True}, "max_steps"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        solve_stochastic(gaussian, mf.AutoMeanField(gaussian), **settings)


def test_parameters_that_appear_during_the_run_are_refused():
    calls = 0

    def guide(x):
        nonlocal calls
        calls += 1
        loc = pyro.param(f"loc_{calls > 6}", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(loc, 1.0))

    with pytest.raises(ModelError, match=r"\['loc_True'\] were not there at the first step"):
        solve_stochastic(subsampled, guide, (DATA,))


def test_a_function_is_no_objective():
    with pytest.raises(TypeError, match="must have loss and loss_and_grads"):
        solve_stochastic(gaussian, mf.AutoMeanField(gaussian), objective=lambda *args: 0.0)


def test_a_guide_without_parameters_is_refused():
    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="touches no trainable parameter"):
        solve_stochastic(gaussian, guide, objective=Trace_ELBO())
