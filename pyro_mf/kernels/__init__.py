"""Transition kernels on a captured density, many chains at once."""

from pyro_mf.kernels.hmc import HMCDraws, ParallelHMC
from pyro_mf.kernels.metric import Metric
from pyro_mf.kernels.mixing import Mixing, measure_mixing
from pyro_mf.kernels.transition import HMCState, hmc_transition, initialise

__all__ = [
    "HMCDraws",
    "HMCState",
    "Metric",
    "Mixing",
    "ParallelHMC",
    "hmc_transition",
    "initialise",
    "measure_mixing",
]
