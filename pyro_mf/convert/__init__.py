"""Draws, densities and data as ArviZ results, for both generations of ArviZ."""

from pyro_mf.convert.from_pyro import from_pyro
from pyro_mf.convert.from_pyro_svi import from_pyro_svi

__all__ = ["from_pyro", "from_pyro_svi"]
