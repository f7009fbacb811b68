"""Approximate posteriors against NUTS."""

from pyro_mf.compare.baseline import Baseline
from pyro_mf.compare.posteriors import compare_posteriors
from pyro_mf.compare.report import PosteriorComparison

__all__ = ["Baseline", "PosteriorComparison", "compare_posteriors"]
