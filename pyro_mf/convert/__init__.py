"""Draws, densities and data as ArviZ results, for both generations of ArviZ."""

from pyro_mf.convert.elpd import ELPDNumbers, elpd_numbers
from pyro_mf.convert.from_pyro import from_pyro
from pyro_mf.convert.from_pyro_svi import from_pyro_svi
from pyro_mf.convert.loo import loo

__all__ = ["ELPDNumbers", "elpd_numbers", "from_pyro", "from_pyro_svi", "loo"]
