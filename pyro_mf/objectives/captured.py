"""The fast road: the whole ELBO and its gradient as one captured graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf import _pyro
from pyro_mf._errors import CaptureWarning
from pyro_mf.density.capture import Backend, PureFunction
from pyro_mf.density.program import Batch, Program
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.guides.prototype import model_indices
from pyro_mf.objectives.entropy import EntropyEstimator
from pyro_mf.objectives.non_finite import (
    LinAlgError,
    raise_failed_factorisation,
    raise_non_finite,
)

# A model whose control flow depends on its data needs a new graph for new data; after this many a
# stream of minibatches is better served by eager Pyro.
_MAX_FROZEN_CAPTURES = 3
_MAX_PROGRAMS = 16


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
        self.num_captures = 0
        self._entropy = entropy
        self._backend = backend
        self._roads: list[_Road] = []
        self._frozen_captures = 0

    def value_and_gradients(
        self, num_particles: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Estimate the loss at fresh noise.

        Args:
            num_particles: Number of draws S.
            args: Positional arguments of model and guide.
            kwargs: Keyword arguments.

        Returns:
            The negative ELBO in nats, the unconstrained leaf tensors it depends on (the guide's,
            then the model's), and its gradients by them.

        Raises:
            NonFiniteError: If loss or gradient is not finite; names the site.
            GuideMismatchError: If the guide was built for another model.
        """
        self.guide.setup(*args, **kwargs)
        road = self._road(args, kwargs)
        prototype = road.program.prototype
        for name, leaf in prototype.params.items():
            _pyro.emit_param(name, leaf)
        indices, position = self._minibatch(road, args, kwargs)
        leaves = self.guide.flat_leaves()
        with torch.no_grad():
            stored = leaves if position is None else tuple(x[position] for x in leaves)
            like, size = stored[0], prototype.layout.size
            family = self.guide.family
            noise = family.noise((num_particles, size), dtype=like.dtype, device=like.device)
            inputs = road.program.inputs(args, kwargs, indices)
            try:
                loss, check, *gradients = road.run(noise, *stored, *inputs.flat())
            except LinAlgError as error:
                raise_failed_factorisation(road.program, error)
            if not math.isfinite(check):
                params = road.constrain(stored)
                raise_non_finite(road.program, family, params, noise, inputs)
            if position is not None:
                for i, leaf in enumerate(leaves):
                    gradients[i] = torch.zeros_like(leaf).index_add_(0, position, gradients[i])
        return loss, (*leaves, *prototype.params.values()), tuple(gradients)

    def _minibatch(
        self, road: _Road, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Indices for the model to use, and where the minibatch's parameters are in the guide."""
        prototype = road.program.prototype
        drawn = road.program.function.draw_indices()
        indices = dict(zip(prototype.subsamples, drawn, strict=True))
        if prototype.given:
            names = frozenset(prototype.given)
            indices |= model_indices(self.model, prototype.layout, args, kwargs, names)
        position = self.guide.layout.flat_index(indices) if indices else None
        return drawn, None if position is None else position.to(prototype.device)

    def _road(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Road:
        for road in self._roads:
            if road.program.matches(args, kwargs):
                return road
        self._roads = [r for r in self._roads if not r.program.function.is_frozen]
        if len(self._roads) >= _MAX_PROGRAMS:
            self._roads.pop(0)
        backend = self._backend
        if self._frozen_captures >= _MAX_FROZEN_CAPTURES:
            backend = "eager"
        road = _Road(self, Program(self.model, args, kwargs, backend=backend))
        check_same_sites(road.program.prototype.layout, self.guide.layout)
        self._roads.append(road)
        return road

    def note_capture(self, program: Program) -> None:
        """Count a capture; too many of a model that needs one for every data set end in eager."""
        self.num_captures += 1
        if program.function.is_frozen:
            self._frozen_captures += 1
            if self._frozen_captures == _MAX_FROZEN_CAPTURES:
                warnings.warn(
                    "the model's control flow depends on the values of its arguments, so every new "
                    "set of arguments needs a new graph; further ones are run by eager Pyro.",
                    CaptureWarning,
                    stacklevel=2,
                )


class _Road:
    """The captured loss for arguments of one shape."""

    def __init__(self, owner: CapturedELBO, program: Program) -> None:
        self.program = program
        self._owner = owner
        self._scale = program.prototype.layout.plate_scale()
        self._function = program.graph_function(self._build)

    def constrain(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The family's parameters from the tensors that the guide stores."""
        constraints = self._owner.guide.param_constraints
        return tuple(transform_to(c)(x) for c, x in zip(constraints, stored, strict=True))

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        before = self._function.num_captures
        out = self._function(*tensors)
        if self._function.num_captures > before:
            self._owner.note_capture(self.program)
        return out

    def _build(self, batch: Batch) -> PureFunction:
        family, entropy = self._owner.guide.family, self._owner._entropy
        num_params = len(family.param_names)

        def loss_and_gradients(noise: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            inputs = self.program.unflatten(tensors[num_params:])
            with torch.enable_grad():
                stored = tuple(p.detach().requires_grad_(True) for p in tensors[:num_params])
                params = self.constrain(stored)
                leaves = tuple(p.detach().requires_grad_(True) for p in inputs.params)
                z = family.transform(params, noise)
                log_joint = batch(z, inputs._replace(params=leaves)).mean()
                per_element = entropy.per_element(family, params, z)
                if per_element.dim() > 1:
                    per_element = per_element.mean(0)
                scale = self._scale.to(per_element)
                loss = -(log_joint + (scale * per_element).sum())
                gradients = torch.autograd.grad(
                    loss, (*stored, *leaves), allow_unused=True, materialize_grads=True
                )
            loss = loss.detach()
            # One number that is finite where everything is.
            check = loss + 0.0 * sum(g.sum() for g in gradients)
            return (loss, check, *gradients)

        return loss_and_gradients
