"""What a mean-field factor must offer.

A family describes one-dimensional distributions, one per element of a batch. It is frozen and holds
no parameters: they are passed in as a tuple of tensors, so the same functions serve a guide, a
captured graph and a solver.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

Params: TypeAlias = tuple[Tensor, ...]
"""One tensor ``(*batch, *extra)`` per name in ``param_names``, in that order, constrained.

What is extra depends on the parameter: nothing for a location, the bins for the heights of a
spline.
"""


@runtime_checkable
class Family(Protocol):
    """A family of one-dimensional distributions on the real line, elementwise over a batch.

    Every method broadcasts: draws lead, so values have shape ``(..., *batch)``. Values are on the
    unconstrained axis; mapping to a site's support is the guide's business. A family that is at
    home on a support (``native_to``) is there the law of the support's unconstrained coordinate:
    Gamma factors that of ``log X``.

    A *block* family (``event_dim == 1``) describes distributions of vectors: values are
    ``(..., *batch, k)``, and densities and entropies come as k contributions that sum to the
    vector's own, as the chain rule gives them.
    """

    @property
    def name(self) -> str:
        """The name under which :func:`~pyro_mf.families.get_family` finds the family."""
        ...

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters."""
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
        """Draw standard normal noise for values of a shape, in as many numbers as it takes."""
        ...

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Map noise to values, differentiably in the parameters."""
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


def event_dim_of(family: Family) -> int:
    """1 for a family of vectors, 0 for one of numbers."""
    return int(getattr(family, "event_dim", 0))


def home_of(family: Family) -> str | None:
    """The kind of support that a family is at home on; ``None`` for one that fits everywhere."""
    home: str | None = getattr(family, "native_to", None)
    return home


def spans_site(family: Family) -> bool:
    """Whether one vector of a block family holds a whole site, and not one slice of its plates."""
    return event_dim_of(family) == 1 and getattr(family, "over", "slice") == "site"
