"""The parameters that an objective touches, as one flat vector."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro


@dataclass(frozen=True, eq=False)
class Leaves:
    """Unconstrained leaf tensors behind Pyro's parameters, guide's and model's alike.

    Args:
        names: The parameters' names, sorted.
        tensors: Their leaves, in the same order.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def touched_by(cls, run: Callable[[], Any]) -> tuple[Leaves, Any]:
        """The trainable leaves that a function reads, found as ``SVI.step`` finds them.

        Args:
            run: Runs model and guide.

        Returns:
            The leaves, and what the function returned.
        """
        with poutine.trace(param_only=True) as capture:
            result = run()
        found: dict[str, Tensor] = {
            name: _pyro.param_leaf(node) for name, node in capture.trace.nodes.items()
        }
        names = sorted(name for name, leaf in found.items() if leaf.requires_grad)
        return cls(tuple(names), tuple(found[name] for name in names)), result

    @property
    def size(self) -> int:
        """Number of scalar parameters P."""
        return sum(leaf.numel() for leaf in self.tensors)

    @property
    def shapes(self) -> list[list[int]]:
        """The leaves' shapes."""
        return [list(leaf.shape) for leaf in self.tensors]

    def flatten(self, tensors: Mapping[int, Tensor | None] | None = None) -> Tensor:
        """One vector ``(P,)`` of the leaves' values, or of tensors given by the leaves' ids.

        Args:
            tensors: One tensor like its leaf by ``id(leaf)``; zeros where there is none.
        """
        parts = []
        for leaf in self.tensors:
            value: Tensor | None = leaf if tensors is None else tensors.get(id(leaf))
            value = torch.zeros_like(leaf) if value is None else value
            parts.append(value.detach().reshape(-1).to(dtype=self.dtype, device=self.device))
        return torch.cat(parts)

    @property
    def device(self) -> torch.device:
        """Where the flat vector lives: with the first leaf."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the leaves."""
        dtype = self.tensors[0].dtype
        for leaf in self.tensors:
            dtype = torch.promote_types(dtype, leaf.dtype)
        return dtype

    def take_gradient(self) -> Tensor:
        """The accumulated gradient, shape ``(P,)``; it is cleared."""
        gradient = self.flatten({id(leaf): leaf.grad for leaf in self.tensors})
        self.clear_gradient()
        return gradient

    def clear_gradient(self) -> None:
        """Forget what gradients have been accumulated."""
        for leaf in self.tensors:
            leaf.grad = None

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Put a vector ``(P,)`` into the leaves."""
        for leaf, part in zip(self.tensors, self.split(x), strict=True):
            leaf.copy_(part)

    def split(self, x: Tensor) -> list[Tensor]:
        """A vector ``(P,)`` as tensors shaped like the leaves."""
        parts = x.split([leaf.numel() for leaf in self.tensors])
        return [p.view(leaf.shape) for p, leaf in zip(parts, self.tensors, strict=True)]

    def describe(self, index: int) -> str:
        """Name of one scalar parameter, such as ``scale[3]``.

        Raises:
            IndexError: If there are not so many.
        """
        for name, leaf in zip(self.names, self.tensors, strict=True):
            if index < leaf.numel():
                where = [int(i) for i in torch.unravel_index(torch.tensor(index), leaf.shape)]
                return f"{name}{where}" if where else name
            index -= leaf.numel()
        raise IndexError(index)


def relative_names(names: Sequence[str], guide: Any) -> list[str]:
    """Parameters' names without the number that Pyro gives the second guide of a class.

    Args:
        names: Names of parameters, guide's and model's alike.
        guide: The guide, or one like it of another process.

    Example:
        >>> from pyro_mf import AutoMeanField
        >>> relative_names(["AutoMeanField_2.loc", "tau"], AutoMeanField(lambda: None))
        ['AutoMeanField.loc', 'tau']
    """
    own = type(guide).__name__
    return [re.sub(rf"^{re.escape(own)}_\d+\.", f"{own}.", name) for name in names]
