"""Noise of one standard normal number per element, as most families take it."""

from __future__ import annotations

import torch
from torch import Tensor


class NormalNoise:
    """The ``noise`` of a family whose elements each take one standard normal number."""

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw standard normal noise."""
        return torch.randn(shape, dtype=dtype, device=device)
