"""Divergences between guide and posterior, as objectives of stock ``SVI``."""

from pyro_mf.objectives.forward_kl import ForwardKL
from pyro_mf.objectives.reverse_kl import ReverseKL

__all__ = ["ForwardKL", "ReverseKL"]
