"""The log joint at any number of rows, in blocks of one size.

One size means one captured graph for all that a solver asks, and a bound on memory: a block takes
the memory that its rows take, however many draws are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_mf.density.log_joint import LogJoint

Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Log densities, shape ``(S,)``, and gradients, shape ``(S, D)``, at the rows of ``(S, D)``."""

# Rows of a block: enough for the arithmetic to outweigh the overhead of its operations, and no
# more, since a block is padded to its size.
_ROWS = 32
# More of them as long as an operation makes no more than so many bytes, which it does in no more
# time than it takes to be called.
_MAX_ROWS, _OPERATION_BYTES = 128, 2**14
# Fewer where the intermediate values would take more bytes than a processor keeps near by; a
# gradient takes as much again.
_BLOCK_BYTES = 4 * 2**20
# Steps of finite differences, in units of posterior sds, as the rounding of the dtype asks.
STEPS = {torch.float64: 1e-4, torch.float32: 1e-2}


class Blocks:
    """Values, gradients and Hessian products of a log joint, in double precision.

    A draw at which the density raises, or is not finite, has value ``-inf`` and gradient zero.

    Args:
        log_joint: The density.
        evaluate: How a block is computed, by default ``log_joint.value_and_grad``.
        num_sharing: How many such objects have to share the memory of one.

    Attributes:
        num_rows: Rows of a block.
        is_costly: Whether a draw takes so much arithmetic that each one counts.
        num_calls: Blocks computed so far.
    """

    def __init__(
        self, log_joint: LogJoint, evaluate: Evaluate | None = None, num_sharing: int = 1
    ) -> None:
        self.log_joint = log_joint
        self._evaluate = evaluate or log_joint.value_and_grad
        num_bytes, num_operations = log_joint.footprint
        num_bytes = max(1, num_bytes)
        most = _BLOCK_BYTES // num_bytes
        self.is_costly = most < _ROWS
        if self.is_costly:
            self.num_rows = max(1, most // num_sharing)
        else:
            cheap = _OPERATION_BYTES * num_operations // (num_bytes * num_sharing)
            self.num_rows = max(_ROWS, min(cheap, _MAX_ROWS))
        self.num_calls = 0

    @property
    def size(self) -> int:
        """Length D of a row."""
        return self.log_joint.size

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint, shape ``(S,)``, and gradient, shape ``(S, D)``, at each row of ``z``."""
        blocks = [self._block(rows, self._evaluate) for rows in z.split(self.num_rows)]
        values, gradients = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        bad = ~(torch.isfinite(values) & torch.isfinite(gradients).all(-1))
        values[bad], gradients[bad] = -torch.inf, 0.0
        return values, gradients

    def values(self, z: Tensor) -> Tensor:
        """Log joint at each row, shape ``(S,)``, without gradients where these are costly."""
        if self.is_costly and self._evaluate == self.log_joint.value_and_grad:
            with torch.no_grad():
                parts = [self._block(rows, self._value)[0] for rows in z.split(self.num_rows)]
            values = torch.cat(parts)
            return torch.where(torch.isfinite(values), values, -torch.inf)
        return self.value_and_grad(z)[0]

    def hessian_vector(self, z: Tensor, vectors: Tensor) -> Tensor:
        """Hessian at each row of ``z`` times a vector, by central differences of the gradient.

        The vectors' length should be that over which the density changes, a posterior sd. The
        differences need no second derivative of the model and no graph of their own; their error
        is of the order 1e-8 in double precision.
        """
        step = STEPS[self.log_joint.dtype]
        count = len(z)
        both = torch.cat([z + step * vectors, z - step * vectors])
        gradient = self.value_and_grad(both)[1]
        return (gradient[:count] - gradient[count:]) / (2 * step)

    def _value(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_joint(z), torch.zeros_like(z)

    def _block(self, rows: Tensor, evaluate: Evaluate) -> tuple[Tensor, Tensor]:
        count = len(rows)
        padding = self.num_rows - count
        if padding and self.log_joint.mode != "eager":
            rows = torch.cat([rows, rows[-1:].expand(padding, -1)])
        z = rows.to(dtype=self.log_joint.dtype, device=self.log_joint.device)
        self.num_calls += 1
        try:
            value, gradient = evaluate(z)
        except (RuntimeError, ValueError):  # an operation that raises at one of the rows
            if count == 1:
                return rows.new_full((1,), -torch.inf), torch.zeros_like(rows[:1])
            parts = [self._block(row[None], evaluate) for row in rows[:count]]
            return torch.cat([v for v, _ in parts]), torch.cat([g for _, g in parts])
        return value[:count].to(rows), gradient[:count].to(rows)
