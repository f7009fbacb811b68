"""A fit as the content of a file, and back."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_flatten

from pyro_mf._errors import (
    CheckpointError,
    DifferentDataWarning,
    ModelError,
)
from pyro_mf.convert.guide_draws import draw_guide
from pyro_mf.convert.vectorise import forked_seed
from pyro_mf.density import Layout, LogJoint
from pyro_mf.density.prototype import run_prototype
from pyro_mf.families import FAMILIES
from pyro_mf.families.discrete import DISCRETE_FAMILIES
from pyro_mf.fitting.checkpoint import read_file, write_file
from pyro_mf.fitting.problem import Problem, read_problem
from pyro_mf.fitting.response import Response
from pyro_mf.fitting.restarts import Optimum, current_params, restore_params, split_params
from pyro_mf.fitting.saved import Densities, Saved, parse
from pyro_mf.guides.discrete_factors import Kind
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.outcome import Forward

if TYPE_CHECKING:
    from pyro_mf.fitting.result import FitResult

_OUTCOME = (
    "elbo",
    "elbo_se",
    "stop_reason",
    "message",
    "losses",
    "num_gradients",
    "seconds",
    "notes",
    "refusal",
    "state",
)
_KINDS = get_args(Kind)  # of discrete sites, which have these in place of a support
_ROUNDING = {torch.float64: 1e-6}  # of a log joint, relative, on another device
_COARSE_ROUNDING = 1e-3  # in any other dtype
_KNOWN: dict[str, Any] = {**FAMILIES, **DISCRETE_FAMILIES}
_FIELDS = ("solver", "reason", "seed", "best", "seconds", "notes")


def save_result(result: FitResult, path: Path) -> None:
    """See :meth:`pyro_mf.FitResult.save`."""
    problem = result.problem
    with forked_seed(0):  # a model that subsamples draws indices
        prototype = run_prototype(problem.model, problem.model_args, problem.model_kwargs)
    write_file(
        path,
        {
            "guide": _guide_content(problem.guide),
            "data": _digest(problem.model_args, problem.model_kwargs),
            "model_params": dict(prototype.params),
            "densities": _densities_content(problem),
            "restarts": [_entry(optimum) for optimum in result.restarts],
            "response": _response_content(result.response),
            **{name: getattr(result, name) for name in _FIELDS},
        },
    )


def load_result(
    path: Path,
    model: Any,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    guide: Any | None,
) -> FitResult:
    """See :meth:`pyro_mf.FitResult.load`.

    Raises:
        CheckpointError: If the file holds no fit of this model.
    """
    from pyro_mf.fitting.result import FitResult

    saved = parse(path, read_file(path))
    is_flat = saved.guide["kind"] == "flat"
    families = saved.guide["families"] if is_flat else {}
    if guide is None and not (is_flat and all(name in _KNOWN for name, _ in families.values())):
        raise CheckpointError(
            f"'{path}' holds a fit of the guide {saved.guide['class']}, which load cannot make. "
            "Give it a new one for the model as `guide`."
        )
    family = None
    if guide is None:
        family = _families(path, families)
    problem = read_problem(model, model_args, model_kwargs, guide, family)
    with forked_seed(0), poutine.block():
        prototype = run_prototype(problem.model, problem.model_args, problem.model_kwargs)
        _restore_guide(path, problem, saved)
    _restore_parameters(path, prototype.params, saved.model_params)
    if saved.data != _digest(problem.model_args, problem.model_kwargs):
        warnings.warn(
            f"the fit in '{path}' was made for other data than the model is given now. ELBO, "
            "linear response and whatever is computed from them belong to the old data.",
            DifferentDataWarning,
            stacklevel=3,
        )
    elif saved.densities is not None:
        _compare_densities(path, problem, saved.densities)
    like = current_params(problem.guide)
    restarts = tuple(
        replace(o, params=tuple(p.to(x) for p, x in zip(o.params, like, strict=True)))
        for o in saved.restarts
    )
    return FitResult(problem=problem, restarts=restarts, **saved.fields)


def _entry(optimum: Optimum) -> dict[str, Any]:
    outcome = optimum.outcome
    return {
        "seed": optimum.seed,
        "params": optimum.params,
        **{name: getattr(outcome, name) for name in _OUTCOME},
        "losses": torch.tensor(outcome.losses, dtype=torch.float64),
        "forward": _forward_content(outcome.forward),
    }


def _forward_content(forward: Forward | None) -> dict[str, Any] | None:
    if forward is None:
        return None
    return {
        "draws": {
            field.name: getattr(forward.draws, field.name) for field in fields(forward.draws)
        },
        "eubo": forward.eubo,
        "eubo_se": forward.eubo_se,
        "bounds": forward.bounds._asdict(),
    }


def _response_content(response: Response | None) -> dict[str, Any] | None:
    if response is None:
        return None
    found = response.found
    return {
        "found": None if found is None else {"loc": found.loc, "covariance": found.covariance},
        "refusal": response.refusal,
        "elbo": response.elbo,
        "elbo_se": response.elbo_se,
    }


def _guide_content(guide: Any) -> dict[str, Any]:
    own = {"class": type(guide).__name__}
    if isinstance(guide, FlatGuide):
        sites = _describe(guide.layout)
        families = {site: [f.name, _options(f)] for site, f in guide.families.items()}
        for site in getattr(guide, "discrete_sites", ()):
            families[site.name] = [site.family.name, _options(site.family)]
            sites.append([site.name, list(site.shape), [*site.shape, site.num_values], site.kind])
        return {**own, "kind": "flat", "families": families, "sites": sites}
    if isinstance(guide, torch.nn.Module):
        return {**own, "kind": "module", "state": dict(guide.state_dict())}
    raise TypeError(
        f"the guide is a function ({getattr(guide, '__name__', guide)}), whose parameters are in "
        "Pyro's store. Save them with pyro.get_param_store().save(path)."
    )


def _families(path: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The families of a file's sites, made again.

    Raises:
        CheckpointError: If one has not the options that were saved.
    """
    try:
        return {site: _KNOWN[name](**options) for site, (name, options) in saved.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' holds options that no family has: {error}") from error


def _options(family: object) -> dict[str, Any]:
    """The fields from which a family can be made again."""
    if not is_dataclass(family):
        return {}
    return {x.name: getattr(family, x.name) for x in fields(family) if x.init}


def _restore_guide(path: Path, problem: Problem, saved: Saved) -> None:
    guide, args, kwargs = problem.guide, problem.model_args, problem.model_kwargs
    if (saved.guide["kind"] == "flat") != isinstance(guide, FlatGuide):
        raise CheckpointError(
            f"'{path}' holds a fit of the guide {saved.guide['class']}; got "
            f"{type(guide).__name__}. Give a guide of the same kind."
        )
    if isinstance(guide, FlatGuide):
        if not guide.is_set_up and guide.model is problem.model:
            sites = _describe(run_prototype(problem.model, args, kwargs).full_layout)
            _check_sites(path, [s for s in saved.guide["sites"] if s[3] not in _KINDS], sites)
        guide.setup(*args, **kwargs)
        _check_sites(path, saved.guide["sites"], _guide_content(guide)["sites"])
        best = saved.restarts[saved.fields["best"]].params
        try:
            restore_params(guide, best)
        except (ValueError, RuntimeError) as error:  # another number of them, or a negative scale
            raise CheckpointError(
                f"'{path}' holds no parameters of an AutoMeanField of family "
                f"'{guide.family.name}': {error}"
            ) from error
        return
    guide(*args, **kwargs)  # Pyro's own make their parameters when they first run
    try:
        guide.load_state_dict(saved.guide["state"])
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"'{path}' holds a fit of another guide or model: {error}") from error


