"""The distribution of one latent site under a guide: a factor, as ``pyro.sample`` takes it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyro_mf.density.sites import Site
from pyro_mf.families import Family
from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.protocol import Params, event_dim_of, home_of, spans_site
from pyro_mf.guides.site_families import is_canonical


def factor_of(family: Family, params: Params, site: Site, shape: torch.Size) -> Any:
    """A site's factor, as a distribution over the site's support.

    Args:
        family: The site's family.
        params: Its parameters, those of the elements that are visited.
        site: The site, at full size.
        shape: Unconstrained shape of the elements that are visited.

    Returns:
        One of Pyro's own distributions where there is one for the factor, so that analytic KL
        divergences apply; else the factor on the unconstrained axis, pushed through the site's
        bijection.
    """
    if home_of(family) is not None and is_canonical(site):
        own = as_pyro(family.native(params))  # type: ignore[attr-defined]
        return own.to_event(site.event_dim - len(own.event_shape))
    event_dim = site.unconstrained_event_dim
    if event_dim_of(family):
        base = as_pyro(_blocks(family, params, shape, event_dim))
    else:
        factor = family.distribution(params)
        if not factor.has_rsample:  # a mixture of torch's, which a score gradient would be used for
            factor = FamilyDistribution(family, params, shape)
        base = as_pyro(factor).to_event(event_dim)
    if site.is_real:
        return base
    # The cache gives log_prob of a draw the very u it came from, where inverting is inexact.
    return dist.TransformedDistribution(base, [site.transform.with_cache(1)])


def _blocks(
    family: Family, params: Params, shape: torch.Size, event_dim: int
) -> FamilyDistribution:
    batch = shape[: len(shape) - event_dim]
    is_whole = spans_site(family)
    view = (shape.numel(),) if is_whole else (*batch, shape[len(batch) :].numel())
    return FamilyDistribution(family, params, shape, event_dim=event_dim, view=view)


def as_pyro(distribution: Any) -> Any:
    """The same distribution in Pyro's class, for ``pyro.sample``; families are pure torch."""
    wrapped: Any = object.__new__(_pyro_class(distribution.__class__))
    wrapped.__dict__.update(vars(distribution))
    return wrapped


@cache
def _pyro_class(torch_class: Any) -> Any:
    wrapped = getattr(dist, torch_class.__name__, None)
    return wrapped or type(torch_class.__name__, (torch_class, TorchDistributionMixin), {})
