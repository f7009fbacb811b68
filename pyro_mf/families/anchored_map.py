r"""Factors made by a free monotone map of standard normal noise, anchored at three quantiles.

A shape gives an increasing map :math:`T`. The factor is that of

.. math:: u = \mu + \sigma\,\frac{T(\varepsilon) - T(0)}{\tfrac12 (T(1) - T(-1))},
   \qquad \varepsilon \sim N(0, 1),

so that ``loc`` is its median and ``scale`` half the width of its central 68 %, whatever the shape:
what the shape says is not said by location and scale as well, and each can be found alone.
"""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Normal,
    Transform,
    TransformedDistribution,
    constraints,
)

from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.protocol import Params

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
Geometry = TypeVar("Geometry")
MAX_LOG = 8.0  # slopes within a factor of e^8 of each other: 3e-4 to 3e3


def bounded_logs(x: Tensor, bound: float = MAX_LOG) -> Tensor:
    """Any number as a log within a bound, unchanged near zero, so that ratios stay finite."""
    return bound * torch.tanh(x / bound)


def relative_logs(free: Tensor, bound: float = MAX_LOG) -> Tensor:
    """Bounded logs ``(..., k)`` from k - 1 free numbers: only what is relative is free."""
    return bounded_logs(torch.cat([free, -free.sum(-1, keepdim=True)], -1), bound)


def free_numbers(logs: Tensor, bound: float = MAX_LOG) -> tuple[Tensor, Tensor]:
    """What :func:`relative_logs` maps to ``logs``, but for a common shift.

    Args:
        logs: Shape ``(..., k)``; any that are too far from the others are drawn in.
        bound: The bound on logs.

    Returns:
        The free numbers ``(..., k - 1)``, and the shift ``(..., 1)`` to take off ``logs``.
    """
    middle = 0.5 * (logs.amax(-1, keepdim=True) + logs.amin(-1, keepdim=True))
    logs = middle + (logs - middle).clamp(-0.9 * bound, 0.9 * bound)
    shift = logs.mean(-1, keepdim=True)
    for _ in range(20):  # Newton's method for the shift at which the numbers sum to zero
        ratio = ((logs - shift) / bound).clamp(-0.99, 0.99)
        slope = (1.0 / (1.0 - ratio.square())).mean(-1, keepdim=True)
        shift = shift + bound * ratio.atanh().mean(-1, keepdim=True) / slope
    free = bound * ((logs - shift) / bound).clamp(-0.99, 0.99).atanh()
    return free[..., :-1], shift


def select(values: Tensor, index: Tensor) -> Tensor:
    """One of k numbers ``(*batch, k)`` per element, by indices ``(..., *batch)``."""
    index = index.expand(torch.broadcast_shapes(index.shape, values.shape[:-1]))
    batch = index.shape[index.dim() - values.dim() + 1 :]
    flat = index.reshape(-1, *batch).movedim(0, -1)
    # Draws side by side, since k numbers per draw as well would have to be kept for gradients.
    return values.expand(*batch, -1).gather(-1, flat).movedim(-1, 0).reshape(index.shape)


class AnchoredMap(NormalNoise, Generic[Geometry]):
    """The methods of a family whose members are anchored maps of normal noise.

    The parameters are ``loc``, ``scale`` and the shape. A family adds the geometry of a shape (its
    knots or edges), the map that it gives, its inverse, and the density of the map's values.
    """

    def geometry(self, shape: Params) -> Geometry:
        """What the map of a shape is computed from."""
        raise NotImplementedError

    def map(self, geometry: Geometry, noise: Tensor) -> Tensor:
        """The map T, before it is anchored."""
        raise NotImplementedError

    def map_inverse(self, geometry: Geometry, t: Tensor) -> Tensor:
        """The noise that T maps to ``t``."""
        raise NotImplementedError

    def map_log_prob(self, geometry: Geometry, t: Tensor) -> Tensor:
        """Log density of T of standard normal noise, in nats."""
        raise NotImplementedError

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Map noise to values: increasing in the noise."""
        geometry = self.geometry(params[2:])
        centre, width = self.anchors(geometry, params[0])
        return params[0] + params[1] * (self.map(geometry, noise) - centre) / width

    def inverse(self, params: Params, u: Tensor) -> Tensor:
        """The noise that :meth:`transform` maps to ``u``."""
        geometry = self.geometry(params[2:])
        centre, width = self.anchors(geometry, params[0])
        return self.map_inverse(geometry, centre + width * (u - params[0]) / params[1])

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale = params[:2]
        geometry = self.geometry(params[2:])
        centre, width = self.anchors(geometry, loc)
        log_prob = self.map_log_prob(geometry, centre + width * (u - loc) / scale)
        return log_prob + width.log() - scale.log()

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc = params[0]
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        shape = torch.broadcast_shapes(standard.shape, loc.shape)
        return self.transform(params, standard.expand(shape))

    def distribution(self, params: Params) -> Distribution:
        """The map of a standard normal distribution, batch shape that of ``loc``."""
        zero = torch.zeros_like(params[0])
        return TransformedDistribution(Normal(zero, zero + 1.0), [_MapTransform(self, params)])

    def anchors(self, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
        """T(0) and half of T(1) - T(-1), each ``(*batch,)``, for a batch like that of ``like``."""
        at = torch.tensor([-1.0, 0.0, 1.0], dtype=like.dtype, device=like.device)
        low, middle, high = self.map(
            geometry, at.reshape(3, *(1,) * like.dim()).expand(3, *like.shape)
        )
        return middle, 0.5 * (high - low)


class _MapTransform(Transform):
    """An anchored map as torch's own kind of transform, which knows distribution functions."""

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, family: AnchoredMap[Any], params: Params) -> None:
        super().__init__()
        self._family = family
        self._params = params

    def _call(self, x: Tensor) -> Tensor:
        return self._family.transform(self._params, x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._family.inverse(self._params, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log slope of the map, from the densities before and after."""
        return -0.5 * x.square() - HALF_LOG_2PI - self._family.log_prob(self._params, y)
