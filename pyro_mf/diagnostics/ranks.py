"""Where the truth of a simulation lies in the posterior that was fitted to it.

For factors on the line it is their distribution function, without Monte Carlo error. Elements that
several coordinates share (simplices, matrices, deterministic sites) are ranked among draws; ties
and the gaps between draws are broken at random, so that exact posteriors give exactly uniform
numbers however few the draws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_mf.density import Layout, LogJoint
from pyro_mf.diagnostics.quantities import Quantities
from pyro_mf.families import Family, Normal
from pyro_mf.families.protocol import event_dim_of
from pyro_mf.guides.site_families import cut

_BISECTIONS = 60
_REACH = 8.2  # normal scores between which a distribution function is looked for


@dataclass(frozen=True, eq=False)
class Approximation:
    """A posterior approximation over the flat unconstrained vector.

    Args:
        family: Family of its marginals.
        params: Their parameters.
        sample: Draws so many flat vectors, from a seed.
    """

    family: Family
    params: tuple[Tensor, ...]
    sample: Callable[[int, int], Tensor]


class Ranks:
    """Probabilities below the truth, a number per scalar parameter in the model's own space.

    Args:
        log_joint: The model at any of the data sets.
        deterministic: Whether to rank ``pyro.deterministic`` sites, too.
        num_draws: Draws S for what has no closed form.
    """

    def __init__(self, log_joint: LogJoint, *, deterministic: bool, num_draws: int) -> None:
        self._layout: Layout = log_joint.layout
        self._deterministic, self.num_draws = deterministic, num_draws
        self._num_latent = sum(site.shape.numel() for site in self._layout.sites)
        self._quantities = Quantities(log_joint)
        names = self._quantities.names
        self.names = names if deterministic else names[: self._num_latent]

    def __call__(
        self, log_joint: LogJoint, approximation: Approximation, truth: Tensor, seed: int
    ) -> tuple[np.ndarray, bool]:
        """Rank a truth.

        Args:
            log_joint: The model at the data of the truth.
            approximation: What was fitted to them.
            truth: Flat unconstrained vector, shape ``(D,)``.
            seed: Seed of draws and of what breaks ties.

        Returns:
            Probabilities, shape ``(P,)``, and whether some are by draws.
        """
        found = np.full(len(self.names), np.nan)
        start = 0
        for site in self._layout.sites:
            stop = start + site.shape.numel()
            family, params = cut(approximation.family, approximation.params, site)
            if site.is_elementwise and not event_dim_of(family):
                u = truth[site.start : site.stop].reshape(site.unconstrained_shape)
                p = probability_below(family, params, u)
                one = torch.ones_like(u)
                # A map to a support with an upper bound alone turns the axis around.
                p = torch.where(site.transform(one) > site.transform(-one), p, 1.0 - p)
                found[start:stop] = p.reshape(-1).numpy()
            start = stop
        missing = np.isnan(found)
        if missing.any():
            rows = torch.cat([truth[None], approximation.sample(self.num_draws, seed).double()])
            values = self._values(log_joint, rows)[:, missing]
            found[missing] = rank_among(values[0], values[1:], seed)
        return found, bool(missing.any())

    def _values(self, log_joint: LogJoint, z: Tensor) -> np.ndarray:
        if self._deterministic:
            quantities = copy.copy(self._quantities)  # with the shapes that it has found
            quantities.log_joint = log_joint
            return quantities.at(z).numpy()
        values = self._layout.constrain(z)
        return torch.cat([v.reshape(len(z), -1).double() for v in values.values()], 1).numpy()


def probability_below(family: Family, params: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """Distribution function of every factor, from its quantiles where it is not Normal.

    Args:
        family: A family of numbers, not of vectors.
        params: Its parameters.
        u: Where, on the unconstrained axis, of the factors' batch shape.

    Example:
        >>> params = (torch.zeros(2), torch.ones(2))
        >>> probability_below(Normal(), params, torch.tensor([0.0, 1.96])).numpy().round(3).tolist()
        [0.5, 0.975]
    """
    params = tuple(p.detach().double().cpu() for p in params)
    u = u.double().cpu()
    if isinstance(family, Normal):
        loc, scale = params
        return torch.special.ndtr((u - loc) / scale)  # type: ignore[no-any-return]
    low, high = torch.full_like(u, -_REACH), torch.full_like(u, _REACH)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        is_below = family.quantile(params, torch.special.ndtr(middle)) < u
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return torch.special.ndtr((low + high) / 2.0)  # type: ignore[no-any-return]


def rank_among(truth: np.ndarray, draws: np.ndarray, seed: int) -> np.ndarray:
    """Rank among draws as a number in (0, 1), exactly uniform where truth and draws are alike.

    Args:
        truth: Shape ``(P,)``.
        draws: Shape ``(S, P)``.
        seed: Seed of what breaks ties.

    Example:
        >>> draws = np.arange(9.0)[:, None]
        >>> bool(0.5 < rank_among(np.array([4.5]), draws, 0)[0] < 0.6)
        True

    References:
        Talts, Betancourt, Simpson, Vehtari and Gelman (2018), Validating Bayesian Inference
        Algorithms with Simulation-Based Calibration, https://arxiv.org/abs/1804.06788
    """
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    chance = np.random.default_rng(seed).random(len(truth))
    ranked: np.ndarray = (below + chance * (ties + 1)) / (len(draws) + 1)
    return ranked