def _check_sites(path: Path, saved: list[list[Any]], sites: list[list[Any]]) -> None:
    """Refuse a file of a model with other latent sites.

    Raises:
        CheckpointError: If it is one.
    """
    if sites != saved:
        raise CheckpointError(
            f"'{path}' holds a fit of another model: {_difference(saved, sites)}. Give the "
            "model, and data of the size, that were fitted."
        )


def _restore_parameters(
    path: Path, params: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    """Give the model's learnable parameters their fitted values.

    Raises:
        CheckpointError: If the model has not the parameters that were saved.
    """
    ours = {name: list(leaf.shape) for name, leaf in params.items()}
    theirs = {name: list(value.shape) for name, value in saved.items()}
    if ours != theirs:
        raise CheckpointError(
            f"'{path}' holds a fit of another model: it has learnable parameters {theirs}, this "
            f"one {ours}."
        )
    with torch.no_grad():
        for name, leaf in params.items():
            leaf.copy_(saved[name])


def _densities_content(problem: Problem) -> dict[str, Any] | None:
    """The log joint at two points of the fit; ``None`` where it has none, or none that is finite.

    The points are saved too: what a seed or a quantile gives may differ on another machine.
    """
    try:
        with forked_seed(0), torch.no_grad():
            log_joint = _eager(problem)
            points = _two_points(problem, log_joint.layout)
            values = log_joint(points.to(log_joint.device, log_joint.dtype)).tolist()
    except Exception:  # a model that subsamples, say; a fit is saved all the same
        return None
    return {"points": points, "values": values} if all(map(math.isfinite, values)) else None


def _two_points(problem: Problem, layout: Layout) -> Tensor:
    guide = problem.guide
    if isinstance(guide, FlatGuide):
        params = split_params(guide, current_params(guide))[0]
        shares = torch.tensor([[0.5], [0.8413447]]).to(params[0])
        return guide.family.quantile(params, shares)  # of normals, loc and loc + scale
    return draw_guide(guide, problem.model_args, problem.model_kwargs, layout, 2, 0).z


def _compare_densities(path: Path, problem: Problem, saved: Densities) -> None:
    """Warn if the log joint is not that of the fit."""
    try:
        with forked_seed(0), torch.no_grad():
            log_joint = _eager(problem)
            values = log_joint(saved.points.to(log_joint.device, log_joint.dtype)).tolist()
    except (ModelError, ValueError, RuntimeError) as error:
        found, rounding = f"cannot be computed ({error})", 0.0
        values = [math.nan] * len(saved.values)
    else:
        found = ""
        rounding = max(
            _ROUNDING.get(dtype, _COARSE_ROUNDING)
            for dtype in (saved.points.dtype, log_joint.dtype)
        )
    allowed = rounding * max(1.0, *map(abs, saved.values))
    for old, new in zip(saved.values, values, strict=True):
        if not abs(new - old) <= allowed:
            warnings.warn(
                f"model or data differ from those of the fit in '{path}': at a point of the fit "
                f"the log joint was {old:.10g} nats, and now {found or f'is {new:.10g}'}. ELBO, "
                "linear response and whatever is computed from them belong to the old ones.",
                DifferentDataWarning,
                stacklevel=4,
            )
            return


def _eager(problem: Problem) -> LogJoint:
    """The density for two evaluations, which no graph pays for."""
    return LogJoint(problem.model, problem.model_args, problem.model_kwargs, backend="eager")


def _describe(layout: Layout) -> list[list[Any]]:
    """Everything that has to agree for parameters to mean the same."""
    return [
        [s.name, list(s.shape), list(s.unconstrained_shape), _support_name(s.support)]
        for s in layout.sites
    ]


def _support_name(support: Any) -> str:
    """A support with its bounds to six digits, so that dtype and device do not matter."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = [
        f"{x:.6g}"
        for name in ("lower_bound", "upper_bound")
        if (bound := getattr(support, name, None)) is not None
        for x in torch.as_tensor(bound).double().reshape(-1).unique().tolist()
    ]
    return f"{type(support).__name__}({', '.join(bounds)})"


def _difference(saved: list[list[Any]], ours: list[list[Any]]) -> str:
    theirs, mine = {s[0]: s[1:] for s in saved}, {s[0]: s[1:] for s in ours}
    for name in [*theirs, *mine]:
        if name not in mine:
            return f"it has a latent site '{name}', this model has {list(mine)}"
        if name not in theirs:
            return f"this model has a latent site '{name}', it has {list(theirs)}"
        if theirs[name] != mine[name]:
            (shape, _, support), (own_shape, _, own_support) = theirs[name], mine[name]
            return (
                f"its '{name}' has shape {tuple(shape)} and support {support}, this model's "
                f"{tuple(own_shape)} and {own_support}"
            )
    return f"it visits its sites in the order {list(theirs)}, this model in {list(mine)}"


def _digest(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """A key of the data, the same on every device and in every process."""
    leaves, tree = tree_flatten((tuple(args), dict(kwargs)))
    digest = hashlib.sha256(str(tree).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            array = leaf.detach().cpu().contiguous()
            digest.update(f"{tuple(array.shape)} {array.dtype}".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.shape} {leaf.dtype}".encode() + leaf.tobytes())
        elif isinstance(leaf, bool | int | float | str | None):
            digest.update(repr(leaf).encode())
        else:  # what it holds cannot be told across processes
            digest.update(type(leaf).__name__.encode())
    return digest.hexdigest()
