"""What families of two parameters, a location and a scale, have in common."""

from __future__ import annotations

from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.noise import NormalNoise


class LocationScale(NormalNoise):
    """Names and constraints of a location and a scale."""

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("loc", "scale")``."""
        return ("loc", "scale")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real and positive."""
        return (constraints.real, constraints.positive)
