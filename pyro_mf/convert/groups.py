"""The groups of a result, from a density and draws of its unconstrained vector.

NUTS and variational fits become results here, in the same way; what differs between them comes in
as ``sample_stats``, attributes and the group ``vi_fit``.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.convert import generations
from pyro_mf.convert.datasets import Axes, check_all_used, to_dataset
from pyro_mf.convert.predictive import (
    draw_observed,
    draw_prior,
    shape_given,
    shape_predictions,
)

if TYPE_CHECKING:
    import xarray as xr

    from pyro_mf.density import LogJoint
    from pyro_mf.density.evaluation import Evaluation

Arrays = Mapping[str, Tensor | np.ndarray]

# Numbers per chunk of draws, as for the evaluation itself: about 30 MB in float64.
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Options:
    """What a user asks of a conversion; see :func:`pyro_mf.convert.from_pyro`."""

    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    posterior_predictive: bool | Arrays = False
    prior: int | Arrays | None = None
    predictions: Arrays | None = None
    constant_data: Arrays | None = None
    predictions_constant_data: Arrays | None = None
    seed: int = 0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Draws:
    """Draws of the unconstrained vector and where they stand.

    Args:
        z: Shape ``(C, T, D)``, in the layout of the density.
        chain: C chain labels.
        draw: T draw labels.
    """

    z: Tensor
    chain: Sequence[int] | np.ndarray
    draw: Sequence[int] | np.ndarray

    @property
    def flat(self) -> Tensor:
        """All draws in a row, shape ``(C * T, D)``."""
        return self.z.reshape(-1, self.z.shape[-1])

    @property
    def sample(self) -> dict[str, Any]:
        """The coordinates of the sample dimensions."""
        return {"chain": self.chain, "draw": self.draw}

    def fold(self, values: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Give ``(C * T, ...)`` values the shape ``(C, T, ...)``."""
        return values.reshape(*self.z.shape[:2], *values.shape[1:])


def evaluate_draws(log_joint: LogJoint, z: Tensor, *, log_likelihood: bool) -> Evaluation:
    """Everything the model computes at draws ``(S, D)``.

    Args:
        log_joint: The density.
        z: The draws.
        log_likelihood: Whether to keep the pointwise log likelihood, which is large.

    Raises:
        NonFiniteError: If a draw is not finite on the unconstrained space.
    """
    for site in log_joint.layout.sites:
        rows = ~torch.isfinite(z[:, site.start : site.stop]).all(-1)
        if rows.any():
            raise NonFiniteError(
                f"{int(rows.sum())} of {len(z)} draws of '{site.name}' are not finite on the "
                f"unconstrained space: NaN, or rounded onto the edge of {site.support}. Sample in "
                "float64, or look at the run."
            )
    _ = log_joint.mode  # captures and checks the density, without which evaluate runs in a loop
    if log_likelihood:
        return log_joint.evaluate(z)
    chunks = z.split(_rows_at_once(log_joint.evaluate(z[:1])))
    parts = [replace(log_joint.evaluate(chunk), log_likelihood={}) for chunk in chunks]
    return replace(
        parts[0],
        latents=_join([p.latents for p in parts]),
        deterministics=_join([p.deterministics for p in parts]),
        log_prior=torch.cat([p.log_prior for p in parts]),
        log_abs_det=torch.cat([p.log_abs_det for p in parts]),
    )


def log_density(log_joint: LogJoint, z: Tensor, evaluation: Evaluation) -> Tensor:
    """Log joint at draws ``(S, D)``, in chunks that bound the memory.

    Args:
        log_joint: The density.
        z: The draws.
        evaluation: What the model computes at them.

    Returns:
        Shape ``(S,)``, on the unconstrained space.
    """
    rows = min(len(z), _rows_at_once(evaluation))
    # Chunks of one shape, for a graph is captured per shape.
    padded = torch.cat([z, z[:1].expand(-len(z) % rows, -1)])
    with torch.no_grad():
        return torch.cat([log_joint(chunk) for chunk in padded.split(rows)])[: len(z)]


