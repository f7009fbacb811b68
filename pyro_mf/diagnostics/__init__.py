"""When not to trust a fit: checks with their numbers, and the verdict drawn from them."""

from pyro_mf.diagnostics.calibration import Calibration
from pyro_mf.diagnostics.check import Check
from pyro_mf.diagnostics.diagnosis import Diagnosis

__all__ = ["Calibration", "Check", "Diagnosis"]
