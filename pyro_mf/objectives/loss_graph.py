"""The negative ELBO of one guide as a captured graph, for arguments of one shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_mf.density.capture import PureFunction
from pyro_mf.density.program import Batch, Program, difference
from pyro_mf.families.stratified import noise_like, weighted_draws
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.objectives.entropy import EntropyEstimator

# Eager Pyro runs one draw after another, so the spot checks leave larger batches alone.
_MAX_CHECKED_DRAWS = 16


class StaleGraphError(Exception):
    """A graph no longer computes what the model does."""


class LossGraph:
    """Loss and gradient from a graph, held to eager Pyro at its 1st, 2nd, 4th, 8th, ... call.

    The first check is that of the capture. The others find what no key of the arguments and of the
    model's surroundings shows; their cost vanishes as training goes on.

    Args:
        program: The model.
        guide: A factorised guide.
        entropy: Estimator of the entropy term.
    """

    def __init__(self, program: Program, guide: FactorisedGuide, entropy: EntropyEstimator) -> None:
        self.program = program
        self._guide = guide
        self.family = guide.family_over(program.prototype.layout)
        self._entropy = entropy
        self._scale = program.prototype.layout.plate_scale()
        self._function = program.graph_function(self._build)
        self._calls = 0

    @property
    def num_captures(self) -> int:
        """How many graphs were captured, one per number of draws."""
        return self._function.num_captures

    def constrain(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The family's parameters from the tensors that the guide stores."""
        constraints = self._guide.param_constraints
        return tuple(transform_to(c)(x) for c, x in zip(constraints, stored, strict=True))

    def noise(self, num_draws: int, like: Tensor) -> Tensor:
        """The family's noise for S draws; for S of every component, where it is a mixture.

        Args:
            num_draws: Number of draws S.
            like: A tensor whose dtype and device it gets.
        """
        return noise_like(self.family, num_draws, self.program.prototype.layout.size, like)

    def run(self, noise: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Loss, a number that is finite where everything is, and all gradients.

        Args:
            noise: The family's noise for S draws.
            tensors: What the guide stores, then the model's inputs, flat.

        Raises:
            StaleGraphError: If the model has changed unseen since the capture.
        """
        out = self._function(noise, *tensors)
        self._calls += 1
        is_power_of_two = self._calls > 1 and self._calls & (self._calls - 1) == 0
        if is_power_of_two and len(noise) <= _MAX_CHECKED_DRAWS and self.program.mode != "eager":
            truth = self._build(self.program.function.eager_batch)(noise, *tensors)
            if difference(truth, out) is not None:
                raise StaleGraphError
        return out

    def _build(self, batch: Batch) -> PureFunction:
        family, entropy = self.family, self._entropy
        num_params = len(family.param_names)

        def loss_and_gradients(noise: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            inputs = self.program.unflatten(tensors[num_params:])
            with torch.enable_grad():
                stored = tuple(p.detach().requires_grad_(True) for p in tensors[:num_params])
                params = self.constrain(stored)
                leaves = tuple(p.detach().requires_grad_(True) for p in inputs.params)
                z, weights = weighted_draws(family, params, noise)
                log_joint = (weights * batch(z, inputs._replace(params=leaves))).sum()
                per_element = entropy.per_element(family, params, z)
                if per_element.dim() > 1:
                    per_element = (weights[:, None] * per_element).sum(0)
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
