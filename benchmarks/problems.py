"""Every posterior of the tables, by name: reference posteriors and logistic regressions."""

from __future__ import annotations

from benchmarks import logistic, posteriors
from benchmarks.posteriors import Posterior

REGRESSIONS = {
    f"{data}, raw" if raw else data: (data, raw) for data in logistic.DATA for raw in (False, True)
}
NAMES = (*posteriors.MODELS, *REGRESSIONS)


def load(name: str) -> Posterior:
    """Load a posterior by its full name; those of regressions come without a reference."""
    if name in REGRESSIONS:
        data, raw = REGRESSIONS[name]
        return logistic.load(data, raw=raw)
    return posteriors.load(name)


def with_reference(posterior: Posterior) -> Posterior:
    """The posterior with its reference, which regressions have to compute."""
    if posterior.reference:
        return posterior
    return posterior._replace(reference=logistic.reference(*posterior.args))


def short_name(name: str) -> str:
    """The model's part of a name."""
    return name.split("-")[-1]
