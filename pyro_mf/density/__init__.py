"""A Pyro model as a pure function of one flat unconstrained vector."""

from pyro_mf.density.evaluation import Evaluation
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.sites import Layout, Plate, Site

__all__ = ["Evaluation", "Layout", "LogJoint", "Plate", "Site"]
