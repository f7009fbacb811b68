"""Storing gradients by hand: losses that know theirs already, and none that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError


class WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        """Keep the gradients for the way back."""
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        """Hand out what was kept."""
        return (None, None, *(outputs[0] * g for g in ctx.saved_tensors))


def backward_if_finite(loss: Tensor) -> None:
    """Backward, but with no gradient stored if one of them is not finite.

    Raises:
        NonFiniteError: If one is not.
    """
    leaves = _leaves(loss)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    known = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if g is not None]
    if not all(bool(torch.isfinite(g).all()) for _, g in known):
        raise NonFiniteError(
            "the gradient of the loss is not finite although the loss is. Parameters keep their "
            "last finite values. Try a smaller step, another start, or float64."
        )
    add_gradients(tuple(leaf for leaf, _ in known), tuple(g for _, g in known))


def add_gradients(leaves: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Add to the gradients of leaf tensors, through autograd so that hooks on them run."""
    wanted = [(leaf, g) for leaf, g in zip(leaves, gradients, strict=True) if leaf.requires_grad]
    if wanted:
        torch.autograd.backward([leaf for leaf, _ in wanted], [g for _, g in wanted])


def outside_inference_mode(x: Tensor) -> Tensor:
    """A tensor that can be used where gradients are taken."""
    return x.clone() if x.is_inference() else x


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on."""
    found: dict[int, Tensor] = {}
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
