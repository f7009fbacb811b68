"""Mean-field variational inference for Pyro.

One call that fits (:func:`fit`) and its parts: guides (:class:`AutoMeanField`,
:class:`AutoMeanFieldMixture`) with factors of many families (:mod:`pyro_mf.families`), objectives
for stock ``SVI`` (:class:`ReverseKL`, :class:`ForwardKL`), the model as a captured density
(:class:`LogJoint`), NUTS on it (:func:`run_nuts`), ArviZ results (:func:`from_pyro`,
:func:`from_pyro_svi`) and leave-one-out on them (:func:`loo`). Whether to trust a fit say
:func:`diagnose`, :func:`calibrate`, :func:`psis`, and :func:`compare_posteriors` with NUTS, with
pictures by ``plot_...``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_mf._errors import (
    CaptureWarning,
    CheckpointError,
    ConvergenceWarning,
    ConversionWarning,
    DifferentDataWarning,
    EstimatorWarning,
    FamilyError,
    GuideMismatchError,
    GuideNotSetUpError,
    ImproperWarning,
    KhatWarning,
    LinearResponseError,
    MinibatchWarning,
    ModelError,
    ModesWarning,
    NonFiniteError,
    ScoreGradientWarning,
)
from pyro_mf.baselines import NUTSResult, run_nuts
from pyro_mf.density import LogJoint
from pyro_mf.fitting import FitResult, diagnose, fit
from pyro_mf.guides import AutoMeanField, AutoMeanFieldMixture
from pyro_mf.objectives import ForwardKL, ReverseKL
from pyro_mf.weights import psis

if TYPE_CHECKING:
    from pyro_mf.compare import PosteriorComparison, compare_posteriors
    from pyro_mf.convert import from_pyro, from_pyro_svi, loo
    from pyro_mf.diagnostics import Calibration, Diagnosis
    from pyro_mf.fitting.calibrate import calibrate
    from pyro_mf.plots import (
        plot_calibration,
        plot_comparison,
        plot_diagnosis,
        plot_khat,
        plot_pairs,
        plot_predictive,
        plot_ranks,
        plot_sds,
        plot_trace,
    )

__version__ = "0.1.0"

__all__ = [
    "AutoMeanField",
    "AutoMeanFieldMixture",
    "Calibration",
    "CaptureWarning",
    "CheckpointError",
    "ConvergenceWarning",
    "ConversionWarning",
    "Diagnosis",
    "DifferentDataWarning",
    "EstimatorWarning",
    "FamilyError",
    "FitResult",
    "ForwardKL",
    "GuideMismatchError",
    "GuideNotSetUpError",
    "ImproperWarning",
    "KhatWarning",
    "LinearResponseError",
    "LogJoint",
    "MinibatchWarning",
    "ModelError",
    "ModesWarning",
    "NUTSResult",
    "NonFiniteError",
    "PosteriorComparison",
    "ReverseKL",
    "ScoreGradientWarning",
    "calibrate",
    "compare_posteriors",
    "diagnose",
    "fit",
    "from_pyro",
    "from_pyro_svi",
    "loo",
    "plot_calibration",
    "plot_comparison",
    "plot_diagnosis",
    "plot_khat",
    "plot_pairs",
    "plot_predictive",
    "plot_ranks",
    "plot_sds",
    "plot_trace",
    "psis",
    "run_nuts",
]

# These rooms import xarray, which takes half a second that a fit does not need.
_LAZY = {
    "Calibration": "pyro_mf.diagnostics",
    "Diagnosis": "pyro_mf.diagnostics",
    "PosteriorComparison": "pyro_mf.compare",
    "calibrate": "pyro_mf.fitting.calibrate",
    "compare_posteriors": "pyro_mf.compare",
    "from_pyro": "pyro_mf.convert",
    "from_pyro_svi": "pyro_mf.convert",
    "loo": "pyro_mf.convert",
} | {name: "pyro_mf.plots" for name in __all__ if name.startswith("plot_")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyro_mf' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
