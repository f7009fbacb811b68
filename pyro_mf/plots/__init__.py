"""Pictures of fits and comparisons. Small matplotlib code on plain arrays, for every ArviZ."""

from pyro_mf.plots.calibration import plot_calibration
from pyro_mf.plots.diagnosis import plot_diagnosis
from pyro_mf.plots.khat import plot_khat
from pyro_mf.plots.overview import plot_comparison
from pyro_mf.plots.pairs import plot_pairs
from pyro_mf.plots.predictive import plot_predictive
from pyro_mf.plots.ranks import plot_ranks
from pyro_mf.plots.sds import plot_sds
from pyro_mf.plots.trace import plot_trace

__all__ = [
    "plot_calibration",
    "plot_comparison",
    "plot_diagnosis",
    "plot_khat",
    "plot_pairs",
    "plot_predictive",
    "plot_ranks",
    "plot_sds",
    "plot_trace",
]
