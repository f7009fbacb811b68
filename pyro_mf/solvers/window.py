"""A window over the iterates of an optimiser, in bounded memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAX_BLOCKS = 128


class Window:
    """Means of consecutive blocks of iterates; blocks are joined in pairs when there are many.

    Memory is that of 128 vectors, however many iterates come.

    Args:
        like: A vector like those to come, shape ``(P,)``.
        block_size: Iterates per block at the beginning.

    Example:
        >>> window = Window(torch.zeros(1), block_size=1)
        >>> for t in range(256):
        ...     is_block = window.add(torch.tensor([float(t)]))
        >>> window.blocks.shape, window.block_size, window.blocks[0]
        (torch.Size([64, 1]), 4, tensor([1.5000]))
    """

    def __init__(self, like: Tensor, block_size: int = 2) -> None:
        self.block_size = block_size
        self.num_blocks = 0
        self._means = torch.zeros((_MAX_BLOCKS, *like.shape), dtype=like.dtype, device=like.device)
        self._sum = torch.zeros_like(like)
        self._count = 0

    @property
    def blocks(self) -> Tensor:
        """Means of the whole blocks so far, oldest first, shape ``(num_blocks, P)``."""
        return self._means[: self.num_blocks]

    def add(self, x: Tensor) -> bool:
        """Add an iterate; whether it completed a block."""
        self._sum += x
        self._count += 1
        if self._count < self.block_size:
            return False
        torch.div(self._sum, self.block_size, out=self._means[self.num_blocks])
        self._sum.zero_()
        self._count = 0
        self.num_blocks += 1
        if self.num_blocks == _MAX_BLOCKS:
            self.num_blocks //= 2
            self.block_size *= 2
            pairs = self._means.view(self.num_blocks, 2, *self._sum.shape)
            self._means[: self.num_blocks] = pairs.mean(1)
        return True

    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`from_state` makes an equal window."""
        return {
            "blocks": self.blocks.clone(),
            "sum": self._sum.clone(),
            "count": self._count,
            "block_size": self.block_size,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Window:
        """The window that :meth:`state` described."""
        window = cls(state["sum"], state["block_size"])
        window.num_blocks = len(state["blocks"])
        window._means[: window.num_blocks] = state["blocks"]
        window._sum = state["sum"].clone()
        window._count = state["count"]
        return window
