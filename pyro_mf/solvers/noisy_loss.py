"""An objective's loss and gradient at fresh draws, or the news that they are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import GuideMismatchError, ModelError, NonFiniteError
from pyro_mf.solvers.leaves import Leaves

# What bad parameters raise: our objectives, a factorisation, Pyro's validation of a distribution.
FAILURES = (FloatingPointError, torch.linalg.LinAlgError, ValueError)  # type: ignore[attr-defined]
_TRIES_AT_START = 10


@dataclass(frozen=True, eq=False)
class NoisyLoss:
    """A loss whose every value is an estimate.

    Args:
        objective: An objective in the manner of :class:`pyro.infer.ELBO`.
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
    """

    objective: Any
    model: Callable[..., Any]
    guide: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def find_leaves(self) -> Leaves:
        """Run the objective once and see which parameters it touches.

        Raises:
            ValueError: If it touches none.
            NonFiniteError: If it is not finite at one of ten tries.
        """
        for tries in range(_TRIES_AT_START):
            try:
                leaves, value = Leaves.touched_by(self._loss_and_grads)
            except FloatingPointError as error:
                if tries == _TRIES_AT_START - 1:
                    raise NonFiniteError(
                        f"the objective is not finite at the start, at {_TRIES_AT_START} of "
                        f"{_TRIES_AT_START} tries. Start elsewhere (the guide's init_loc_fn, a "
                        f"smaller init_scale). The last: {error}"
                    ) from error
                continue
            if not leaves.tensors:
                raise ValueError(
                    "the objective touches no trainable parameter. Give the guide parameters "
                    "(pyro.param, an autoguide), or check requires_grad."
                )
            leaves.clear_gradient()
            if math.isfinite(value):
                return leaves
        raise NonFiniteError(
            f"the objective is {value} at the start, at {_TRIES_AT_START} of {_TRIES_AT_START} "
            "tries. Start elsewhere (the guide's init_loc_fn, a smaller init_scale), or use "
            "ReverseKL, which names the site."
        )

    def gradient(self, leaves: Leaves, *, watch: bool = False) -> tuple[float, Tensor] | None:
        """Loss and gradient ``(P,)`` at the leaves' values; ``None`` where not finite.

        Args:
            leaves: The parameters.
            watch: Whether to look for parameters that are not among them.

        Raises:
            ModelError: If the model or its data are at fault, or new parameters appear.
            GuideMismatchError: If model and guide do not fit.
        """
        try:
            if watch:
                touched, value = Leaves.touched_by(self._loss_and_grads)
                _refuse_new(touched, leaves)
            else:
                value = self._loss_and_grads()
        except (ModelError, GuideMismatchError):
            raise
        except FAILURES:
            leaves.clear_gradient()
            return None
        gradient = leaves.take_gradient()
        # Finite where everything is.
        return (value, gradient) if math.isfinite(value + float(gradient.sum())) else None

    def value(self) -> float | None:
        """Loss without a gradient; ``None`` where it is not finite."""
        try:
            with torch.no_grad():
                value = float(
                    self.objective.loss(self.model, self.guide, *self.args, **self.kwargs)
                )
        except FAILURES:
            return None
        return value if math.isfinite(value) else None

    def _loss_and_grads(self) -> float:
        value = self.objective.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
        if isinstance(value, tuple):
            raise TypeError(
                f"the objective must return one number; {type(self.objective).__name__} returned "
                f"{len(value)}. Use ReverseKL or one of Pyro's ELBOs."
            )
        return float(value)


def _refuse_new(touched: Leaves, leaves: Leaves) -> None:
    known = {id(leaf) for leaf in leaves.tensors}
    new = [n for n, x in zip(touched.names, touched.tensors, strict=True) if id(x) not in known]
    if new:
        raise ModelError(
            f"parameters {new} were not there at the first step. The solver optimises what the "
            "objective touches at its first run: make all parameters there, those of a minibatch "
            "as slices of one tensor for the whole plate."
        )
