"""Samplers that an approximation is compared with, on the same captured density."""

from pyro_mf.baselines.nuts import run_nuts
from pyro_mf.baselines.result import NUTSResult

__all__ = ["NUTSResult", "run_nuts"]
