"""``fit``: one call from a model to its mean-field posterior, and what comes back."""

from pyro_mf.fitting.fit import fit
from pyro_mf.fitting.result import FitResult
from pyro_mf.fitting.verdicts import diagnose

__all__ = ["FitResult", "diagnose", "fit"]
