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
        self._count = torch.zeros_like(like)

    @property
    def gradient_sd(self) -> Tensor:
        """Root mean square of recent gradients, shape ``(P,)``."""
        return self._square.sqrt()

    def direction(self, gradient: Tensor, *, searching: bool) -> Tensor:
        """What to subtract, in units of the parameters, at a learning rate of one.

        A gradient of exactly zero is taken for none: the parameter was not in the minibatch, and
        nothing about it changes.

        Args:
            gradient: Shape ``(P,)``.
            searching: Whether steps may grow.
        """
        touched = (gradient != 0).to(gradient)
        self._count += touched
        # The first gradient has none before it to be measured by.
        normalised = gradient * torch.where(self._square > 0, self._square.rsqrt(), 0.0)
        normalised.clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
        if searching:
            self._brake(normalised)
        weight = (1.0 - _MOMENTUM) * touched
        self._momentum.lerp_(normalised, weight)
        memory = _MEMORY_SEARCHING if searching else _MEMORY_SETTLED
        self._square.lerp_(gradient.square(), touched / self._count.clamp(1.0, memory))
        if not searching:
            return self._momentum * touched
        self._size.lerp_(normalised.abs(), weight)
        self._adapt_boost(touched)
        return self._momentum * self.boost * touched

    def _brake(self, normalised: Tensor) -> None:
        """Stop what has run past its optimum: long steps whose gradient has changed sign."""
        is_past = (self.boost > _LONG) & (normalised * self._momentum < 0)
        self._momentum.masked_fill_(is_past, 0.0)
        self.boost.mul_(torch.where(is_past, _BRAKE, 1.0).to(self.boost)).clamp_(min=1.0)

    def _adapt_boost(self, touched: Tensor) -> None:
        coherence = self._momentum.abs() / (self._size + torch.finfo(self._size.dtype).tiny)
        factor = torch.where(coherence > _COHERENT, _GROWTH, 1.0).to(self.boost)
        factor.masked_fill_(coherence < _INCOHERENT, _SHRINKAGE)
        self.boost.mul_(torch.where(touched > 0, factor, 1.0)).clamp_(min=1.0)

    def settle(self) -> None:
        """End the search: no more long steps, and start the long memory."""
        self.boost.fill_(1.0)
        self._count.clamp_(max=2.0 * _MEMORY_SEARCHING)

    def state(self) -> dict[str, Tensor]:
        """Tensors from which :meth:`from_state` makes an equal object."""
        return {key: value.clone() for key, value in self._tensors().items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Steps:
        """The steps that :meth:`state` described."""
        steps = cls(state["boost"])
        for key, value in steps._tensors().items():
            value.copy_(state[key])
        return steps

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "boost": self.boost,
            "momentum": self._momentum,
            "size": self._size,
            "square": self._square,
            "count": self._count,
        }
