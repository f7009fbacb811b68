"""Factors of a mean-field approximation, by name.

A family is added by one file that holds a class with the methods of :class:`Family` and one line
in the registry below. Factors of discrete sites, :class:`Bernoulli` and :class:`Categorical`, are
no densities of a flat vector and have a registry of their own.
"""

from __future__ import annotations

import difflib

from pyro_mf.families.beta import Beta
from pyro_mf.families.dirichlet import Dirichlet
from pyro_mf.families.discrete import DISCRETE_FAMILIES, Bernoulli, Categorical
from pyro_mf.families.full_rank import FullRank
from pyro_mf.families.gamma import Gamma
from pyro_mf.families.histogram import Histogram
from pyro_mf.families.inverse_gamma import InverseGamma
from pyro_mf.families.laplace import Laplace
from pyro_mf.families.log_normal import LogNormal
from pyro_mf.families.logistic import Logistic
from pyro_mf.families.low_rank import LowRank
from pyro_mf.families.normal import Normal
from pyro_mf.families.normal_mixture import NormalMixture
from pyro_mf.families.protocol import Family, Params
from pyro_mf.families.sinh_arcsinh import SinhArcsinh
from pyro_mf.families.spline import Spline
from pyro_mf.families.student_t import StudentT
from pyro_mf.families.von_mises import VonMises

FAMILIES: dict[str, type[Family]] = {
    "normal": Normal,
    "laplace": Laplace,
    "logistic": Logistic,
    "student_t": StudentT,
    "sinh_arcsinh": SinhArcsinh,
    "spline": Spline,
    "normal_mixture": NormalMixture,
    "histogram": Histogram,
    "log_normal": LogNormal,
    "gamma": Gamma,
    "inverse_gamma": InverseGamma,
    "beta": Beta,
    "dirichlet": Dirichlet,
    "von_mises": VonMises,
    "full_rank": FullRank,
    "low_rank": LowRank,
}


# What others call them, for the hint in an error.
_OTHER_NAMES = {
    "gauss": "normal",
    "gaussian": "normal",
    "diagonal": "normal",
    "t": "student_t",
    "cauchy": "student_t",
    "skew_normal": "sinh_arcsinh",
    "flow": "spline",
    "mixture": "normal_mixture",
    "multivariate_normal": "full_rank",
    "mvn": "full_rank",
}


def nearest_name(name: str) -> str:
    """The family's name that somebody who wrote this most likely meant.

    Args:
        name: What was written.

    Example:
        >>> nearest_name("Gaussian"), nearest_name("gama")
        ('normal', 'gamma')
    """
    names = [*_OTHER_NAMES, *FAMILIES, *DISCRETE_FAMILIES]
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    return _OTHER_NAMES.get(near, near)


def get_family(family: str | Family) -> Family:
    """Find a family by name, or pass an object through.

    Args:
        family: A name from ``FAMILIES``, or an object with the methods of :class:`Family`.

    Raises:
        ValueError: If no family has this name.
        TypeError: If the object is not a family.

    Example:
        >>> get_family("normal")
        Normal()
    """
    if isinstance(family, str):
        if family in FAMILIES:
            return FAMILIES[family]()
        raise ValueError(
            f"Unknown family {family!r}. The families are {', '.join(map(repr, FAMILIES))}; "
            f"did you mean {nearest_name(family)!r}?"
        )
    if isinstance(family, type) or not isinstance(family, Family):
        raise TypeError(
            f"family must be a name ({', '.join(map(repr, FAMILIES))}) or an object with the "
            f"methods of pyro_mf.families.Family; got {family!r}."
        )
    return family


__all__ = [
    "FAMILIES",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Dirichlet",
    "Family",
    "FullRank",
    "Gamma",
    "Histogram",
    "InverseGamma",
    "Laplace",
    "LogNormal",
    "Logistic",
    "LowRank",
    "Normal",
    "NormalMixture",
    "Params",
    "SinhArcsinh",
    "Spline",
    "StudentT",
    "VonMises",
    "get_family",
    "nearest_name",
]
