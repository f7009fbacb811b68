r"""The steps of the stochastic solver: Adam, with two changes that averaging needs.

A gradient is divided by the root of the second moment of the gradients *before* it (ADOPT). Adam
divides by one that contains it, so a large gradient counts less than several small ones; where the
noise is skewed, as that of a log scale is, Adam's iterates settle beside the optimum at any
learning rate, and so does their average.

A parameter's step is :math:`\gamma s_j` times its normalised momentum, with a unit :math:`s_j`: the
change of the parameter that matters, a standard deviation of the guide for its location. One
learning rate then fits parameters of any scale. While the optimum is looked for, a parameter whose
gradients keep one sign takes longer and longer steps, so a far optimum takes a number of steps
logarithmic in its distance.

References:
    Taniguchi et al. (2024), ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate,
    https://arxiv.org/abs/2411.02853
    Riedmiller and Braun (1993), A Direct Adaptive Method for Faster Backpropagation Learning: the
    RPROP Algorithm
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.9
_LARGEST_GRADIENT = 10.0  # in units of its root mean square
# How far back the second moment looks: short while gradients change by orders of magnitude.
_MEMORY_SEARCHING, _MEMORY_SETTLED = 20, 1000
# Momentum over mean absolute gradient above which a step grows, and below which it shrinks.
_COHERENT, _INCOHERENT = 0.8, 0.5
_GROWTH, _SHRINKAGE = 1.2, 0.7
_LONG, _BRAKE = 2.0, 0.5


class Steps:
    """Step lengths and directions of one run; mutable.

    Args:
        like: The flat parameters, shape ``(P,)``.

    Attributes:
        boost: Factor by which each parameter's step is longer, at least 1.
    """

    def __init__(self, like: Tensor) -> None:
        self.boost = torch.ones_like(like)
        self._momentum = torch.zeros_like(like)
        self._size = torch.zeros_like(like)
        self._square = torch.zeros_like(like)
        self._count = 0

    @property
    def gradient_sd(self) -> Tensor:
        """Root mean square of recent gradients, shape ``(P,)``."""
        return self._square.sqrt()

    def direction(self, gradient: Tensor, *, searching: bool) -> Tensor:
        """What to subtract, in units of the parameters, at a learning rate of one.

        Args:
            gradient: Shape ``(P,)``.
            searching: Whether steps may grow.
        """
        self._count += 1
        count, tiny = self._count, torch.finfo(gradient.dtype).tiny
        if count == 1:
            self._square = gradient.square()
            return torch.zeros_like(gradient)
        normalised = (gradient / (self._square.sqrt() + tiny)).clamp_(
            -_LARGEST_GRADIENT, _LARGEST_GRADIENT
        )
        if searching:
            self._brake(normalised)
        self._momentum.lerp_(normalised, 1.0 - _MOMENTUM)
        memory = _MEMORY_SEARCHING if searching else _MEMORY_SETTLED
        self._square.lerp_(gradient.square(), 1.0 / min(count, memory))
        if not searching:
            return self._momentum / (1.0 - _MOMENTUM ** (count - 1))
        self._size.lerp_(normalised.abs(), 1.0 - _MOMENTUM)
        self._adapt_boost()
        return self._momentum * self.boost / (1.0 - _MOMENTUM ** (count - 1))

    def _brake(self, normalised: Tensor) -> None:
        """Stop what has run past its optimum: long steps whose gradient has changed sign."""
        is_past = (self.boost > _LONG) & (normalised * self._momentum < 0)
        self._momentum.masked_fill_(is_past, 0.0)
        self.boost.mul_(torch.where(is_past, _BRAKE, 1.0).to(self.boost)).clamp_(min=1.0)

    def _adapt_boost(self) -> None:
        coherence = self._momentum.abs() / (self._size + torch.finfo(self._size.dtype).tiny)
        factor = torch.where(coherence > _COHERENT, _GROWTH, 1.0)
        factor = torch.where(coherence < _INCOHERENT, _SHRINKAGE, factor).to(self.boost)
        self.boost.mul_(factor).clamp_(min=1.0)

    def settle(self) -> None:
        """End the search: no more long steps, and start the long memory."""
        self.boost.fill_(1.0)
        self._count = min(self._count, 2 * _MEMORY_SEARCHING)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`from_state` makes an equal object."""
        tensors = {key: value.clone() for key, value in self._tensors().items()}
        return {**tensors, "count": self._count}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Steps:
        """The steps that :meth:`state` described."""
        steps = cls(state["boost"])
        for key, value in steps._tensors().items():
            value.copy_(state[key])
        steps._count = state["count"]
        return steps

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "boost": self.boost,
            "momentum": self._momentum,
            "size": self._size,
            "square": self._square,
        }