def _rows_at_once(evaluation: Evaluation) -> int:
    """Draws per chunk, by the numbers that one draw takes."""
    values = [*evaluation.observed.values(), *(v[0] for v in evaluation.latents.values())]
    return max(1, _CHUNK_ELEMENTS // sum(value.numel() for value in values))


def _join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def build_result(
    log_joint: LogJoint,
    draws: Draws,
    evaluation: Evaluation,
    sample_stats: Arrays,
    options: Options,
    *,
    attrs: Mapping[str, Any],
    vi_fit: Mapping[str, xr.Dataset] | None = None,
) -> Any:
    """Put all groups together.

    Args:
        log_joint: The density.
        draws: The draws.
        evaluation: What the model computes at them.
        sample_stats: One number per draw, each of shape ``(C, T)``.
        options: What the user asks for.
        attrs: Attributes of the posterior.
        vi_fit: The groups that only a variational fit has.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
    """
    axes = Axes(evaluation.plates, evaluation.event_dims, options.dims, options.coords)
    groups = {
        "posterior": _posterior(draws, evaluation, axes),
        "unconstrained_posterior": _unconstrained(log_joint, draws, options),
        "sample_stats": to_dataset(sample_stats, Axes(), draws.sample),
        "log_prior": to_dataset(
            {"log_prior": draws.fold(evaluation.log_prior)}, Axes(), draws.sample
        ),
    }
    if evaluation.log_likelihood:
        shapes = {name: value.shape for name, value in evaluation.observed.items()}
        groups["log_likelihood"] = to_dataset(
            {name: draws.fold(value) for name, value in evaluation.log_likelihood.items()},
            replace(axes, value_shapes=shapes),
            draws.sample,
        )
    groups |= _predictive(log_joint, draws, evaluation, axes, options)
    groups["observed_data"] = to_dataset(evaluation.observed, axes)
    user = Axes(dims=options.dims, coords=options.coords)
    for group in ("constant_data", "predictions_constant_data"):
        if (data := getattr(options, group)) is not None:
            groups[group] = to_dataset(data, user)
    groups |= vi_fit or {}
    check_all_used(groups, options.coords, options.dims)
    model = log_joint.model
    return _finish(groups, {**attrs, **options.attrs}, options.name or _callable_name(model))


def _posterior(draws: Draws, evaluation: Evaluation, axes: Axes) -> xr.Dataset:
    values = {**evaluation.latents, **evaluation.deterministics}
    return to_dataset({n: draws.fold(v) for n, v in values.items()}, axes, draws.sample)


def _unconstrained(log_joint: LogJoint, draws: Draws, options: Options) -> xr.Dataset:
    """The sites whose unconstrained axis is not the model's own."""
    values = log_joint.layout.unpack(draws.z)
    sites = {s.name: s for s in log_joint.layout.sites if not s.is_real}
    dims = dict(options.dims)
    for site in sites.values():
        if site.unconstrained_shape != site.shape:
            # A simplex has one element less here, so its labels do not fit.
            num_batch = len(site.unconstrained_shape) - site.unconstrained_event_dim
            batch = Axes({site.name: site.plates}, {site.name: 0}, options.dims)
            names = [n for n in batch.names(site.name, site.shape)[:num_batch] if n is not None]
            events = range(site.unconstrained_event_dim)
            dims[site.name] = [*names, *(f"{site.name}_unconstrained_dim_{i}" for i in events)]
    axes = Axes(
        {s.name: s.plates for s in sites.values()},
        {s.name: s.unconstrained_event_dim for s in sites.values()},
        dims,
        options.coords,
    )
    return to_dataset({name: values[name] for name in sites}, axes, draws.sample)


def _predictive(
    log_joint: LogJoint, draws: Draws, evaluation: Evaluation, axes: Axes, options: Options
) -> dict[str, xr.Dataset]:
    groups = {}
    call = (log_joint.model, log_joint.model_args, log_joint.model_kwargs)
    shapes = {name: tuple(value.shape) for name, value in evaluation.observed.items()}
    given = options.posterior_predictive
    if given is True and shapes:
        given = draw_observed(
            *call, latents=evaluation.latents, sites=list(shapes), seed=options.seed
        )
    if isinstance(given, Mapping):
        arrays = shape_given(given, shapes, len(draws.flat), "posterior_predictive")
        groups["posterior_predictive"] = to_dataset(
            {n: draws.fold(v) for n, v in arrays.items()}, axes, draws.sample
        )
    if options.predictions is not None:
        num_dims = {name: len(shape) for name, shape in shapes.items()}
        arrays, shrunk = shape_predictions(options.predictions, num_dims, len(draws.flat), axes)
        groups["predictions"] = to_dataset(
            {n: draws.fold(v) for n, v in arrays.items()}, shrunk, draws.sample
        )
    prior = options.prior
    values = {**evaluation.latents, **evaluation.deterministics}
    shapes |= {name: tuple(value.shape[1:]) for name, value in values.items()}
    if isinstance(prior, int) and prior:
        prior = draw_prior(*call, num=prior, sites=list(shapes), seed=options.seed + 1)
    if isinstance(prior, Mapping):
        num = len(next(iter(prior.values())))
        arrays = shape_given(prior, shapes, num, "prior")
        sample = {"chain": [0], "draw": range(num)}
        for group, in_group in (("prior", values), ("prior_predictive", evaluation.observed)):
            chosen = {n: v[None] for n, v in arrays.items() if n in in_group}
            groups[group] = to_dataset(chosen, axes, sample)
    return groups


def _finish(groups: dict[str, xr.Dataset], attrs: Mapping[str, Any], name: str) -> Any:
    common = {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyro_mf",
        # The root imports every room, so no room imports the root.
        "creation_library_version": sys.modules["pyro_mf"].__version__,
        "inference_library": "pyro",
        "inference_library_version": importlib.metadata.version("pyro-ppl"),
    }
    for group, ds in groups.items():
        sampled = {"sample_dims": ["chain", "draw"]} if "draw" in ds.dims else {}
        own = attrs if group == "posterior" else {}
        ds.attrs = {**common, **sampled, **ds.attrs, **_storable(own)}
    return generations.wrap(groups, {"name": name, **common})


def _storable(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as NetCDF takes them: numbers and strings."""
    stored: dict[str, Any] = {}
    for key, value in attrs.items():
        if isinstance(value, bool | np.bool_):
            stored[key] = int(value)
        elif value is not None:
            number = isinstance(value, int | float | np.integer | np.floating)
            stored[key] = value if number else str(value)
    return stored


def _callable_name(model: Any) -> str:
    return str(getattr(model, "__name__", type(model).__name__))
