"""The table of a fit: mean, sd and quantiles of every scalar element, in the model's own space.

Where a site is mapped element by element, moments are one-dimensional integrals and computed by
quadrature, exactly for real sites. Simplices, ordered vectors and matrices are drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.families import Family, Normal
from pyro_mf.families.protocol import event_dim_of
from pyro_mf.guides.discrete_factors import DiscreteSite
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.site_families import cut

if TYPE_CHECKING:
    import pandas as pd

    from pyro_mf.density import Site
    from pyro_mf.fitting.result import FitResult
    from pyro_mf.solvers.posterior_draws import PosteriorDraws

_DRAWS = 4000
# Draws of the posterior that are mapped to the model's space: as many as make so many numbers, and
# these at least.
_MAX_NUMBERS, _LEAST_DRAWS = 10_000_000, 20_000
_NODES = 128  # of a Gauss-Hermite rule: exact to rounding for exp(u) with sds up to about 5
_GRID = 4001  # quantiles that stand for a factor of another family
_PROBABILITIES = (0.05, 0.5, 0.95)


class Moments(NamedTuple):
    """Mean and sd of a site's elements, each ``(*shape)``, and quantiles ``(3, *shape)``."""

    mean: Tensor
    sd: Tensor
    quantiles: Tensor


@dataclass(frozen=True)
class Factors:
    """Factors over the flat unconstrained vector.

    Args:
        family: Their family.
        params: Its parameters.
    """

    family: Family
    params: tuple[Tensor, ...]

    def moments(self, site: Site) -> Moments | None:
        """Moments of one site in the model's space; ``None`` unless mapped by element.

        For vectors of a block family, too, ``None``: they are drawn.
        """
        if not site.is_elementwise:
            return None
        # In double precision, in which the tail of a wide factor does not overflow.
        family, own = cut(self.family, self.params, site)
        if event_dim_of(family):
            return None
        params = tuple(p.double() for p in own)
        if isinstance(family, Normal):
            x, w = np.polynomial.hermite_e.hermegauss(_NODES)
            noise, weights = torch.as_tensor(x), torch.as_tensor(w / w.sum())
            nodes = family.transform(params, _leading(noise.to(params[0]), site))
        else:
            grid = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
            weights = torch.full_like(grid, 1 / _GRID)
            nodes = family.quantile(params, _leading(grid.to(params[0].device), site))

        values = site.transform(nodes)
        mean, sd = _mean_and_sd(values, weights.to(values))
        at = torch.tensor(_PROBABILITIES, dtype=torch.float64, device=values.device)
        # Sorted, since a map to a support with an upper bound turns the axis around.
        ordered = site.transform(family.quantile(params, _leading(at, site))).sort(0).values
        return Moments(mean, sd, ordered)


def _leading(x: Tensor, site: Site) -> Tensor:
    """Numbers ``(N,)`` along a dimension before those of a site."""
    return x.reshape(-1, *[1] * len(site.unconstrained_shape))


def summarise(result: FitResult, *, deterministic: bool = False) -> pd.DataFrame:
    """See :meth:`pyro_mf.FitResult.summary`.

    Raises:
        ModelError: If deterministic sites are asked for and the model subsamples its data.
    """
    import pandas as pd

    if deterministic:
        _require_full_data(result)
    guide, factors = result.guide, None
    if isinstance(guide, FlatGuide):
        factors = Factors(guide.family, tuple(p.detach() for p in guide.flat_params()))
    plain = _moments(result, factors, linear_response=False, deterministic=deterministic)
    labels = [_probabilities(s, guide.probs(s.name)) for s in getattr(guide, "discrete_sites", ())]
    if not plain:
        return pd.concat(labels)
    if result.draws is not None:
        known = _of_posterior(result, result.draws, deterministic=deterministic)
        table = pd.concat([_table(site, m, known[site], "draws") for site, m in plain.items()])
        table.attrs = {"believe": "sd_draws"}
        return table
    corrected: dict[str, Moments] = {}
    response = result.known_response()
    if response.found is not None:
        like = result.log_joint
        params = (x.to(like.device, like.dtype) for x in (response.found.loc, response.found.sd))
        factors = Factors(Normal(), tuple(params))
        corrected = _moments(result, factors, linear_response=True, deterministic=deterministic)
    tables = [_table(site, m, corrected.get(site), "lr") for site, m in plain.items()]
    table = pd.concat([*tables, *labels])
    table.attrs = {"believe": "sd_lr" if response.is_better(result.outcome) else "sd"}
    if response.refusal:
        table.attrs["linear_response"] = response.refusal
    return table


