"""What a mean-field factor must offer.

A family describes one-dimensional distributions, one per element of a flat vector of length D. It
is frozen and holds no parameters: they are passed in as a tuple of tensors of shape ``(D,)``, so
the same functions serve a guide, a captured graph and a solver.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

Params: TypeAlias = tuple[Tensor, ...]
"""One tensor of shape ``(D,)`` per name in ``param_names``, in that order, constrained."""


@runtime_checkable
class Family(Protocol):
    """A family of one-dimensional distributions on the real line, elementwise over ``(D,)``.

    Every method broadcasts: draws lead, so noise and values have shape ``(..., D)``. Values are on
    the unconstrained axis; mapping to a site's support is the guide's business.
    """

    @property
    def name(self) -> str:
        """The name under which :func:`~pyro_mf.families.get_family` finds the family."""
        ...

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters; the first two are ``loc`` and ``scale``."""
        ...

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Constraint of each parameter, in the order of ``param_names``."""
        ...

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Parameters of the member nearest to location ``loc`` and scale ``scale``."""
        ...

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw parameter-free noise."""
        ...

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Map noise to values: monotone in the noise, differentiable in the parameters."""
        ...

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, not summed, in nats."""
        ...

    def entropy(self, params: Params) -> Tensor | None:
        """Entropy of every element in nats, or ``None`` where it has no closed form."""
        ...

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``; ``p`` broadcasts against ``(D,)``."""
        ...

    def distribution(self, params: Params) -> Distribution:
        """The factors as one distribution whose batch shape is that of the parameters."""
        ...

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood of draws: the forward KL's optimum.

        Args:
            u: Draws, shape ``(S, D)``.
            log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        """
        ...
