"""How far two samples are apart jointly: the maximum mean discrepancy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_DRAWS = 1000  # of each sample; kernel matrices of this side
MIN_DRAWS = 50
NUM_SWAPS = 400


@dataclass(frozen=True)
class Discrepancy:
    """A squared maximum mean discrepancy.

    Args:
        mmd2: The unbiased estimate; between equal distributions below zero as often as above.
        mcse: Its standard error.
        floor: The value that samples of one distribution exceed with probability 0.05.
        pvalue: Probability of so large a value between samples of one distribution.
    """

    mmd2: float
    mcse: float
    floor: float
    pvalue: float


UNKNOWN = Discrepancy(np.nan, np.nan, np.nan, np.nan)


def discrepancy(x: np.ndarray, y: np.ndarray, bandwidth: float) -> Discrepancy:
    r"""Squared maximum mean discrepancy of two samples of n independent draws.

    With the kernel :math:`k(x, y) = \exp(-|x - y|^2 / (2 h^2))` the squared distance between the
    mean embeddings of the two distributions is :math:`E k(x, x') + E k(y, y') - 2 E k(x, y)`. It is
    estimated by the U-statistic with
    :math:`h_{ij} = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)`, which is unbiased, and 0
    for a sample and itself. Under equality every pair could as well be swapped, which changes the
    signs of its row and column: random swaps give the null distribution. The standard error is of
    the statistic's first-order projection, with the variance under the null added for the second.

    Args:
        x: Shape (n, P), n at least 2.
        y: Shape (n, P).
        bandwidth: The kernel's h.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(200, 3))
        >>> discrepancy(x, x, 1.0).mmd2, discrepancy(x, x + 1.0, 1.0).pvalue < 0.01
        (0.0, True)

    References:
        Gretton, Borgwardt, Rasch, Schölkopf and Smola (2012), A Kernel Two-Sample Test, JMLR 13,
        https://jmlr.org/papers/v13/gretton12a.html, lemma 6 and section 8
    """
    cross = _kernel(x, y, bandwidth)
    h = _kernel(x, x, bandwidth) + _kernel(y, y, bandwidth) - cross - cross.T
    np.fill_diagonal(h, 0.0)
    n = len(x)
    pairs = n * (n - 1)
    mmd2 = float(h.sum() / pairs)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(n, NUM_SWAPS))
    null = (signs * (h @ signs)).sum(0) / pairs
    projection = h.sum(1) / (n - 1)
    variance = 4 * projection.var(ddof=1) / n + null.var()
    return Discrepancy(
        mmd2=mmd2,
        mcse=float(np.sqrt(variance)),
        floor=float(np.quantile(null, 0.95)),
        pvalue=float((1 + (null >= mmd2).sum()) / (1 + NUM_SWAPS)),
    )


def median_distance(x: np.ndarray) -> float:
    """The median of the distances between the rows of (n, P) draws.

    Args:
        x: At least two rows.
    """
    return float(np.sqrt(np.median(_squares(x, x)[np.triu_indices(len(x), 1)])))


def thin(draws: np.ndarray, count: int) -> np.ndarray:
    """``count`` rows, evenly spaced over all chains.

    Args:
        draws: Shape (chain, draw, P).
        count: At most chains times draws.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    chosen: np.ndarray = flat[np.linspace(0, len(flat) - 1, count).round().astype(int)]
    return chosen


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances between the rows, (n, m)."""
    total = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.asarray(total.clip(min=0.0))


def _kernel(x: np.ndarray, y: np.ndarray, bandwidth: float) -> np.ndarray:
    return np.asarray(np.exp(-_squares(x, y) / (2 * bandwidth**2)))