def _require_full_data(result: FitResult) -> None:
    try:
        _ = result.log_joint
    except ModelError as error:
        raise ModelError(
            "summary(deterministic=True) runs the model at draws, which needs the full data; "
            f"summary() does not. Leave deterministic= out. ({error})"
        ) from error


def _moments(
    result: FitResult, factors: Factors | None, *, linear_response: bool, deterministic: bool
) -> dict[str, Moments]:
    found = {}
    for site in result.layout.sites:
        exact = None if factors is None else factors.moments(site)
        found[site.name] = exact
    if deterministic or None in found.values():
        z = result.sample_unconstrained(_DRAWS, linear_response=linear_response)
        draws = result.layout.constrain(z)
        if deterministic:
            draws |= result.log_joint.evaluate(z).deterministics
        found = {name: found.get(name) or _of_draws(values) for name, values in draws.items()}
    return {name: moments for name, moments in found.items() if moments is not None}


def _of_posterior(
    result: FitResult, draws: PosteriorDraws, *, deterministic: bool
) -> dict[str, Moments]:
    """Moments of the posterior as its weighted draws know them."""
    z, weights = draws.z, draws.weights
    most = max(_LEAST_DRAWS, _MAX_NUMBERS // z.shape[1])
    if len(z) > most:
        z = draws.sample(most, seed=result.seed)
        weights = torch.full((most,), 1.0 / most, dtype=z.dtype)
    like = result.log_joint
    z = z.to(dtype=like.dtype, device=like.device)
    values = result.layout.constrain(z)
    if deterministic:
        values |= like.evaluate(z).deterministics
    found = {}
    for name, x in values.items():
        mean, sd = _mean_and_sd(x.double().cpu(), weights)
        found[name] = Moments(mean, sd, mean.expand(3, *mean.shape))
    return found


def _table(site: str, plain: Moments, corrected: Moments | None, suffix: str) -> pd.DataFrame:
    import pandas as pd

    unknown = torch.full_like(plain.mean, torch.nan)
    columns = {
        "mean": plain.mean,
        "sd": plain.sd,
        f"mean_{suffix}": unknown if corrected is None else corrected.mean,
        f"sd_{suffix}": unknown if corrected is None else corrected.sd,
    }
    columns |= {f"{p:.0%}": q for p, q in zip(_PROBABILITIES, plain.quantiles, strict=True)}
    return pd.DataFrame(
        {name: values.cpu().double().numpy().ravel() for name, values in columns.items()},
        index=_element_names(site, plain.mean.shape),
    )


def _probabilities(site: DiscreteSite, probs: Tensor) -> pd.DataFrame:
    """Probabilities of a discrete site's values, a column for each value."""
    import pandas as pd

    values = probs.detach().cpu().double().reshape(-1, site.num_values).numpy()
    columns = {f"P({value})": column for value, column in enumerate(values.T)}
    return pd.DataFrame(columns, index=_element_names(site.name, site.shape))


def _of_draws(draws: Tensor) -> Moments:
    draws = draws.double()
    at = torch.tensor(_PROBABILITIES, dtype=draws.dtype, device=draws.device)
    mean, sd = _mean_and_sd(draws, draws.new_full((len(draws),), 1 / len(draws)))
    return Moments(mean, sd, torch.quantile(draws, at, dim=0))


def _mean_and_sd(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.tensordot(weights, values, 1)
    return mean, torch.tensordot(weights, (values - mean).square(), 1).sqrt()


def _element_names(site: str, shape: torch.Size) -> list[str]:
    indices = itertools.product(*map(range, shape))
    return [f"{site}[{','.join(map(str, index))}]" if index else site for index in indices]
