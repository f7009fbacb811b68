"""Automatic guides. They know families and layouts, and no objective."""

from pyro_mf.guides.auto_mean_field import AutoMeanField
from pyro_mf.guides.auto_mean_field_mixture import AutoMeanFieldMixture
from pyro_mf.guides.importance import log_importance_weights
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.guides.prototype import init_to_origin

__all__ = [
    "AutoMeanField",
    "AutoMeanFieldMixture",
    "FactorisedGuide",
    "check_same_sites",
    "init_to_origin",
    "log_importance_weights",
]
