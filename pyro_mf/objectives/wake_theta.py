r"""Gradients of learnable model parameters under forward KL: the wake-theta rule.

The evidence's gradient is :math:`\nabla \log p(x) = \mathbb{E}_{p(z|x)}[\nabla \log p(x, z)]`, an
expectation over the very draws that fit the guide. It is the gradient of maximum marginal
likelihood, not of a divergence, so it has no part in the loss's value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf.density.capture import PureFunction
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.program import Batch
from pyro_mf.objectives.gradients import WithGradients


class WakeTheta:
    """A term of value zero whose gradient is that of minus the log evidence.

    Args:
        log_joint: The model's log joint, with learnable parameters.
    """

    def __init__(self, log_joint: LogJoint) -> None:
        self._log_joint = log_joint
        self._function = log_joint.program.graph_function(self._build)

    def term(self, z: Tensor, weights: Tensor) -> Tensor:
        """Zero, differentiable once by the unconstrained parameters.

        Args:
            z: Draws from the posterior, shape ``(S, D)``.
            weights: Their weights, shape ``(S,)``, summing to one.
        """
        log_joint, program = self._log_joint, self._log_joint.program
        leaves = program.prototype.params
        for name, leaf in leaves.items():
            _pyro.emit_param(name, leaf)
        inputs = program.inputs(log_joint.model_args, log_joint.model_kwargs)
        z, weights = (x.to(log_joint.device, log_joint.dtype) for x in (z, weights))
        gradients = tuple(-g for g in self._function(z, weights, *inputs.flat()))
        zero: Tensor = WithGradients.apply(z.new_zeros(()), gradients, *leaves.values())  # type: ignore[no-untyped-call]
        return zero

    def _build(self, batch: Batch) -> PureFunction:
        program = self._log_joint.program

        def gradients(z: Tensor, weights: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            inputs = program.unflatten(flat)
            with torch.enable_grad():
                params = tuple(p.detach().requires_grad_(True) for p in inputs.params)
                value = (weights * batch(z, inputs._replace(params=params))).sum()
                found = torch.autograd.grad(
                    value, params, allow_unused=True, materialize_grads=True
                )
            return tuple(found)

        return gradients
