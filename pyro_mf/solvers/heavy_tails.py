"""Factors whose tails are too heavy for a density: their ELBO is minus infinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf.density.blocks import Blocks
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.protocol import FactorisedGuide

# Scales from the median at which the fall of the density is compared, and the power of the distance
# beyond which it is taken to be exponential.
_NEAR, _FAR, _EXPONENTIAL = 20.0, 40.0, 4.0
_LARGE = 1e12


def describe_infinite(blocks: Blocks, guide: FactorisedGuide) -> str:
    """Look for power-law factors where the log density falls faster than their moments exist.

    A Student-t of df degrees has no moment of order df; where the log density falls like a higher
    power of the distance, or exponentially, its expectation is minus infinity. Any number of draws
    gives a finite number all the same.

    Args:
        blocks: The log joint.
        guide: The guide, fitted.

    Returns:
        Which element it is and what to do, or nothing.
    """
    if not isinstance(guide, FlatGuide):
        return ""
    for site in guide.layout.sites:
        family, params = guide.site_family(site)
        if family.name != "student_t":
            continue
        df = params["df"].detach().double().cpu().reshape(-1)
        power = _power(blocks, guide, torch.arange(site.start, site.stop))
        worst = int((power - df).argmax())
        if float(power[worst]) > float(df[worst]):
            name = guide.layout.element_names()[site.start + worst]
            return (
                f"the ELBO is minus infinity: the log density falls too fast along '{name}' for a "
                f"Student-t factor of {float(df[worst]):.1f} degrees of freedom, whatever finite "
                "number a sample of draws gives. Take 'sinh_arcsinh' or a family native to the "
                "site's support"
            )
    return ""


def _power(blocks: Blocks, guide: FlatGuide, elements: Tensor) -> Tensor:
    """The power of the distance like which the log density falls, the larger of both sides."""
    at = torch.tensor([[0.158655], [0.5], [0.841345]], dtype=torch.float64)
    params = tuple(p.detach().double().cpu() for p in guide.flat_params())
    low, median, high = guide.family.quantile(params, at)
    scale = (high - low) / 2
    centre = blocks.values(median[None])
    power = torch.zeros(len(elements), dtype=torch.float64)
    rows = torch.arange(len(elements))
    for sign in (-1.0, 1.0):
        falls = []
        for distance in (_NEAR, _FAR):
            z = median.repeat(len(elements), 1)
            z[rows, elements] += sign * distance * scale[elements]
            fall = (centre - blocks.values(z)).nan_to_num(nan=math.inf)
            falls.append(fall.clamp(1e-3, _LARGE))
        measured = (falls[1] / falls[0]).log2()
        # Beyond all numbers, and steeper than any polynomial of a log density.
        is_exponential = (measured > _EXPONENTIAL) | (falls[1] >= _LARGE)
        power = torch.maximum(power, torch.where(is_exponential, math.inf, measured))
    return power
