"""Log-normal factors of positive latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributions import Distribution

from pyro_mf.families.normal import Normal
from pyro_mf.families.protocol import Params


@dataclass(frozen=True)
class LogNormal(Normal):
    """Normal factors of the logarithm of positive latents.

    They are what ``Normal`` gives on a positive support, and say so: their native distribution is
    torch's ``LogNormal``.

    Example:
        >>> family = LogNormal()
        >>> params = family.init(torch.zeros(1), torch.ones(1))
        >>> family.native(params).mean
        tensor([1.6487])
    """

    @property
    def name(self) -> str:
        """``"log_normal"``."""
        return "log_normal"

    @property
    def native_to(self) -> str:
        """``"positive"``."""
        return "positive"

    def native(self, params: Params) -> Distribution:
        """A LogNormal on the positive numbers."""
        loc, scale = params
        return torch.distributions.LogNormal(loc, scale)
