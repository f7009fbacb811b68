"""The fast road: the whole ELBO and its gradient as one captured graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import CaptureWarning, ImproperWarning
from pyro_mf.density.capture import Backend
from pyro_mf.density.program import Program, value_and_gradients
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.guides.prototype import model_indices
from pyro_mf.guides.site_families import param_index
from pyro_mf.objectives.entropy import EntropyEstimator
from pyro_mf.objectives.loss_graph import LossGraph, StaleGraphError
from pyro_mf.objectives.non_finite import (
    LinAlgError,
    raise_failed_factorisation,
    raise_non_finite,
)

# Graphs are kept for this many shapes of the arguments.
_MAX_GRAPHS = 16
# A stream of calls that each need a new graph is better served by eager Pyro; this many are borne.
_MAX_PROGRAMS, _MAX_FROZEN_PROGRAMS = 8, 2

Estimate: TypeAlias = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]
"""A loss, the leaf tensors that it depends on, and its gradients by them."""


class CapturedELBO:
    """Negative ELBO and gradient of one model and one factorised guide.

    Programs are kept by the shapes of the arguments, so minibatches of one size share a graph.

    Args:
        model: A Pyro model.
        guide: A factorised guide.
        entropy: Estimator of the entropy term.
        backend: See :class:`~pyro_mf.density.capture.GraphFunction`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: FactorisedGuide,
        entropy: EntropyEstimator,
        backend: Backend,
    ) -> None:
        self.model = model
        self.guide = guide
        self._entropy = entropy
        self._backend = backend
        self._graphs: list[LossGraph] = []
        self._calls = 0
        self._programs = 0
        self._frozen_programs = 0
        self._is_given_up = False

    @property
    def num_captures(self) -> int:
        """How many graphs were captured and are kept."""
        return sum(graph.num_captures for graph in self._graphs)

    def value_and_gradients(
        self, num_particles: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Estimate | None:
        """Estimate the loss at fresh noise.

        Args:
            num_particles: Number of draws S.
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments.

        Returns:
            The negative ELBO in nats, the unconstrained leaf tensors it depends on (the guide's,
            then the model's), and its gradients by them. ``None`` where a graph would not mean the
            same as running model and guide, which a warning has said.

        Raises:
            NonFiniteError: If loss or gradient is not finite; names the site.
            GuideMismatchError: If the guide was built for another model.
        """
        if self._is_given_up:
            return None
        self.guide.setup(*args, **kwargs)
        self._calls += 1
        graph = self._find(args, kwargs) or self._add(args, kwargs)
        if graph is None:
            return None
        prototype = graph.program.prototype
        for name, leaf in prototype.params.items():
            _pyro.emit_param(name, leaf)
        indices, position = self._minibatch(graph, args, kwargs)
        leaves = self.guide.flat_leaves()
        with torch.no_grad():
            places = None if position is None else param_index(self.guide.family, position)
            stored = leaves if places is None else tuple(map(_at, leaves, places))
            family = graph.family
            noise = graph.noise(num_particles, stored[0])
            inputs = graph.program.inputs(args, kwargs, indices)
            try:
                loss, check, *gradients = graph.run(noise, *stored, *inputs.flat())
            except StaleGraphError:
                self._drop(graph)
                return self.value_and_gradients(num_particles, args, kwargs)
            except LinAlgError as error:
                raise_failed_factorisation(graph.program, error)
            if not math.isfinite(check):
                params = graph.constrain(stored)
                raise_non_finite(graph.program, family, params, noise, inputs)
            for i, place in enumerate(places or ()):
                gradients[i] = torch.zeros_like(leaves[i]).index_add_(0, place, gradients[i])
        return loss, (*leaves, *prototype.params.values()), tuple(gradients)

    def _minibatch(
        self, graph: LossGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Indices for the model to use, and where the minibatch's parameters are in the guide."""
        prototype = graph.program.prototype
        drawn = graph.program.function.draw_indices()
        indices = dict(zip(prototype.subsamples, drawn, strict=True))
        if prototype.given:
            names = frozenset(prototype.given)
            indices |= model_indices(self.model, prototype.layout, args, kwargs, names)
        position = self.guide.layout.flat_index(indices) if indices else None
        return drawn, None if position is None else position.to(prototype.device)

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LossGraph | None:
        return next((g for g in self._graphs if g.program.matches(args, kwargs)), None)

    def _add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LossGraph | None:
        program = Program(self.model, args, kwargs, backend=self._backend, checks_data=True)
        check_same_sites(program.prototype.layout, self.guide.layout)
        frozen = [g for g in self._graphs if g.program.function.is_frozen]
        self._programs += 1
        self._frozen_programs += len(frozen)
        reason = self._reason_against(program, args, kwargs)
        if reason is not None:
            self._is_given_up = True
            self._graphs.clear()
            warnings.warn(
                f"{reason}, so this model and guide are run by eager Pyro instead of from a graph.",
                CaptureWarning,
                stacklevel=2,
            )
            return None
        _warn_of_flat_latents(program, args, kwargs)
        kept = [g for g in self._graphs if g not in frozen][-_MAX_GRAPHS:]
        self._graphs = [*kept, LossGraph(program, self.guide, self._entropy)]
        return self._graphs[-1]

    def _reason_against(
        self, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> str | None:
        """Why a graph would not mean the same as Pyro's own road, or not pay."""
        prototype = program.prototype
        if prototype.has_side_effects:
            return "the model changes its own state when it runs (as BatchNorm does in training)"
        if prototype.sequential:
            return f"the model visits part of plate '{prototype.sequential[0]}' in a Python loop"
        if prototype.has_foreign_gradients:
            return (
                "the model uses tensors that require gradients and are not parameters of Pyro's "
                "(register modules with pyro.module or make them PyroModules)"
            )
        if prototype.given and self._draws_indices(program, args, kwargs):
            return "the model draws the indices of its minibatch by itself (use subsample_size)"
        if self._frozen_programs >= _MAX_FROZEN_PROGRAMS:
            return (
                "the model's control flow depends on the values of its arguments, and every new "
                "set of arguments would need a new graph"
            )
        if self._programs > _MAX_PROGRAMS and self._programs > self._calls / 2:
            return (
                "nearly every call would need a new graph: an argument that is not a tensor, or "
                "something else that the model reads, changes all the time (pass it as a tensor)"
            )
        return None

    def _draws_indices(
        self, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        names, layout = frozenset(program.prototype.given), program.prototype.layout
        first, second = (model_indices(self.model, layout, args, kwargs, names) for _ in range(2))
        return any(not torch.equal(first[name], second[name]) for name in first)

    def _drop(self, graph: LossGraph) -> None:
        """Forget the graph of a model that has changed in a way that no key shows."""
        self._graphs.remove(graph)
        warnings.warn(
            "the model has changed since its graph was captured, in something that it reads "
            "besides its arguments: losses of earlier steps may be those of the model as it was. "
            "It is captured anew; pass what changes as an argument.",
            CaptureWarning,
            stacklevel=2,
        )


def _at(leaf: Tensor, place: Tensor) -> Tensor:
    return leaf[place]


def _warn_of_flat_latents(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Warn of latents on which nothing depends: their scales grow as long as training goes on."""
    prototype = program.prototype
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, prototype.layout.size, generator=generator, dtype=torch.float64)
    z = z.to(dtype=prototype.dtype, device=prototype.device)
    inputs = program.inputs(args, kwargs, program.function.typical_indices())
    try:
        _, gradient, *_ = value_and_gradients(program.function.eager_batch, 0.3 * z, inputs)
    except (RuntimeError, ValueError):  # no density at these points; the training will tell
        return
    flat = prototype.layout.describe_flat(gradient)
    if flat is not None:
        warnings.warn(
            f"{flat}; as it is, the loss falls without bound as their scales grow.",
            ImproperWarning,
            stacklevel=2,
        )
