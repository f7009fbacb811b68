r"""Chains that start at an approximation's draws and move: where they go, it is wrong.

A few transitions that leave the posterior invariant bring draws nearer to it. What they move by, on
average, is a lower bound on the error of the approximation, whether or not they have arrived; no
movement proves nothing unless they have forgotten where they began.

References:
    Wang, Kasprzak and Huggins (2023), A Targeted Accuracy Diagnostic for Variational
    Approximations, https://arxiv.org/abs/2302.12419
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Evaluate
from pyro_mf.kernels import Metric, ParallelHMC

_NUM_WARM_UP, _NUM_ITERATIONS = 40, 20
FALSE_ALARM = 0.01  # probability that some latent is found to drift where none does


@dataclass(frozen=True, eq=False)
class Drift:
    """How far chains moved from where they began; tensors of shape ``(D,)``.

    Args:
        z: Where they are, shape ``(N, D)``.
        mean: Change of the means, in sds of where they are.
        mean_bound: At least by how much the mean is wrong, in these sds; 0 where nothing moved for
            sure. All bounds hold together but for one time in a hundred.
        log_sd: Change of the log sds.
        log_sd_bound: At least by how much the log sd is wrong.
        memory: Correlation of where chains are with where they began.
        num_gradients: Calls of the density, each with N rows.
    """

    z: Tensor
    mean: Tensor
    mean_bound: Tensor
    log_sd: Tensor
    log_sd_bound: Tensor
    memory: Tensor
    num_gradients: int


def measure_drift(
    density: Evaluate, z: Tensor, metric: Metric, *, generator: torch.Generator
) -> Drift | None:
    """Let chains run from an approximation's draws, and test whether they moved.

    The tests are paired: chain by chain, t for the mean, and for the sd the influence function of
    its logarithm. Bonferroni's correction makes them hold together.

    Args:
        density: The log density.
        z: Independent draws of the approximation, shape ``(N, D)``, at least 16.
        metric: Covariance that steps are taken by.
        generator: Source of randomness.

    Returns:
        The movement; ``None`` where less than half of the draws have a density to start from.

    Raises:
        ValueError: If there are fewer than 16 draws.

    Example:
        >>> def density(z):  # a standard Normal
        ...     return -0.5 * z.square().sum(-1), -z
        >>> generator = torch.Generator().manual_seed(0)
        >>> metric = Metric(torch.ones(2))
        >>> exact = measure_drift(density, torch.randn(256, 2), metric, generator=generator)
        >>> exact.mean_bound.max(), exact.log_sd_bound.max()
        (tensor(0.), tensor(0.))
        >>> wrong = measure_drift(density, torch.randn(256, 2) + 3.0, metric, generator=generator)
        >>> bool((wrong.mean_bound > 2.0).all())
        True
    """
    if len(z) < 16:
        raise ValueError(f"measure_drift needs at least 16 draws; got {len(z)}. Draw more.")
    has_density = torch.isfinite(density(z)[0])
    if int(has_density.sum()) < max(16, len(z) // 2):
        return None
    began = z[has_density]
    try:
        chains = ParallelHMC(density, began, metric, generator=generator)
    except NonFiniteError:
        return None
    chains.warm_up(_NUM_WARM_UP)
    chains.sample(_NUM_ITERATIONS)
    ended = chains.state.z
    critical = _critical(len(began) - 1, 2 * z.shape[1])
    sd = ended.std(0).clamp_min(torch.finfo(z.dtype).tiny)
    mean, mean_se = _moved(began / sd, ended / sd)
    log_sd = (ended.std(0) / began.std(0)).log()
    log_sd_se = _moved(_influence(began), _influence(ended))[1]
    return Drift(
        z=ended,
        mean=mean,
        mean_bound=(mean.abs() - critical * mean_se).clamp_min(0.0),
        log_sd=log_sd,
        log_sd_bound=(log_sd.abs() - critical * log_sd_se).clamp_min(0.0).nan_to_num(nan=torch.inf),
        memory=_correlation(began, ended),
        num_gradients=chains.num_gradients,
    )


def _moved(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    change = after - before
    return change.mean(0), change.std(0) / len(change) ** 0.5


def _influence(z: Tensor) -> Tensor:
    """Of the log sd: its estimate is the mean of these, to first order."""
    centred = z - z.mean(0)
    return 0.5 * (centred.square() / centred.square().mean(0) - 1.0)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    product = (one - one.mean(0)) * (other - other.mean(0))
    return (product.sum(0) / (len(one) - 1) / (one.std(0) * other.std(0))).nan_to_num(nan=1.0)


def _critical(freedom: int, num_tests: int) -> float:
    """Quantile of Student's t beyond which one of so many two-sided tests calls."""
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, FALSE_ALARM / (2 * num_tests)))
