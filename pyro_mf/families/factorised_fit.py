"""Mixtures of factorised Normals fitted to weighted draws by expectation maximisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf.families.weighted_draws import centre_and_width

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_FIRST_ITERATIONS, _NUM_ITERATIONS = 30, 300  # from every start, then from the best
_NUM_FARTHEST = 4  # starts with components far apart
_MIN_SD = 1e-6  # of an element's spread
_MIN_PROB = 1e-6  # of a component: its log stays ordinary
# Draws that a component's scales must come from; of fewer they are drawn to those of all draws, so
# that no component shrinks onto one draw.
_ENOUGH_DRAWS = 10.0
_TOLERANCE = 1e-7  # gain of an iteration in nats per effective draw at which to stop

Components = tuple[Tensor, Tensor, Tensor]
"""Log probabilities ``(K,)``, means ``(K, D)`` and standard deviations ``(K, D)``."""


def fit_components(u: Tensor, log_weights: Tensor, num_components: int) -> Components:
    """The likeliest mixture of factorised Normals, as far as expectation maximisation finds it.

    It runs briefly from several deterministic starts, and to its end from the best one: centres
    each as far as possible from those before it, and equal groups along the direction in which the
    draws spread most.

    Args:
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        num_components: Number of components K.

    Returns:
        Log probabilities ``(K,)``, means ``(K, D)`` and standard deviations ``(K, D)``, in double
        precision; those of one Normal, K times, where no mixture was likelier.

    Example:
        >>> u = torch.tensor([[-5.0], [-4.0], [4.0], [5.0]])
        >>> fit_components(u, torch.zeros(4), 1)[1]
        tensor([[0.]], dtype=torch.float64)
    """
    weights = torch.softmax(log_weights.double(), 0)
    centre, width = centre_and_width(u, log_weights)
    z = (u.double() - centre) / width
    mean = weights @ z
    variance = (weights @ (z - mean).square()).clamp(min=_MIN_SD**2)
    one = mean.expand(num_components, -1), variance.sqrt().expand(num_components, -1)
    single: Components = (z.new_full((num_components,), -math.log(num_components)), *one)
    best, best_value = single, float(weights @ _log_density(z, single))
    if num_components > 1:
        starts = _starts(z, weights, num_components, variance)
        found = [_climb(z, weights, s, variance, _FIRST_ITERATIONS) for s in starts]
        found.append(_climb(z, weights, max(found, key=_value)[0], variance, _NUM_ITERATIONS))
        better, value = max(found, key=_value)
        if value > best_value:
            best = better
    log_probs, means, sds = best
    return log_probs, centre + width * means, width * sds


def _value(found: tuple[Components, float]) -> float:
    return found[1]


def _starts(z: Tensor, weights: Tensor, num: int, variance: Tensor) -> list[Components]:
    """Starts that differ in where the first centre is, and in what is far."""
    log_probs = z.new_full((num,), -math.log(num))
    scaled = z / variance.sqrt()
    order = scaled.square().sum(1).argsort()
    shares = weights[order].cumsum(0)
    firsts = [
        order[int(torch.searchsorted(shares, q * float(shares[-1])).clamp(max=len(z) - 1))]
        for q in torch.linspace(0.05, 0.95, _NUM_FARTHEST).tolist()
    ]
    groups = [_nearest(scaled, _farthest(scaled, weights, int(first), num)) for first in firsts]
    groups.append(_along(scaled, weights, num))
    return [
        (log_probs, *_moments(z, _one_hot(g, num) * weights[:, None], variance)) for g in groups
    ]


def _one_hot(group: Tensor, num: int) -> Tensor:
    return torch.nn.functional.one_hot(group, num).double()


def _farthest(z: Tensor, weights: Tensor, first: int, num: int) -> Tensor:
    """Indices of draws that are far apart, those of no weight left out."""
    allowed = weights > 1e-3 / len(weights)
    chosen = [first]
    distance = (z - z[first]).square().sum(1)
    while len(chosen) < num:
        chosen.append(int(torch.where(allowed, distance, -1.0).argmax()))
        distance = torch.minimum(distance, (z - z[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen)


def _nearest(z: Tensor, chosen: Tensor) -> Tensor:
    return torch.cdist(z, z[chosen]).argmin(1)


def _along(z: Tensor, weights: Tensor, num: int) -> Tensor:
    """Groups of equal weight along the direction of the largest spread."""
    centred = (z - weights @ z) * weights.sqrt()[:, None]
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    order = (z @ direction).argsort()
    group = torch.empty_like(order)
    shares = weights[order].cumsum(0)
    group[order] = (shares * num / shares[-1] - 1e-9).long().clamp(0, num - 1)
    return group


def _climb(
    z: Tensor, weights: Tensor, start: Components, variance: Tensor, iterations: int
) -> tuple[Components, float]:
    """Expectation maximisation, and the weighted log likelihood at its end."""
    components, value = start, -math.inf
    for _ in range(iterations):
        log_joint = _log_joint(z, components)
        log_density = torch.logsumexp(log_joint, 1)
        now = float(weights @ log_density)
        if now - value < _TOLERANCE * max(1.0, abs(now)):
            break
        value = now
        shares = (log_joint - log_density[:, None]).exp() * weights[:, None]
        probs = shares.sum(0).clamp(min=_MIN_PROB)
        components = ((probs / probs.sum()).log(), *_moments(z, shares, variance))
    return components, float(weights @ _log_density(z, components))


def _moments(z: Tensor, shares: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of every component, from the draws' shares in it."""
    mass = shares.sum(0).clamp(min=torch.finfo(z.dtype).tiny)
    own = shares / mass
    means = own.T @ z
    spread = own.T @ z.square() - means.square()
    draws = mass.square() / shares.square().sum(0).clamp(min=torch.finfo(z.dtype).tiny)
    trust = (draws / _ENOUGH_DRAWS).clamp(max=1.0)[:, None]
    pooled = trust * spread.clamp(min=0.0) + (1.0 - trust) * variance
    return means, pooled.clamp(min=_MIN_SD**2).sqrt()


def _log_joint(z: Tensor, components: Components) -> Tensor:
    """Log probability of component and draw, shape ``(S, K)``."""
    log_probs, means, sds = components
    rows = [
        -0.5 * ((z - m) / s).square().sum(1) - s.log().sum() - z.shape[1] * _HALF_LOG_2PI
        for m, s in zip(means, sds, strict=True)
    ]
    return log_probs + torch.stack(rows, 1)


def _log_density(z: Tensor, components: Components) -> Tensor:
    return torch.logsumexp(_log_joint(z, components), 1)
