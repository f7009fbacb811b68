"""On a Gaussian posterior the deterministic solver and linear response have closed forms.

A target with precision A: the optimum's means are the posterior's, its variances 1 / A_dd, the gap
of the ELBO to the log evidence -1/2 log det of A scaled to unit diagonal, the linear response the
inverse of A, for any set of draws.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.guides import AutoMeanField
from pyro_mf.solvers.certificate import certify
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.linear_response import linear_response, response_of
from pyro_mf.solvers.minimise import descend, natural_gradient, polish


def covariance(size: int, rho: float = 0.7) -> torch.Tensor:
    """Correlation falling off with distance, scales over four orders of magnitude."""
    index = torch.arange(float(size))
    scale = 10.0 ** torch.linspace(-2.0, 2.0, size)
    return rho ** (index[:, None] - index).abs() * scale[:, None] * scale


def gaussian(size: int, rho: float = 0.7):
    def model() -> None:
        mean = 100.0 * torch.arange(1.0, size + 1)
        pyro.sample("z", dist.MultivariateNormal(mean, covariance(size, rho)))

    return model


def skewed() -> None:
    """A smooth target that is no Gaussian, with a log evidence of no interest."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("p", 3):
        b = pyro.sample("b", dist.Normal(a, (0.5 * a).exp()))
        pyro.sample("y", dist.Poisson(b.exp()), obs=torch.tensor([0.0, 2.0, 5.0]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_optimum_of_a_gaussian(seed) -> None:
    model, size = gaussian(5), 5
    guide = AutoMeanField(model).setup()
    outcome = solve_deterministic(LogJoint(model), guide, seed=seed)
    loc, scale = (p.detach() for p in guide.flat_params())
    truth = covariance(size)
    precision = torch.linalg.inv(truth)
    sd = truth.diagonal().sqrt()
    assert outcome.converged, outcome.message
    assert float(((loc - 100.0 * torch.arange(1.0, size + 1)) / sd).abs().max()) < 1e-5
    assert float((scale.square() * precision.diagonal() - 1.0).abs().max()) < 1e-6
    assert outcome.response is not None
    error = (outcome.response.covariance - truth) / (sd[:, None] * sd)
    assert float(error.abs().max()) < 1e-6
    root = precision.diagonal().sqrt()
    gap = -0.5 * torch.linalg.slogdet(precision / (root[:, None] * root)).logabsdet
    assert abs(outcome.elbo + float(gap)) < 4.0 * outcome.elbo_se  # log evidence 0, z = 4


@pytest.mark.parametrize("num_draws", [2, 6, 32])
def test_linear_response_of_a_gaussian_is_exact_for_any_draws(num_draws) -> None:
    """Even where two draws leave the scales far from the optimum over all draws."""
    size, log_joint = 4, LogJoint(gaussian(4))
    draws = fixed_draws(num_draws, size, seed=3)
    elbo = FixedDrawELBO(Blocks(log_joint), draws)
    truth = covariance(size)
    loc, log_scale = 100.0 * torch.arange(1.0, size + 1), truth.diagonal().sqrt().log() - 1.0
    x, _ = polish(elbo, descend(elbo, torch.cat([loc, log_scale])))
    response = linear_response(x[:size], elbo.curvature(x).hessian)
    sd = truth.diagonal().sqrt()
    assert float(((response.covariance - truth) / (sd[:, None] * sd)).abs().max()) < 1e-5


def test_wrong_covariance_is_seen() -> None:
    """The tolerance above would not pass the covariance of independent latents."""
    truth = covariance(4)
    sd = truth.diagonal().sqrt()
    wrong = torch.linalg.inv(truth).diagonal().reciprocal().diag()
    assert float(((wrong - truth) / (sd[:, None] * sd)).abs().max()) > 0.3


def test_one_natural_gradient_step_solves_independent_latents() -> None:
    size = 3
    elbo = FixedDrawELBO(Blocks(LogJoint(gaussian(size, 0.0))), fixed_draws(8, size))
    sd, mean = covariance(size, 0.0).diagonal().sqrt(), 100.0 * torch.arange(1.0, size + 1)
    start = torch.cat([mean + sd, sd.log() + 0.1])
    x = natural_gradient(elbo, start, max_steps=20, tolerance=1e-14)
    torch.testing.assert_close(x, torch.cat([mean, sd.log()]), atol=1e-5, rtol=1e-5)


def test_derivatives_of_the_objective() -> None:
    elbo = FixedDrawELBO(Blocks(LogJoint(skewed)), fixed_draws(32, 4))
    x = torch.cat([torch.linspace(-0.3, 0.4, 4), torch.linspace(-1.0, -0.2, 4)])
    step, value = 1e-5, lambda y: elbo.value_and_gradient(y)
    gradient = value(x)[1]
    hessian = elbo.curvature(x).hessian
    for d in range(8):
        move = torch.zeros(8)
        move[d] = step
        slope = (value(x + move)[0] - value(x - move)[0]) / (2 * step)
        assert abs(slope - float(gradient[d])) < 1e-7
        column = (value(x + move)[1] - value(x - move)[1]) / (2 * step)
        torch.testing.assert_close(hessian[d], column, atol=1e-6, rtol=1e-6)
    vector = torch.randn(8)
    torch.testing.assert_close(elbo.hessian_vector(x, vector), hessian @ vector, atol=1e-6, rtol=0)
    torch.testing.assert_close(elbo.pair_gradients(x).mean(0), gradient)
    assert elbo.estimate(x).elbo == pytest.approx(-value(x)[0], abs=1e-12)


def test_prices_theorem() -> None:
    """Over many draws, curvature from second derivatives is that from gradients: z = 4."""
    size = 4
    elbo = FixedDrawELBO(Blocks(LogJoint(skewed)), fixed_draws(4096, size))
    x = torch.cat([torch.linspace(-0.3, 0.4, size), torch.full((size,), -1.0)])
    by_gradient = (elbo.pair_gradients(x)[:, size:] + 1.0) * (-2.0 * x[size:]).exp()
    by_curvature = elbo.curvature(x).precision
    pairs = (by_curvature[:2048] + by_curvature[2048:]) / 2 - by_gradient
    error = pairs.std(0) / math.sqrt(len(pairs))
    assert bool((pairs.mean(0).abs() < 4.0 * error).all())


def test_sandwich_formula() -> None:
    """Predicted and observed scatter of the optimum over independent antithetic draws.

    With 60 optima a sd is known to 9 %; z = 4. Draws of ours scatter less.
    """
    size, blocks = 4, Blocks(LogJoint(skewed))
    generator = torch.Generator().manual_seed(0)
    found, predicted = [], []
    x = torch.cat([torch.zeros(size), torch.full((size,), -0.7)])
    for _ in range(60):
        half = torch.randn(32, size, generator=generator)
        elbo = FixedDrawELBO(blocks, torch.cat([half, -half]))
        x, curvature = polish(elbo, x)
        certificate = certify(elbo, x, curvature, elbo.estimate(x))
        found.append(x)
        predicted.append(certificate.noise)
    observed = torch.stack(found).std(0)
    ratio = observed / torch.stack(predicted).square().mean(0).sqrt()
    assert float((ratio - 1.0).abs().max()) < 4 * 0.09
    ours = []
    for seed in range(15):
        elbo = FixedDrawELBO(blocks, fixed_draws(64, size, seed=seed))
        ours.append(polish(elbo, x)[0])
    assert bool((torch.stack(ours).std(0)[:size] < observed[:size]).all())


def test_responses_of_chosen_latents_by_conjugate_gradients() -> None:
    model, size = gaussian(30, 0.9), 30
    guide = AutoMeanField(model).setup()
    log_joint = LogJoint(model)
    solve_deterministic(log_joint, guide)
    elbo = FixedDrawELBO(Blocks(log_joint), fixed_draws(32, size))
    loc, scale = (p.detach() for p in guide.flat_params())
    x = torch.cat([loc, scale.log()])
    chosen = torch.tensor([0, 7, 29])
    response = response_of(elbo, x, chosen)
    truth = covariance(size, 0.9)[chosen][:, chosen]
    sd = truth.diagonal().sqrt()
    assert float(((response.covariance - truth) / (sd[:, None] * sd)).abs().max()) < 1e-4
    torch.testing.assert_close(response.loc, loc[chosen])
