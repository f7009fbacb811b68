"""Which family each site needs: the simplest whose fit to the posterior is as good as any.

Draws of the posterior answer for the forward KL: a family is fitted to one half of them and judged
by its log likelihood of the other. For the reverse KL there are no draws; there the optimum of
flexible factors tells by how many nats it differs from a Normal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pyro_mf.density.sites import Layout, Site
from pyro_mf.families import Family, Normal, get_family
from pyro_mf.families.protocol import Params, event_dim_of, home_of
from pyro_mf.guides.site_families import cut, kind_of_support
from pyro_mf.solvers.posterior_draws import PosteriorDraws

# Simplest first; a site's own native families come between the Normal and these.
_FLEXIBLE = ("sinh_arcsinh", "spline")
_NATIVE = ("gamma", "inverse_gamma", "beta", "von_mises")
# Nats per element by which a family must be better than a simpler one (an sd that is 3 % off costs
# as much), and standard errors.
_LEAST_GAIN, _Z = 0.001, 3.0
# Nats of an element up to which a simpler factor is as good as the flexible one.
_LEAST_DIVERGENCE = 0.005
_NODES = 400


def choose_by_draws(
    layout: Layout, draws: PosteriorDraws, first: Tensor, sites: Collection[str]
) -> dict[str, Family]:
    """Choose by the log likelihood of held-out draws.

    Args:
        layout: The latent sites.
        draws: Draws of the posterior.
        first: Which of them make up the first half, shape ``(S,)``.
        sites: Names of the sites to choose for.

    Returns:
        A family per site: the simplest to which no other is preferred in any of its elements.
    """
    chosen = [site for site in layout.sites if site.name in sites]
    return {site.name: _best_for(site, draws, first) for site in chosen}


def choose_by_optimum(
    layout: Layout, family: Family, params: Params, sites: Collection[str]
) -> dict[str, Family]:
    """Choose by how near simpler factors are to optimal flexible ones.

    Args:
        layout: The latent sites.
        family: The flexible families that were fitted, over the flat vector.
        params: Their parameters at the optimum of the reverse KL.
        sites: Names of the sites to choose for.

    Returns:
        A family per site: the simplest that is within a few thousandths of a nat of the flexible
        one in every element, else that one.
    """
    chosen = {}
    for site in layout.sites:
        if site.name in sites:
            own, own_params = cut(family, params, site)
            simpler = [f for f in _candidates(site) if f.name not in _FLEXIBLE]
            near = (f for f in simpler if _is_near(f, own, own_params, site))
            chosen[site.name] = own if site.is_circular else next(near, own)
    return chosen


def describe_choice(families: Mapping[str, Family]) -> str:
    """The families in a sentence."""
    by_name: dict[str, list[str]] = {}
    for site, family in families.items():
        by_name.setdefault(family.name, []).append(site)
    if len(by_name) == 1:
        return f"'auto' chose {next(iter(by_name))} factors for every site that was left to it"
    chosen = "; ".join(f"{name} for {', '.join(sites)}" for name, sites in by_name.items())
    return f"'auto' chose {chosen}"


def _candidates(site: Site) -> list[Family]:
    kind = kind_of_support(site)
    native = [get_family(name) for name in _NATIVE]
    at_home = [family for family in native if home_of(family) == kind and not event_dim_of(family)]
    if kind == "circular":
        return at_home
    return [Normal(), *at_home, *(get_family(name) for name in _FLEXIBLE)]


def _best_for(site: Site, draws: PosteriorDraws, first: Tensor) -> Family:
    candidates = _candidates(site)
    scores = [_held_out(family, site, draws, first) for family in candidates]
    best, best_score = candidates[0], scores[0]
    for family, score in zip(candidates[1:], scores[1:], strict=True):
        if _is_better(score - best_score, draws, first):
            best, best_score = family, score
    return best


def _held_out(family: Family, site: Site, draws: PosteriorDraws, first: Tensor) -> Tensor:
    """Log likelihood of every draw under factors fitted to the other half, ``(S, size)``."""
    u = draws.z[:, site.start : site.stop]
    log_prob = torch.empty_like(u)
    for half in (first, ~first):
        params = family.fit_weighted(u[~half], draws.log_weights[~half])
        log_prob[half] = family.log_prob(params, u[half])
    return log_prob


def _is_better(gain: Tensor, draws: PosteriorDraws, first: Tensor) -> bool:
    """Whether the mean gain of some element is large, and surely so."""
    weights = draws.weights
    mean = weights @ gain
    # Of the halves, whose draws may depend on each other within but hardly across.
    halves = [weights[half] @ gain[half] / weights[half].sum() for half in (first, ~first)]
    apart = (halves[0] - halves[1]).abs() / 2.0
    independent = (weights.square() @ (gain - mean).square()).sqrt()
    error = torch.maximum(apart, independent)
    allowed = _Z + math.sqrt(2.0 * math.log(max(1, len(mean))))  # the largest of so many
    return bool(((mean > _LEAST_GAIN) & (mean > allowed * error)).any())


def _is_near(simple: Family, family: Family, params: Params, site: Site) -> bool:
    """Whether the best simple factors are near in KL, by quadrature over quantiles."""
    p = (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES
    u = family.quantile(params, p.reshape(-1, *[1] * len(site.unconstrained_shape)).to(params[0]))
    log_prob, u = family.log_prob(params, u).reshape(_NODES, -1), u.reshape(_NODES, -1)
    fitted = simple.fit_weighted(u, torch.zeros(_NODES, dtype=u.dtype))
    far = (log_prob - simple.log_prob(fitted, u)).mean(0)
    return bool((far < _LEAST_DIVERGENCE).all())
