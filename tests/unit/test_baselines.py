"""NUTS on the captured density: exact posteriors, failures of the density, and bad input."""

import os
import signal
import time
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf._errors import ModelError
from pyro_mf.baselines import nuts as nuts_module
from pyro_mf.baselines import run_nuts
from pyro_mf.baselines.draws import Settings, largest_block
from pyro_mf.baselines.nutpie_nuts import sample_nutpie
from pyro_mf.baselines.pyro_nuts import sample_pyro
from pyro_mf.baselines.target import Target

SAMPLERS = {"pyro": sample_pyro, "nutpie": sample_nutpie}
BACKENDS = [
    "pyro",
    pytest.param(
        "nutpie",
        marks=pytest.mark.skipif(find_spec("nutpie") is None, reason="nutpie is not installed"),
    ),
]
QUICK = {"num_samples": 30, "warmup_steps": 30, "num_chains": 2}
Z = 5.0  # two-sided false-alarm rate of 6e-7 per comparison, were the errors exactly normal


def standard_error(draws, batch=50):
    """Monte Carlo error of the mean of (chains, draws), from the means of batches."""
    means = np.asarray(draws).reshape(-1, batch).mean(1)
    return means.std(ddof=1) / np.sqrt(len(means))


def in_standard_errors(draws, truth):
    return abs(np.asarray(draws).mean() - truth) / standard_error(draws)


def settings(**changes):
    given = {
        "num_samples": 100,
        "warmup_steps": 100,
        "num_chains": 2,
        "target_accept_prob": 0.8,
        "max_tree_depth": 10,
        "seed": 1,
        "progress": False,
    }
    return Settings(**(given | changes))


class Gaussian:
    """A standard normal density, and what goes wrong with it where z[0] > 1.

    At call number ``interrupt_at`` the user presses Ctrl-C.
    """

    def __init__(self, trouble=None, pause=0.0, interrupt_at=None):
        self.trouble = trouble
        self.pause = pause
        self.interrupt_at = interrupt_at
        self.calls = 0

    def value_and_grad(self, z):
        self.calls += 1
        if self.calls == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(self.pause)
        value, gradient = -0.5 * (z**2).sum(-1), -z
        if self.trouble and z[0, 0] > 1:
            if isinstance(self.trouble, Exception):
                raise self.trouble
            value, gradient = self.trouble(value, gradient)
        return value, gradient


TROUBLES = {
    "NaN value": lambda value, gradient: (value * torch.nan, gradient),
    "minus infinity": lambda value, gradient: (value - torch.inf, gradient),
    "NaN gradient": lambda value, gradient: (value, gradient * torch.nan),
    "not positive definite": torch.linalg.LinAlgError("not positive definite"),
    "outside the support": ValueError("Expected value argument to be within the support"),
}


def gamma_poisson(counts):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


