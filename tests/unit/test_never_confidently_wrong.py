"""Posteriors that tempt a fit by forward KL to be confident and wrong, each with exact moments.

A fit may end on its budget; if it says that it has converged, means and sds are right.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_mf import ConvergenceWarning, ForwardKL, fit

Target = tuple[Callable[[], Any], Tensor, Tensor]
LARGEST_ERROR = 0.1  # the default tolerance: four standard errors of means, in sds, and of sds


def flat(size: int, log_density: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        real = constraints.independent(constraints.real, 1)
        z = pyro.sample("z", dist.ImproperUniform(real, (), (size,)))
        pyro.factor("density", log_density(z))

    return model


def two_modes(size: int, shares: Any, means: Any, sds: Any, *, is_prior: bool = False) -> Target:
    share, mean, sd = (torch.tensor(x, dtype=torch.float64) for x in (shares, means, sds))
    parts = dist.Normal(mean[:, None].expand(2, size), sd[:, None]).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(share), parts)
    overall = float(share @ mean)
    overall_sd = math.sqrt(float(share @ (sd.square() + (mean - overall).square())))
    moments = torch.full((size,), overall), torch.full((size,), overall_sd)
    if is_prior:
        return lambda: pyro.sample("z", mixture), *moments
    return flat(size, mixture.log_prob), *moments


def student_t(df: float) -> Target:
    density = dist.StudentT(torch.tensor(df, dtype=torch.float64))
    sd = torch.full((1,), math.sqrt(df / (df - 2.0)))
    return flat(1, lambda z: density.log_prob(z).sum()), torch.zeros(1), sd


def banana(bend: float) -> Target:
    def log_density(z: Tensor) -> Tensor:
        return -0.5 * ((z[0] / 10.0) ** 2 + (z[1] - bend * (z[0] ** 2 - 100.0)) ** 2)

    sd = torch.tensor([10.0, math.sqrt(1.0 + bend**2 * 2e4)])
    return flat(2, log_density), torch.zeros(2), sd


def funnel(size: int, sd: float) -> Target:
    def log_density(z: Tensor) -> Tensor:
        rest = -0.5 * (z[1:] * (-z[0] / 2).exp()).square() - z[0] / 2
        return rest.sum() - 0.5 * (z[0] / sd) ** 2

    sds = torch.full((size,), math.exp(sd * sd / 4))
    sds[0] = sd
    return flat(size, log_density), torch.zeros(size), sds


TARGETS: dict[str, Target] = {
    "equal modes": two_modes(1, [0.5, 0.5], [-6.0, 6.0], [1.0, 1.0]),
    "equal modes, 10 latents": two_modes(10, [0.5, 0.5], [-3.0, 3.0], [1.0, 1.0]),
    "modes of unequal widths": two_modes(3, [0.3, 0.7], [-6.0, 6.0], [0.5, 2.0], is_prior=True),
    "a small mode": two_modes(1, [0.9, 0.1], [0.0, 8.0], [1.0, 1.0]),
    "wide under narrow": two_modes(5, [0.5, 0.5], [0.0, 0.0], [0.3, 3.0]),
    "Student-t 2.5": student_t(2.5),
    "Student-t 3": student_t(3.0),
    "banana": banana(0.03),
    "funnel": funnel(10, 1.0),
    "wide funnel": funnel(10, 2.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", TARGETS)
def test_what_has_converged_is_right(name: str, seed: int) -> None:
    model, mean, sd = TARGETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = fit(model, objective=ForwardKL(backend="graph"), seed=seed)
    if not result.converged:
        assert result.message
        return
    loc, scale = (p.detach() for p in result.guide.flat_params())
    assert float(((loc - mean) / sd).abs().max()) < LARGEST_ERROR, str(result)
    assert float((scale / sd).log().abs().max()) < LARGEST_ERROR, str(result)
