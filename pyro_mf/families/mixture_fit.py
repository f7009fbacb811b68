"""Mixtures of Normals fitted to weighted draws by expectation maximisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf.families.weighted_draws import weighted_quantiles

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_NUM_ITERATIONS = 300
_FIRST_ITERATIONS = 30  # from every start, before the best goes on
_DRAWS_FOR_STARTS = 2000  # of which starts are judged by
_ENOUGH = 0.01  # gain of an iteration in the log likelihood of all draws, in nats, at which to stop
_MIN_PROB = 1e-4  # of a component: less is not a component, and its log stays ordinary
_NO_PROB = 1e-10  # a component with so little of the draws stays where it is

Mixture = tuple[Tensor, Tensor, Tensor]  # probabilities, means and sds, shape (D, K) each


def fit_mixture(u: Tensor, log_weights: Tensor, num_components: int) -> Mixture:
    """Log probabilities, means and standard deviations of mixtures, column by column.

    Expectation maximisation never lowers the likelihood. It runs briefly from several
    deterministic starts (groups of neighbouring quantiles; one centre with several widths; a bulk
    with a small group at either end) and to its end from the best one. Standard deviations stay
    above a quarter of the bandwidth that a kernel density estimate of so many effective draws
    would have, so that no component shrinks onto a draw.

    Args:
        u: Draws of width one, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.
        num_components: Number of components K.

    Returns:
        Three tensors of shape ``(D, K)``.
    """
    weights = torch.softmax(log_weights, 0)
    draws = float(1.0 / weights.square().sum())
    z = u.T.contiguous()  # shape: (D, S)
    floor = 0.25 * 0.9 * draws**-0.2
    stride = max(1, len(u) // _DRAWS_FOR_STARTS)
    few, few_weights = z[:, ::stride], torch.softmax(log_weights[::stride], 0)
    starts = _starts(z, weights, num_components, floor)
    tolerance = _ENOUGH / draws
    best, best_value = _climb(few, few_weights, starts[0], floor, _FIRST_ITERATIONS, tolerance)
    for start in starts[1:]:
        found, value = _climb(few, few_weights, start, floor, _FIRST_ITERATIONS, tolerance)
        better = (value > best_value)[:, None]
        best = _choose(better, found, best)
        best_value = torch.maximum(value, best_value)
    (probs, means, sds), _ = _climb(z, weights, best, floor, _NUM_ITERATIONS, tolerance)
    order = means.argsort(-1)
    probs, means, sds = (x.gather(-1, order) for x in (probs, means, sds))
    return probs.log(), means, sds


def _choose(condition: Tensor, ours: Mixture, theirs: Mixture) -> Mixture:
    probs, means, sds = (torch.where(condition, a, b) for a, b in zip(ours, theirs, strict=True))
    return probs, means, sds


def _starts(z: Tensor, weights: Tensor, num: int, floor: float) -> list[Mixture]:
    """Starts that differ in what they take the components for."""
    mean = (z * weights).sum(-1, keepdim=True)
    sd = ((z - mean).square() * weights).sum(-1, keepdim=True).sqrt().clamp(min=floor)
    one = torch.ones(len(z), num, dtype=z.dtype, device=z.device)
    steps = torch.linspace(-1.0, 1.0, num, dtype=z.dtype, device=z.device) if num > 1 else 0.0 * one

    def at(share: Tensor) -> Tensor:
        return weighted_quantiles(z.T, weights.log(), share).T

    middles = (torch.arange(num, dtype=z.dtype, device=z.device) + 0.5) / num
    starts = [
        (one / num, at(middles), (sd / num) * one),
        (one / num, mean + 0.5 * sd * steps, 0.9 * sd * one),
    ]
    if num > 1:
        starts.append((one / num, at(torch.full_like(middles, 0.5)), (1.5 * steps).exp() * one))
        ends = torch.full_like(middles, 0.5)
        ends[0], ends[-1] = 0.02, 0.98
        small = torch.full_like(middles, 1.0)
        small[0], small[-1] = 0.05, 0.05
        starts.append((one * (small / small.sum()), at(ends), one.clone()))
    return [(p, m, s.clamp(min=floor)) for p, m, s in starts]


def _climb(
    z: Tensor, weights: Tensor, start: Mixture, floor: float, iterations: int, tolerance: float
) -> tuple[Mixture, Tensor]:
    """Expectation maximisation, and the weighted log likelihood ``(D,)`` before its last step.

    Columns leave the computation as they converge.
    """
    probs, means, sds = (x.clone() for x in start)
    value = torch.full_like(z[:, 0], -math.inf)
    active = torch.arange(len(z), device=z.device)
    for _ in range(iterations):
        current = (probs[active], means[active], sds[active])
        (probs[active], means[active], sds[active]), now = _step(z[active], weights, current, floor)
        gain, value[active] = now - value[active], now
        active = active[gain >= tolerance]
        if not len(active):
            break
    return (probs, means, sds), value


def _step(z: Tensor, weights: Tensor, mixture: Mixture, floor: float) -> tuple[Mixture, Tensor]:
    """One step of expectation maximisation, and the weighted log likelihood before it."""
    probs, means, sds = mixture
    scores = (z[:, None] - means[..., None]) / sds[..., None]  # shape: (D, K, S)
    log_joint = (probs.log() - sds.log() - _HALF_LOG_2PI)[..., None] - 0.5 * scores.square()
    log_density = torch.logsumexp(log_joint, 1)
    shares = weights * (log_joint - log_density[:, None]).exp()
    mass = shares.sum(-1)
    safe = mass.clamp(min=torch.finfo(z.dtype).tiny)
    alive = mass > _NO_PROB
    means = torch.where(alive, (shares * z[:, None]).sum(-1) / safe, means)
    spread = (shares * (z[:, None] - means[..., None]).square()).sum(-1) / safe
    sds = torch.where(alive, spread.sqrt().clamp(min=floor), sds)
    probs = mass.clamp(min=_MIN_PROB)
    probs = probs / probs.sum(-1, keepdim=True)
    return (probs, means, sds), (weights * log_density).sum(-1)
