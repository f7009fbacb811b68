"""Are numbers uniform on (0, 1)? Simultaneous bands of their ECDF, with exact probabilities.

The count of numbers below a point is binomial, and from one point to the next a Markov chain. So
the probability that an ECDF stays inside a band at all points at once is a product of matrices, and
neither simulations nor asymptotics are needed, however small the probability.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

_MAX_POINTS = 100  # at which an ECDF is looked at
# Standard deviations around the expected count beyond which a count is taken for impossible, and
# levels at which probabilities are tabulated. The next tabulated level above is what counts.
_WINDOW = 7.5
_LEVELS = np.logspace(-14.0, 0.0, 281)


class Band(NamedTuple):
    """Where an ECDF stays with a given probability.

    Args:
        points: Points in (0, 1), shape ``(K,)``.
        lower: Lowest values that the ECDF may have there.
        upper: Highest values.
    """

    points: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def points_for(num: int) -> np.ndarray:
    """Where the ECDF of so many numbers is looked at: evenly spaced, up to 99 points."""
    count = min(num, _MAX_POINTS)
    return np.arange(1, count) / count


def uniform_band(num: int, probability: float) -> Band:
    """The band that the ECDF of independent uniform numbers stays in.

    At every point it is the interval of a binomial, all of the same probability.

    Args:
        num: How many numbers N, at least 2.
        probability: That the ECDF is inside at all points, in (0, 1); the band has at least that.

    Example:
        >>> band = uniform_band(100, 0.95)
        >>> middle = band.points.searchsorted(0.5)
        >>> band.lower[middle].round(2).item(), band.upper[middle].round(2).item()
        (0.36, 0.64)

    References:
        Säilynoja, Bürkner and Vehtari (2022), Graphical test for discrete uniformity and its
        applications in goodness-of-fit evaluation and multiple sample comparison,
        https://arxiv.org/abs/2103.10522
    """
    missed = _miss_probabilities(num)
    below = np.flatnonzero(missed <= 1.0 - probability)
    level = _LEVELS[below[-1]] if len(below) else _LEVELS[0]
    points = points_for(num)
    inside = _tails(num, points) > level
    counts = np.arange(num + 1)
    lower = np.where(inside, counts, num).min(1)
    upper = np.where(inside, counts, 0).max(1)
    return Band(points, lower / num, upper / num)


def uniformity_test(values: np.ndarray) -> np.ndarray:
    """Test each column for uniformity on (0, 1) by how far its ECDF leaves the diagonal.

    Args:
        values: Numbers in [0, 1], independent from row to row, shape ``(N, P)``.

    Returns:
        A p-value per column, shape ``(P,)``: the probability that uniform numbers leave the
        narrowest band that these leave, exact but for rounding up to the next of 281 levels.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> u = rng.random((200, 1))
        >>> [float(p.round(3)) for p in (uniformity_test(u)[0], uniformity_test(u**1.5)[0])]
        [0.121, 0.0]

    References:
        Säilynoja, Bürkner and Vehtari (2022), https://arxiv.org/abs/2103.10522
    """
    num = len(values)
    points = points_for(num)
    counts = (values[:, None, :] <= points[:, None]).sum(0)
    level = np.take_along_axis(_tails(num, points), counts, 1).min(0)
    above = np.searchsorted(_LEVELS, level * (1.0 - 1e-9))
    found: np.ndarray = _miss_probabilities(num)[np.minimum(above, len(_LEVELS) - 1)]
    return found


def _tails(num: int, points: np.ndarray) -> np.ndarray:
    """Twice the smaller tail of every count at every point, shape ``(K, N + 1)``."""
    from scipy.stats import binom

    counts = np.arange(num + 1)
    smaller: np.ndarray = np.minimum(
        binom.cdf(counts, num, points[:, None]), binom.sf(counts - 1, num, points[:, None])
    )
    return 2.0 * smaller


@lru_cache(maxsize=32)
def _miss_probabilities(num: int) -> np.ndarray:
    """Probability of leaving, somewhere, the band of each level, shape ``(levels,)``."""
    from scipy.stats import binom

    points = points_for(num)
    tails = _tails(num, points)
    reach = _WINDOW * np.sqrt(num * points * (1.0 - points)) + 2.0
    starts = np.maximum(0, np.floor(num * points - reach)).astype(int)
    stops = np.minimum(num, np.ceil(num * points + reach)).astype(int)
    counts, before = np.zeros(1, dtype=int), 0.0
    inside = np.ones((len(_LEVELS), 1))
    for k, point in enumerate(points):
        new = np.arange(starts[k], stops[k] + 1)
        share = (point - before) / (1.0 - before)
        step = binom.pmf(new - counts[:, None], num - counts[:, None], share)
        inside = inside @ step * (tails[k][new] > _LEVELS[:, None])
        counts, before = new, point
    missed: np.ndarray = np.clip(1.0 - inside.sum(1), 0.0, 1.0)
    return missed
