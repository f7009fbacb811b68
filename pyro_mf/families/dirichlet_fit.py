"""Maximum likelihood of Dirichlet distributions, Beta ones among them, from means of logarithms."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LEAST_GAP = 1e-10  # between the log of a mean and the mean of a log: concentrations up to 1e10
_MOST_GAP = 1e8
_NUM_STEPS = 30
_LONGEST = 1.5  # longest step of a log concentration
_NUM_NODES = 32


def fit_dirichlet(mean_log: Tensor) -> Tensor:
    """Concentrations under which logarithms of proportions have given means.

    Newton's method on the concave log likelihood, with its inverse Hessian in closed form (Minka,
    Estimating a Dirichlet distribution, 2000), from where narrow and wide distributions would be.

    Args:
        mean_log: Means of ``log y`` over draws of proportions ``y``, shape ``(..., K)``.

    Returns:
        Concentrations, shape ``(..., K)``, double precision.

    Example:
        >>> fit_dirichlet(torch.tensor([-1.0, -1.0], dtype=torch.float64))  # uniform on (0, 1)
        tensor([1., 1.], dtype=torch.float64)
    """
    mean_log = mean_log.double()
    gap = -mean_log.logsumexp(-1, keepdim=True)
    mean_log = mean_log - (gap.clamp(_LEAST_GAP, _MOST_GAP) - gap)
    gap = gap.clamp(_LEAST_GAP, _MOST_GAP)
    narrow = torch.softmax(mean_log, -1) * (mean_log.shape[-1] - 1) / (2.0 * gap)
    a = torch.maximum(narrow, 0.5 / -mean_log)
    for _ in range(_NUM_STEPS):
        total = a.sum(-1, keepdim=True)
        gradient = torch.digamma(total) - torch.digamma(a) + mean_log
        own, shared = torch.polygamma(1, a), torch.polygamma(1, total)
        common = (gradient / own).sum(-1, keepdim=True)
        common = common / (1.0 / shared - (1.0 / own).sum(-1, keepdim=True))
        step = (gradient + common) / own
        a = a * (step / a).clamp(-_LONGEST, _LONGEST).exp()
    return a


def mean_log_sigmoids(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Means of ``log sigmoid(v)`` and ``log sigmoid(-v)`` for ``v`` Normal.

    Args:
        loc: Mean of ``v``.
        scale: Standard deviation of ``v``.

    Example:
        >>> mean_log_sigmoids(torch.tensor(0.0), torch.tensor(0.0))[0].exp()
        tensor(0.5000, dtype=torch.float64)
    """
    nodes, weights = (torch.tensor(x, dtype=torch.float64, device=loc.device) for x in _rule())
    above = (logsigmoid(loc[..., None] + scale[..., None] * nodes) * weights).sum(-1)
    return above, above - loc.double()


@cache
def _rule() -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NUM_NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()
