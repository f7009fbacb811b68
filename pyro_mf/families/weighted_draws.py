"""What weighted draws say: quantiles, a curve of them, which of two fits is likelier."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mf.families.protocol import Family, Params

_DRAWS_PER_PIECE = 8  # of a quantile curve: its slope has an error of a third
_MAX_PIECES = 64
_MAX_CONDENSED = 400
_REACH = 5.0  # standard deviations to which draws are condensed in cells
_MIN_SLOPE = 1e-3  # of a quantile curve, in units of the draws' spread: ties have a density too


def weighted_quantiles(u: Tensor, log_weights: Tensor, p: Tensor) -> Tensor:
    """Smallest draw at or below which at least a share ``p`` of the weight lies.

    Args:
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        p: Probabilities, shape ``(Q,)``.

    Returns:
        Shape ``(Q, D)``.

    Example:
        >>> u = torch.tensor([[3.0], [1.0], [2.0]])
        >>> weighted_quantiles(u, torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.3, 0.9]))
        tensor([[2.],
                [3.]])
    """
    ordered, order = u.sort(0)
    total = torch.softmax(log_weights.double(), 0)[order].cumsum(0)
    total = total / total[-1]
    index = torch.searchsorted(total.T.contiguous(), p.to(total).repeat(u.shape[1], 1))
    return ordered.gather(0, index.T.clamp(max=len(u) - 1))


def centre_and_width(u: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the width of the central 68 %, which is positive, each ``(D,)``, in doubles.

    They follow a shift and a stretch of the draws, and far outliers do not move them. Where most
    of the weight is on one value the standard deviation stands in for the width, and where all of
    it is, a few roundings of the value.

    Args:
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.

    Example:
        >>> centre_and_width(torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3))
        (tensor([2.], dtype=torch.float64), tensor([1.5000], dtype=torch.float64))
    """
    x = u.double()
    p = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device))
    low, median, high = weighted_quantiles(x, log_weights, p)
    sd = mean_and_sd(x, log_weights)[1]
    rounding = torch.finfo(u.dtype).eps * median.abs()
    width = 0.5 * (high - low)
    width = torch.where(width > rounding, width, sd)
    least = 4.0 * torch.where(median == 0.0, torch.finfo(u.dtype).eps, rounding)
    return median, torch.where(width > rounding, width, least)


def mean_and_sd(u: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation, each ``(D,)``.

    Args:
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.

    Example:
        >>> mean_and_sd(torch.tensor([[1.0], [3.0]]), torch.zeros(2))
        (tensor([2.]), tensor([1.]))
    """
    weights = torch.softmax(log_weights, 0).to(u)[:, None]
    mean = (weights * u).sum(0)
    return mean, (weights * (u - mean).square()).sum(0).sqrt()


def condensed(u: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """At most four hundred draws that stand for all of them, for sums of smooth functions.

    They are quantiles at the middles of cells that are a fortieth of a standard deviation wide,
    were the draws normal, so that single draws are told apart in the tails.

    Args:
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.

    Returns:
        Draws of shape ``(min(S, 400), D)`` and their log weights.

    Example:
        >>> u = torch.linspace(0.0, 1.0, 100_001)[:, None]
        >>> few, log_weights = condensed(u, torch.zeros(100_001))
        >>> (log_weights.exp() @ few).round(decimals=3)
        tensor([0.5000])
    """
    if len(u) <= _MAX_CONDENSED:
        return u, log_weights
    edges = torch.linspace(-_REACH, _REACH, _MAX_CONDENSED + 1, dtype=u.dtype, device=u.device)
    p: Tensor = torch.special.ndtr(edges)
    p[0], p[-1] = 0.0, 1.0
    return weighted_quantiles(u, log_weights, 0.5 * (p[1:] + p[:-1])), p.diff().log()


def quantile_curve(u: Tensor, log_weights: Tensor, noise: Tensor) -> Tensor:
    """Quantiles of draws as an increasing function of standard normal noise.

    The curve is straight between quantiles that have some effective draws between each other, and
    beyond the last of them, as that of a Normal would be: few draws give few pieces.

    Args:
        u: Draws of width one (:func:`centre_and_width`), shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.
        noise: Where to evaluate it, shape ``(Q, D)``.

    Returns:
        Shape ``(Q, D)``, strictly increasing in ``noise``.

    Example:
        >>> u = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> quantile_curve(u, torch.zeros(3), torch.tensor([[-2.0], [0.0]]))
        tensor([[-1.9296],
                [ 0.0000]])
    """
    weights = torch.softmax(log_weights, 0)
    draws = float(1.0 / weights.square().sum())
    pieces = 2 * max(1, min(_MAX_PIECES, int(draws / _DRAWS_PER_PIECE)) // 2)
    tail = max(min(_DRAWS_PER_PIECE / (2.0 * draws), 0.15), 1e-4)
    unit = torch.linspace(-1.0, 1.0, pieces + 1, dtype=u.dtype, device=u.device)
    reach: Tensor = -torch.special.ndtri(torch.tensor(tail, dtype=u.dtype, device=u.device))
    knots = reach * unit
    step = knots[1] - knots[0]
    at_knots = weighted_quantiles(u, log_weights, torch.special.ndtr(knots))
    slopes = (at_knots.diff(dim=0) / step).clamp(min=_MIN_SLOPE)
    heights = torch.cat([torch.zeros_like(at_knots[:1]), (slopes * step).cumsum(0)])
    heights = heights - heights[pieces // 2] + at_knots[pieces // 2]
    index: Tensor = ((noise - knots[0]) / step).floor().long().clamp(0, pieces - 1)
    return heights.gather(0, index) + slopes.gather(0, index) * (noise - knots[index])


def likelier(family: Family, fitted: Params, u: Tensor, log_weights: Tensor) -> Params:
    """Fitted parameters, but the Normal's start where that has the higher weighted likelihood.

    Args:
        family: An elementwise family with location and scale.
        fitted: Parameters, each ``(D, *extra)``.
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.

    Example:
        >>> from pyro_mf.families import Normal
        >>> u = torch.tensor([[-1.0], [1.0]])
        >>> likelier(Normal(), (torch.tensor([9.0]), torch.ones(1)), u, torch.zeros(2))
        (tensor([0.]), tensor([1.]))
    """
    mean, sd = mean_and_sd(u, log_weights)
    normal = family.init(mean, torch.where(sd > 0.0, sd, fitted[1]))
    weights = torch.softmax(log_weights, 0)[:, None]
    ours = (weights * family.log_prob(fitted, u)).sum(0)
    theirs = (weights * family.log_prob(normal, u)).sum(0)
    worse = ~(ours >= theirs)
    masks = [worse.reshape(-1, *(1,) * (x.dim() - 1)) for x in fitted]
    return tuple(torch.where(m, n, f) for m, n, f in zip(masks, normal, fitted, strict=True))
