"""The content of a saved fit, checked part by part, since anybody can write a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import Tensor

from pyro_mf._errors import CheckpointError
from pyro_mf.fitting.response import Response
from pyro_mf.fitting.restarts import Optimum
from pyro_mf.solvers.evidence import EvidenceBounds
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.outcome import Forward, Outcome, StopReason
from pyro_mf.solvers.posterior_draws import PosteriorDraws, Source

_SOLVERS = ("deterministic", "stochastic", "moment_matching")
_NUMBER = (int, float)


class Densities(NamedTuple):
    """The log joint at a few points, by which a model with its data is known again.

    Args:
        points: Unconstrained vectors, shape ``(S, D)``.
        values: Log joint in nats at each.
    """

    points: Tensor
    values: list[float]


class Saved(NamedTuple):
    """A file's content, read as far as that needs no model."""

    guide: dict[str, Any]
    data: str
    model_params: dict[str, Tensor]
    restarts: tuple[Optimum, ...]
    densities: Densities | None
    fields: dict[str, Any]


def parse(path: Path, content: Mapping[str, Any]) -> Saved:
    """Read a file's content.

    Raises:
        CheckpointError: If a part is missing, or is not what it should be.
    """
    try:
        return _saved(content)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"'{path}' lacks a part of a fit, or has something else in its place "
            f"({type(error).__name__}: {error}). Save it again."
        ) from error


def _saved(content: Mapping[str, Any]) -> Saved:
    restarts = tuple(map(_optimum, _part(content, "restarts", list)))
    best = _part(content, "best", int)
    _require(0 <= best < len(restarts), f"best is {best}, of {len(restarts)} restarts")
    shapes = [[list(p.shape) for p in optimum.params] for optimum in restarts]
    _require(all(s == shapes[best] for s in shapes), f"restarts have parameters of shapes {shapes}")
    solver = _part(content, "solver", str)
    _require(solver in _SOLVERS, f"solver is {solver!r}")
    fields = {
        "solver": solver,
        "reason": _part(content, "reason", str),
        "seed": _part(content, "seed", int),
        "best": best,
        "seconds": _mapping(content, "seconds", _NUMBER),
        "notes": tuple(_list(content, "notes", str)),
        "response": _response(content["response"]),
    }
    return Saved(
        _guide(_part(content, "guide", dict)),
        _part(content, "data", str),
        _mapping(content, "model_params", Tensor),
        restarts,
        _densities(content.get("densities")),
        fields,
    )


def _guide(content: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: _part(content, name, str) for name in ("class", "kind")}
    if own["kind"] == "flat":
        sites = _list(content, "sites", list)
        for name, shape, unconstrained_shape, support in sites:
            lengths = [name, support, *shape, *unconstrained_shape]
            _require(all(isinstance(x, str) for x in lengths[:2]), f"a site is {name!r}")
            _require(all(type(x) is int for x in lengths[2:]), f"the shape of {name!r} is {shape}")
        families = _part(content, "families", dict)
        for site, described in families.items():
            is_pair = isinstance(described, list) and len(described) == 2
            _require(
                is_pair and isinstance(described[0], str) and isinstance(described[1], dict),
                f"the family of {site!r} is {described!r}",
            )
        return {**own, "families": families, "sites": sites}
    _require(own["kind"] == "module", f"the kind of guide is {own['kind']!r}")
    return {**own, "state": _part(content, "state", dict)}


def _optimum(entry: Mapping[str, Any]) -> Optimum:
    reason = _part(entry, "stop_reason", str)
    _require(reason in get_args(StopReason), f"stop_reason is {reason!r}")
    losses = _part(entry, "losses", Tensor)
    _require(losses.dim() == 1, f"losses have shape {tuple(losses.shape)}")
    outcome = Outcome(
        elbo=_part(entry, "elbo", _NUMBER),
        elbo_se=_part(entry, "elbo_se", _NUMBER),
        stop_reason=reason,
        message=_part(entry, "message", str),
        losses=tuple(losses.tolist()),
        num_gradients=_part(entry, "num_gradients", int),
        seconds=_mapping(entry, "seconds", _NUMBER),
        notes=tuple(_list(entry, "notes", str)),
        refusal=_part(entry, "refusal", str),
        state=_part(entry, "state", dict),
        forward=_forward(entry.get("forward")),
    )
    return Optimum(_part(entry, "seed", int), outcome, tuple(_list(entry, "params", Tensor)))


def _forward(content: Mapping[str, Any] | None) -> Forward | None:
    if content is None:  # an older file, or a fit by another objective
        return None
    drawn = _part(content, "draws", dict)
    source = _part(drawn, "source", str)
    _require(source in get_args(Source), f"source is {source!r}")
    names = ("z", "log_weights", "log_density", "mean_error", "sd_error")
    tensors = {name: _part(drawn, name, Tensor) for name in names}
    shapes = [list(x.shape) for x in tensors.values()]
    count, size = shapes[0]
    expected = [[count, size], [count], [count], [size], [size]]
    _require(shapes == expected, f"draws of the posterior have shapes {shapes}")
    bounds = _mapping(content, "bounds", _NUMBER)
    return Forward(
        PosteriorDraws(
            source=source,
            **tensors,
            problems=tuple(_list(drawn, "problems", str)),
            diagnostics=_mapping(drawn, "diagnostics", _NUMBER),
            # Older files do not say.
            noncentred=tuple(_list(drawn, "noncentred", str)) if "noncentred" in drawn else (),
        ),
        _part(content, "eubo", _NUMBER),
        _part(content, "eubo_se", _NUMBER),
        EvidenceBounds(**bounds),
    )


def _response(content: Mapping[str, Any] | None) -> Response | None:
    if content is None:
        return None
    found = None
    if content["found"] is not None:
        loc, covariance = (_part(content["found"], n, Tensor) for n in ("loc", "covariance"))
        shapes = [list(loc.shape), list(covariance.shape)]
        size = loc.numel()
        _require(shapes == [[size], [size, size]], f"the linear response has shapes {shapes}")
        found = LinearResponse(loc, covariance)
    elbo, elbo_se = (_part(content, name, _NUMBER) for name in ("elbo", "elbo_se"))
    return Response(found, _part(content, "refusal", str), elbo, elbo_se)


def _densities(content: Mapping[str, Any] | None) -> Densities | None:
    if content is None:  # an older file, or a model that subsamples
        return None
    points, values = _part(content, "points", Tensor), _list(content, "values", float)
    good = points.is_floating_point() and points.dim() == 2 and len(points) == len(values) > 0
    _require(good, f"densities are {len(values)}, at points of shape {tuple(points.shape)}")
    return Densities(points, values)


def _part(content: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = content[name]
    _require(_is(value, kind), f"{name} is {repr(value):.80}")
    return value


def _list(content: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values: list[Any] = _part(content, name, list)
    _require(all(_is(x, kind) for x in values), f"{name} is {repr(values):.80}")
    return values


def _mapping(
    content: Mapping[str, Any], name: str, kind: type | tuple[type, ...]
) -> dict[str, Any]:
    values: dict[str, Any] = _part(content, name, dict)
    good = all(isinstance(key, str) and _is(x, kind) for key, x in values.items())
    _require(good, f"{name} is {repr(values):.80}")
    return values


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _require(condition: bool, otherwise: str) -> None:  # noqa: FBT001
    if not condition:
        raise ValueError(otherwise)
