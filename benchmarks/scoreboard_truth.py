"""What is a bad fit? Its errors, with how well they are known, and verdicts held against them.

Errors are of what a user reads off: mean, sd and quantiles of a parameter in the model's own space.
A parameter is bad if its mean is off by over a quarter of the reference's sd, or its sd by over a
quarter; a fit is bad if one of its parameters is. *Edge* is what two standard errors, of our draws
and the reference's together, could turn over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.scoring import QUANTILES

LIMIT = 0.25  # of a mean, in reference sds, and of an sd, relative
STATUSES = ("green", "amber", "red", "failed")
_STANDARD_ERRORS = 2.0


class Moments(NamedTuple):
    """A parameter under an approximation, with Monte Carlo errors of mean and sd."""

    mean: float
    sd: float
    quantiles: tuple[float, ...]
    mean_se: float
    sd_se: float

    @classmethod
    def of(cls, batches: np.ndarray, error: float = 0.0) -> Moments:
        """From batches of draws ``(B, S)``, each of them as good as the whole.

        Args:
            batches: The draws. Errors are told from how much batches differ.
            error: Of mean, in sds, and sd, relative, that no batch shows.
        """
        mean = float(batches.mean())
        square = np.square(batches - mean).mean(1)
        sd = math.sqrt(square.mean())
        root = math.sqrt(len(batches))
        mean_se = float(batches.mean(1).std(ddof=1)) / root
        sd_se = float(square.std(ddof=1)) / root / max(2 * sd, np.finfo(float).tiny)
        at = tuple(np.quantile(batches, [0.05, 0.5, 0.95]).tolist())
        return cls(mean, sd, at, math.hypot(mean_se, error * sd), math.hypot(sd_se, error * sd))


class Truth(NamedTuple):
    """Whether something is bad, and whether that is a matter of luck."""

    bad: bool
    edge: bool

    def __str__(self) -> str:
        return ("bad" if self.bad else "good") + (", edge" if self.edge else "")


@dataclass(frozen=True)
class Error:
    """A parameter's error; fields are numbers, so that it can be a line of JSON.

    Args:
        mean: Of the mean, in reference sds, signed.
        mean_se: Its standard error.
        ratio: The sd over the reference's.
        ratio_se: Its standard error.
        quantiles: Of the 5, 50 and 95 % quantiles, in reference sds, signed.
    """

    mean: float
    mean_se: float
    ratio: float
    ratio_se: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, found: Moments, reference: Mapping[str, float]) -> Error:
        """The error against a row of a reference."""
        sd = reference["sd"]
        ratio = found.sd / sd
        off = (x - reference[q] for x, q in zip(found.quantiles, QUANTILES, strict=True))
        return cls(
            (found.mean - reference["mean"]) / sd,
            math.hypot(found.mean_se, reference["mcse_mean"]) / sd,
            ratio,
            math.hypot(found.sd_se, ratio * reference["mcse_sd"]) / sd,
            tuple(x / sd for x in off),
        )

    @property
    def truth(self) -> Truth:
        """See the module."""
        excess = (abs(self.mean) - LIMIT, abs(self.ratio - 1) - LIMIT)
        if not all(map(math.isfinite, excess)):
            return Truth(bad=True, edge=False)
        errors = (_STANDARD_ERRORS * self.mean_se, _STANDARD_ERRORS * self.ratio_se)
        pairs = list(zip(excess, errors, strict=True))
        if any(x > 0 for x in excess):
            return Truth(bad=True, edge=not any(x > se for x, se in pairs))
        return Truth(bad=False, edge=any(x > -se for x, se in pairs))

    @property
    def size(self) -> float:
        """The larger of the errors of mean and sd, both in units of the limit."""
        sizes = abs(self.mean) / LIMIT, abs(self.ratio - 1) / LIMIT
        return max(sizes) if all(map(math.isfinite, sizes)) else math.inf

    @property
    def log_sd(self) -> float:
        """|log sd ratio|."""
        return abs(math.log(self.ratio)) if 0 < self.ratio < math.inf else math.inf

    @property
    def worst_quantile(self) -> float:
        """The largest error of a quantile, in reference sds."""
        return max(map(abs, self.quantiles))


def whole(truths: Iterable[Truth]) -> Truth:
    """Of a fit, from those of its parameters: the worst of them."""
    truths = list(truths)
    bad = [truth for truth in truths if truth.bad]
    if bad:
        return Truth(bad=True, edge=all(truth.edge for truth in bad))
    return Truth(bad=False, edge=any(truth.edge for truth in truths))


def from_zero(name: str) -> str:
    """``theta[1,2]`` of a reference as a summary calls it: ``theta[0,1]``."""
    return re.sub(
        r"\[([\d,]+)\]",
        lambda at: "[" + ",".join(str(int(i) - 1) for i in at[1].split(",")) + "]",
        name,
    )


class Confusion:
    """Counts of verdicts against truth; those on the edge are counted apart, too."""

    def __init__(self, judged: Iterable[tuple[str, Truth]] = ()) -> None:
        self.counts: dict[tuple[str, bool, bool], int] = {}
        for status, truth in judged:
            key = status, truth.bad, truth.edge
            self.counts[key] = self.counts.get(key, 0) + 1

    def count(self, status: str | None = None, **wanted: bool) -> int:
        """How many have this verdict (any by default) and this truth (``bad=``, ``edge=``)."""
        return sum(
            number
            for (verdict, bad, edge), number in self.counts.items()
            if status in {None, verdict} and wanted.items() <= {"bad": bad, "edge": edge}.items()
        )

    @property
    def green_share(self) -> float:
        """The share of good ones that are green; NaN without any."""
        good = self.count(bad=False)
        return self.count("green", bad=False) / good if good else math.nan

    def cells(self) -> list[str]:
        """Per verdict, good and bad ones, and how many of them lie on the edge."""
        return [self._cell(status, bad=bad) for status in STATUSES for bad in (False, True)]

    def _cell(self, status: str, *, bad: bool) -> str:
        number = self.count(status, bad=bad)
        edge = self.count(status, bad=bad, edge=True)
        return f"{number} ({edge} edge)" if edge else str(number)


def read_errors(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, Error]:
    """Errors by parameter from a line of JSON, which has other fields, too."""
    return {
        name: Error(
            row["mean"], row["mean_se"], row["ratio"], row["ratio_se"], tuple(row["quantiles"])
        )
        for name, row in parameters.items()
    }
