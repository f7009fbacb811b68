"""What ``print(result)`` shows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyro_mf.fitting.progress import with_error
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.objectives import ForwardKL

if TYPE_CHECKING:
    from pyro_mf.fitting.result import FitResult
    from pyro_mf.solvers.outcome import Forward

_WIDTH = 100
_INDENT = 18
_VERDICTS = {
    "converged": "converged",
    "budget": "NOT CONVERGED, the budget is spent",
    "interrupted": "INTERRUPTED, the best so far",
    "diverged": "DIVERGED, not to be used",
}


def one_line(result: FitResult) -> str:
    """A line for lists and debuggers."""
    elbo = with_error(result.elbo, result.elbo_se)
    seconds = sum(result.seconds.values())
    return (
        f"FitResult({result.problem.name}: {result.stop_reason}, ELBO {elbo}, {result.solver}, "
        f"{result.num_gradients} gradients, {seconds:.2f} s)"
    )


def report(result: FitResult) -> str:
    """The report of a few lines.

    Args:
        result: A result.
    """
    lines = [
        f"Mean-field fit of '{result.problem.name}': {_VERDICTS[result.stop_reason]}",
        _line("ELBO", f"{with_error(result.elbo, result.elbo_se)} nats"),
        _line("latents", _latents(result)),
        _line("solver", f"{result.solver}: {result.reason}"),
        _line("stopped", result.message),
        _line("cost", _cost(result)),
    ]
    forward = result.outcome.forward
    if forward is None and not isinstance(result.problem.objective, ForwardKL):
        lines.append(_line("linear response", _linear_response(result)))
    elif forward is not None:
        lines += [
            _line("EUBO", f"{with_error(forward.eubo, forward.eubo_se)} nats"),
            _line("log evidence", _evidence(forward)),
        ]
    if (believe := _believe(result)) is not None:
        lines.append(_line("sds to believe", believe))
    for verdict in result.verdicts.values():
        lines.append(_line("verdict", f"{verdict.status}: {verdict.headline}"))
    if not result.verdicts:
        lines.append(_line("verdict", "none yet; ask result.diagnose()"))
    if len(result.restarts) > 1:
        elbos = ", ".join(f"{optimum.outcome.elbo:.2f}" for optimum in result.restarts)
        lines.append(_line("restarts", f"ELBOs {elbos}"))
    lines += [_line("note", note) for note in result.notes]
    return "\n".join(lines)


def _latents(result: FitResult) -> str:
    guide = result.guide
    if not isinstance(guide, FlatGuide):
        return f"those of the guide, {getattr(guide, '__name__', type(guide).__name__)}"
    labels = getattr(guide, "discrete_sites", ())
    parts = []
    if guide.layout.sites:
        parts.append(f"{guide.layout.size} unconstrained elements: {_listed(guide.layout.sites)}")
    if labels:
        count = sum(site.shape.numel() for site in labels)
        parts.append(f"{count} discrete elements: {_listed(labels)}")
    return "; ".join(parts)


def _listed(sites: Sequence[Any]) -> str:
    names = [f"{s.name} {list(s.shape)}" if s.shape else s.name for s in sites]
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _cost(result: FitResult) -> str:
    phases = ", ".join(f"{name} {s:.2f}" for name, s in result.seconds.items() if s >= 0.005)
    total = sum(result.seconds.values())
    return f"{result.num_gradients} gradients, {total:.2f} s" + (f" ({phases})" if phases else "")


def _linear_response(result: FitResult) -> str:
    response = result.response
    if response is None:
        return "not computed yet; call result.linear_response()"
    if response.found is None:
        return f"none: {response.refusal}"
    found = response.found
    ratio = found.sd / result.restarts[result.best].params[1].to(found.sd)
    index = int(ratio.argmax())
    return (
        f"sds are {float(ratio.median()):.2f} times the mean-field's (median), at most "
        f"{float(ratio[index]):.2f} times ('{result.layout.element_names()[index]}')"
    )


def _evidence(forward: Forward) -> str:
    lower, upper = with_error(*forward.bounds[:2]), with_error(*forward.bounds[2:])
    text = f"from {lower} to {upper} nats, by the best approximation known"
    numbers = forward.draws.diagnostics
    if "log_evidence" in numbers and not forward.draws.problems:
        estimate = with_error(numbers["log_evidence"], numbers["log_evidence_se"])
        text += f"; {estimate} by importance sampling"
    return text


def _believe(result: FitResult) -> str | None:
    response = result.response
    if result.draws is not None:
        return (
            "sd_draws: those of the draws of the posterior; the factors have the same on the "
            "unconstrained axis"
        )
    if response is None or response.found is None:
        return None
    elbo = with_error(response.elbo, response.elbo_se)
    if response.is_better(result.outcome):
        return f"sd_lr: the Gaussian of linear response has the higher ELBO, {elbo}"
    return f"sd: the Gaussian of linear response has the lower ELBO, {elbo}"


def _line(label: str, text: str) -> str:
    first = f"  {label}".ljust(_INDENT)
    return textwrap.fill(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
    )