def normal_normal(x):
    loc = pyro.sample("loc", dist.Normal(1.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conjugate_normal_posterior(backend):
    """1000 draws see a shift of the mean of about a quarter of a posterior sd."""
    x = torch.tensor([0.3, 1.1, -0.2, 0.7])
    precision = 1 / 4.0 + len(x) / 0.25
    mean = (1.0 / 4.0 + x.sum().item() / 0.25) / precision

    nuts = run_nuts(
        normal_normal, (x,), num_samples=500, warmup_steps=200, num_chains=2, backend=backend
    )

    loc = nuts.samples["loc"]
    assert in_standard_errors(loc, mean) < Z
    assert in_standard_errors((loc - mean) ** 2, 1 / precision) < Z


@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_posterior_on_a_constrained_site(backend):
    counts = torch.tensor([0.0, 1.0, 3.0])
    posterior = torch.distributions.Gamma(2.0 + counts.sum(), 1.0 + len(counts))
    log_mean = (torch.digamma(posterior.concentration) - posterior.rate.log()).item()

    nuts = run_nuts(
        gamma_poisson, (counts,), num_samples=500, warmup_steps=200, num_chains=2, backend=backend
    )

    rate = nuts.samples["rate"]
    assert in_standard_errors(rate, posterior.mean.item()) < Z
    assert in_standard_errors((rate - posterior.mean) ** 2, posterior.variance.item()) < Z
    assert in_standard_errors(rate.log(), log_mean) < Z


def test_control_a_density_without_its_jacobian_is_noticed():
    """Without the Jacobian of z = log(rate) the Gamma(6, 4) posterior would be a Gamma(5, 4)."""

    class NoJacobian:
        def value_and_grad(self, z):
            return (5 * z - 4 * z.exp()).sum(-1), 5 - 4 * z.exp()

    draws = sample_pyro(NoJacobian(), torch.full((2, 1), -0.5), settings(num_samples=750))
    rate = draws.z[..., 0].exp()
    assert in_standard_errors(rate, 5 / 4) < Z
    assert in_standard_errors(rate, 6 / 4) > Z


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_describes_itself(backend):
    nuts = run_nuts(normal_normal, (torch.ones(4),), **QUICK, backend=backend, seed=3)

    assert nuts.z.shape == (2, 30, 1)
    assert nuts.samples["loc"].shape == (2, 30)
    assert set(nuts.seconds) == {"capture", "warmup", "sample"}
    assert all(seconds > 0 for seconds in nuts.seconds.values())
    assert {"lp", "diverging", "step_size", "tree_depth", "n_steps", "acceptance_rate"} <= set(
        nuts.stats
    )
    assert all(values.shape == (2, 30) for values in nuts.stats.values())
    assert nuts.stats["diverging"].dtype == bool
    expected = nuts.log_joint(nuts.z)
    torch.testing.assert_close(torch.from_numpy(nuts.stats["lp"]), expected)
    assert ((nuts.stats["acceptance_rate"] >= 0) & (nuts.stats["acceptance_rate"] <= 1)).all()
    assert (nuts.stats["n_steps"] >= 1).all()
    assert repr(nuts).startswith(f"NUTSResult({backend}: 2 chains x 30 draws of 1 latents, ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_draws_other_seed_other_draws(backend):
    run = [
        run_nuts(normal_normal, (torch.ones(4),), **QUICK, backend=backend, seed=seed).z
        for seed in (7, 7, 8)
    ]
    assert torch.equal(run[0], run[1])
    assert not torch.equal(run[0], run[2])
    assert not torch.equal(run[0][0], run[0][1]), "both chains are the same"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_random_state_is_left_alone(backend):
    before = torch.get_rng_state()
    run_nuts(normal_normal, (torch.ones(4),), **QUICK, backend=backend)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_a_density_that_fails_somewhere_diverges_there(backend, trouble):
    run = settings(num_samples=40, warmup_steps=40, max_tree_depth=5)
    draws = SAMPLERS[backend](Gaussian(trouble), torch.full((2, 3), -0.5), run)

    assert draws.z.shape == (2, 40, 3)
    assert torch.isfinite(draws.z).all()
    assert (draws.z[..., 0] <= 1).all()
    assert draws.stats["diverging"].any()
    assert np.isfinite(draws.stats["lp"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mistake_in_the_density_is_not_taken_for_a_divergence(backend):
    with pytest.raises(TypeError, match="a bug"):
        SAMPLERS[backend](Gaussian(TypeError("a bug")), torch.full((2, 3), -0.5), settings())


@pytest.mark.skipif(find_spec("nutpie") is None, reason="nutpie is not installed")
def test_nutpie_that_cannot_start_says_so():
    with pytest.raises(ModelError, match="nutpie could not start: .* try backend='pyro'"):
        sample_nutpie(Gaussian(), torch.zeros(2, 3), settings())


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_densities_stay_float32(backend):
    starts = torch.full((2, 3), -0.5, dtype=torch.float32)
    run = settings(num_samples=10, warmup_steps=10)
    assert SAMPLERS[backend](Gaussian(), starts, run).z.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupt_keeps_what_was_drawn(backend):
    run = settings(num_samples=100_000, warmup_steps=20, num_chains=3)
    density = Gaussian(pause=1e-4, interrupt_at=2000)
    draws = SAMPLERS[backend](density, torch.full((3, 2), -0.5), run)

    assert draws.interrupted
    assert draws.z.shape[0] == 1, "the other chains had not begun"
    assert 0 < draws.z.shape[1] < 100_000
    assert torch.isfinite(draws.z).all()
    assert all(values.shape == draws.z.shape[:2] for values in draws.stats.values())
    assert np.isfinite(draws.stats["lp"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupt_before_the_first_draw_is_an_interrupt(backend):
    run = settings(warmup_steps=100_000)
    with pytest.raises(KeyboardInterrupt):
        SAMPLERS[backend](Gaussian(pause=1e-4, interrupt_at=500), torch.full((2, 2), -0.5), run)


def test_largest_block_prefers_more_draws_to_more_chains():
    assert largest_block([10, 10, 10]) == ([0, 1, 2], 10)
    assert largest_block([10, 10, 3]) == ([0, 1], 10)
    assert largest_block([4, 0, 9]) == ([2], 9)
    assert largest_block([0, 0]) == ([0], 0)


def test_target_counts_evaluations_and_reports_failures_as_nan():
    target = Target(Gaussian(TROUBLES["NaN gradient"]))
    value, gradient = target(torch.tensor([0.5, 1.0]))
    assert (value.item(), gradient.tolist()) == (-0.625, [-0.5, -1.0])
    value, gradient = target(torch.tensor([2.0, 1.0]))
    assert torch.isnan(value)
    assert gradient.tolist() == [0.0, 0.0]
    assert target.evaluations == 2


def no_latents(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def subsampled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])


def impossible(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("never", loc - torch.inf)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (no_latents, "no latent site"),
        (subsampled, "subsamples plate 'data'"),
        (impossible, "starting points"),
    ],
)
def test_models_that_cannot_be_sampled(model, match):
    with pytest.raises(ModelError, match=match):
        run_nuts(model, (torch.ones(4),), **QUICK)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1; got 0"),
        ({"num_samples": 10.0}, "num_samples must be an integer"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer of at least 1"),
        ({"num_chains": True}, "num_chains must be an integer"),
        ({"max_tree_depth": 0}, "max_tree_depth must be an integer"),
        ({"target_accept_prob": 1.0}, "target_accept_prob must lie strictly between 0 and 1"),
        ({"seed": -1}, "seed must be"),
        ({"backend": "stan"}, "backend must be 'auto', 'nutpie' or 'pyro'; got 'stan'"),
    ],
)
def test_settings_out_of_range(changes, match):
    with pytest.raises(ValueError, match=match):
        run_nuts(normal_normal, (torch.ones(4),), **(QUICK | changes))


def test_nutpie_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(nuts_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_mf\[nutpie\]'"):
        run_nuts(normal_normal, (torch.ones(4),), **QUICK, backend="nutpie")
    assert run_nuts(normal_normal, (torch.ones(4),), **QUICK, backend="auto").backend == "pyro"
