"""Monotone rational-quadratic splines with linear tails, by element.

References:
    Durkan, Bekasov, Murray and Papamakarios (2019), Neural Spline Flows, arXiv 1906.04032
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mf.families.anchored_map import select


class Knots(NamedTuple):
    """Where the pieces of increasing splines meet, and with what slope.

    Args:
        x: Ascending arguments, shape ``(*batch, K + 1)``.
        y: Ascending values, the same shape.
        slopes: Positive slopes, the same shape; the first and last go on beyond the knots.
    """

    x: Tensor
    y: Tensor
    slopes: Tensor


class _Piece(NamedTuple):
    """The piece that each element lies on, shape ``(..., *batch)`` each."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    mean_slope: Tensor
    first: Tensor
    last: Tensor

    @property
    def bend(self) -> Tensor:
        """How far the slopes at the ends are above the mean slope, together."""
        return self.first + self.last - 2.0 * self.mean_slope

    def value(self, share: Tensor) -> Tensor:
        """The spline where a share of the piece's width is passed (Durkan, equation 4)."""
        product = share * (1.0 - share)
        rise = self.mean_slope * share.square() + self.first * product
        return self.y + self.height * rise / (self.mean_slope + self.bend * product)

    def log_slope(self, share: Tensor) -> Tensor:
        """Log of the spline's slope there (Durkan, equation 5)."""
        rest = 1.0 - share
        product = share * rest
        rise = (
            self.last * share.square()
            + 2.0 * self.mean_slope * product
            + self.first * rest.square()
        )
        fall = self.mean_slope + self.bend * product
        return 2.0 * self.mean_slope.log() + rise.log() - 2.0 * fall.log()


def evaluate(knots: Knots, x: Tensor) -> Tensor:
    """Values of the splines.

    Args:
        knots: The splines, one per element of the batch.
        x: Arguments, shape ``(..., *batch)``.
    """
    piece = _piece_at(knots, _piece_index(knots.x, x))
    inside = piece.value(((x - piece.x) / piece.width).clamp(0.0, 1.0))
    below = (x - knots.x[..., 0]).clamp(max=0.0)
    above = (x - knots.x[..., -1]).clamp(min=0.0)
    return inside + knots.slopes[..., 0] * below + knots.slopes[..., -1] * above


def invert(knots: Knots, y: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments at which the splines have given values, and the logs of their slopes there.

    Args:
        knots: The splines, one per element of the batch.
        y: Values, shape ``(..., *batch)``.
    """
    piece = _piece_at(knots, _piece_index(knots.y, y))
    height = ((y - piece.y) / piece.height).clamp(0.0, 1.0)
    # The root of a quadratic, in the form that loses no digits (Durkan, equations 6 to 8).
    a = piece.mean_slope - piece.first + height * piece.bend
    b = piece.first - height * piece.bend
    c = -piece.mean_slope * height
    discriminant = (b.square() - 4.0 * a * c).clamp(min=torch.finfo(y.dtype).tiny)
    share = (-2.0 * c / (b + discriminant.sqrt())).clamp(0.0, 1.0)
    below = (y - knots.y[..., 0]).clamp(max=0.0)
    above = (y - knots.y[..., -1]).clamp(min=0.0)
    x = piece.x + piece.width * share
    x = x + below / knots.slopes[..., 0] + above / knots.slopes[..., -1]
    return x, piece.log_slope(share)


def _piece_index(knots: Tensor, at: Tensor) -> Tensor:
    return (at[..., None] >= knots[..., 1:-1]).sum(-1)


def _piece_at(knots: Knots, index: Tensor) -> _Piece:
    width, height = knots.x.diff(dim=-1), knots.y.diff(dim=-1)
    return _Piece(
        x=select(knots.x, index),
        y=select(knots.y, index),
        width=select(width, index),
        height=select(height, index),
        mean_slope=select(height / width, index),
        first=select(knots.slopes[..., :-1], index),
        last=select(knots.slopes[..., 1:], index),
    )
