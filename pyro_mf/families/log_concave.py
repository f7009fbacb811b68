"""Quantiles of distributions with a concave log density, and their exact gradients.

Gamma and Beta factors have no quantile function in closed form, and what libraries offer instead
is inexact or underflows on the unconstrained axis. There, however, their log densities are concave,
and that makes everything computable from one integral: a tail's mass over the density at its
boundary. Its integrand falls from one to nothing ever faster, so a fixed Gauss-Legendre rule gives
it to rounding, however small the mass itself. Newton's method in the tail's log mass, which is
concave too, then finds quantiles from anywhere in a fixed number of steps, and the integral's
derivatives give the quantile's gradient by the parameters, to all orders (implicit
reparameterisation: Figurnov, Mohamed & Mnih 2018, arXiv:1805.08498).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

NEGLIGIBLE = 38.0  # nats below the boundary's density at which a tail is cut off: 3e-17
NUM_NODES = 48
_COARSE, _STEPS = 12, (3, 2)  # Newton steps with few nodes, then with all; rounding after one less
_LEAST_DAMPING = 0.3  # of Halley's correction, where the step would otherwise overshoot


class Tail(NamedTuple):
    """What Newton's method needs to know of a tail.

    Args:
        log_mass: Log of its probability.
        ratio: Its probability over the density at its boundary.
        slope: Derivative of the log density at the boundary, going out of the tail.
    """

    log_mass: Tensor
    ratio: Tensor
    slope: Tensor


class Side(Protocol):
    """One side of the mode for every element, as if all were left sides: mirrored where not."""

    def mode(self) -> Tensor:
        """Where the density is highest, on the mirrored axis."""
        ...

    def tail(self, u: Tensor, num_nodes: int) -> Tail:
        """The tail to the left of ``u`` on the mirrored axis, where ``u`` is left of the mode."""
        ...


class LogConcave(Protocol):
    """Distributions on the real line by their tails; ``shape`` are their parameters, in doubles."""

    def mode(self, *shape: Tensor) -> Tensor:
        """Where the density is highest."""
        ...

    def side(self, is_left: Tensor, *shape: Tensor) -> Side:
        """The left sides, and the right ones where not ``is_left``."""
        ...

    def sensitivities(self, u: Tensor, is_left: Tensor, *shape: Tensor) -> tuple[Tensor, ...]:
        """Derivatives of the distribution function by each parameter, over the density at ``u``."""
        ...


def nodes_and_weights(like: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """A Gauss-Legendre rule on the unit interval, as doubles on a tensor's device."""
    nodes, weights = _rule(num_nodes)
    return (
        torch.tensor(nodes, dtype=torch.float64, device=like.device),
        torch.tensor(weights, dtype=torch.float64, device=like.device),
    )


@cache
def _rule(num_nodes: int) -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return (0.5 * nodes + 0.5).tolist(), (0.5 * weights).tolist()


def value_at_noise(law: LogConcave, noise: Tensor, *shape: Tensor) -> Tensor:
    """The quantile at standard normal noise's own probability: increasing in the noise.

    Args:
        law: The distributions.
        noise: Standard normal noise; far from 0 it is as exact as near it.
        shape: The law's parameters, which broadcast against the noise.

    Returns:
        Values with the noise's dtype, differentiable any number of times in ``shape``, not in
        ``noise``.
    """
    doubles = torch.broadcast_tensors(*(x.double() for x in shape))
    found: Tensor = _Quantile.apply(law, noise.detach().double(), *doubles)  # type: ignore[no-untyped-call]
    return found.to(noise.dtype)


def quantile_at(law: LogConcave, p: Tensor, *shape: Tensor) -> Tensor:
    """Value below which the probability is ``p``, infinite for 0 and 1; no gradients.

    Args:
        law: The distributions.
        p: Probabilities, which broadcast against ``shape``.
        shape: The law's parameters.
    """
    with torch.no_grad():
        noise = torch.special.ndtri(p.double())
        inner = torch.where(noise.isinf(), 0.0, noise)
        value = torch.where(noise.isinf(), noise, value_at_noise(law, inner, *shape))
        return value.to(shape[0].dtype)


def _solve(law: LogConcave, noise: Tensor, *shape: Tensor) -> Tensor:
    mode = law.mode(*shape)
    up_to_mode = law.side(torch.ones_like(mode) > 0.0, *shape).tail(mode, NUM_NODES).log_mass
    below, above = log_tails(noise)
    is_left = below <= up_to_mode
    target = torch.where(is_left, below, above)
    side = law.side(is_left, *shape)
    highest = side.mode()
    u = highest
    for step in range(sum(_STEPS)):
        log_mass, ratio, slope = side.tail(u, _COARSE if step < _STEPS[0] else NUM_NODES)
        excess = log_mass - target
        damping = 1.0 - 0.5 * excess * (slope * ratio - 1.0)  # Halley's
        u = torch.minimum(u - excess * ratio / damping.clamp_min(_LEAST_DAMPING), highest)
    return torch.where(is_left, u, -u)


def log_tails(noise: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities below and above normal noise; ``log_ndtr`` has no rule for vmap."""
    thin = (0.5 * torch.special.erfcx(noise.abs() * 0.5**0.5)).log() - 0.5 * noise.square()
    thick = torch.log1p(-thin.exp())
    return torch.where(noise < 0.0, thin, thick), torch.where(noise < 0.0, thick, thin)


class _Quantile(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(law: LogConcave, noise: Tensor, *shape: Tensor) -> Tensor:
        return _solve(law, noise, *shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.law, _, *shape = inputs
        ctx.save_for_backward(output, *shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        u, *shape = ctx.saved_tensors
        is_left = u <= ctx.law.mode(*shape)
        by_shape = ctx.law.sensitivities(u, is_left, *shape)
        found = (-(gradients[0] * s) for s in by_shape)
        return (None, None, *(g.sum_to_size(x.shape) for g, x in zip(found, shape, strict=True)))
