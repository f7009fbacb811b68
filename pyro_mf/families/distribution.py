"""A family with its parameters, as a distribution of torch's kind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_mf.families.protocol import Family, Params


class FamilyDistribution(Distribution):
    """Factors that torch has no class for: their draws and densities.

    Elements of a block may be dependent although they are in the batch: their log densities are
    then the contributions that sum to the block's.

    Args:
        family: The family.
        params: Its parameters.
        shape: Shape of one value.
        event_dim: How many of its dimensions are the event, at the right.
        view: Shape of one value as the family sees it, of as many elements; ``shape`` by default.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(
        self,
        family: Family,
        params: Params,
        shape: tuple[int, ...],
        *,
        event_dim: int = 0,
        view: tuple[int, ...] | None = None,
    ) -> None:
        self.family = family
        self.params = params
        self._shape = torch.Size(shape)
        self._view = torch.Size(shape if view is None else view)
        batch_dim = len(shape) - event_dim
        super().__init__(self._shape[:batch_dim], self._shape[batch_dim:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        dim = len(self.event_shape)
        return constraints.independent(constraints.real, dim) if dim else constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> FamilyDistribution:
        """Independent repetitions, in dimensions to the left.

        Raises:
            ValueError: If the factors' own dimensions are to be repeated.
        """
        new, own = torch.Size(batch_shape), self._shape[: len(self._shape) - len(self.event_shape)]
        if own != new[len(new) - len(own) :]:
            raise ValueError(
                f"factors of batch shape {tuple(own)} can be repeated to the left of it only; got "
                f"{tuple(new)}."
            )
        expanded = copy.copy(self)
        expanded._batch_shape = new
        return expanded

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values, differentiable in the parameters."""
        shape = self._extended_shape(torch.Size(sample_shape))
        lead = shape[: len(shape) - len(self._shape)]
        like = self.params[0]
        noise = self.family.noise((lead.numel(), *self._view), dtype=like.dtype, device=like.device)
        return self.family.transform(self.params, noise).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density by element of the batch, in nats."""
        lead = value.shape[: value.dim() - len(self._shape)]
        parts = self.family.log_prob(self.params, value.reshape((*lead, *self._view)))
        return self._by_batch(parts.reshape((*lead, *self._shape)))

    def entropy(self) -> Tensor:
        """Entropy by element of the batch, in nats.

        Raises:
            NotImplementedError: If it has no closed form.
        """
        found = self.family.entropy(self.params)
        if found is None:
            raise NotImplementedError(f"{self.family.name} factors have no entropy in closed form.")
        return self._by_batch(found.reshape(self._shape)).expand(self._batch_shape)

    @property
    def mean(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always; what to ask instead.
        """
        raise NotImplementedError(
            f"{self.family.name} factors have no mean in closed form. Average draws of rsample, or "
            "ask icdf for the median."
        )

    @property
    def variance(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always; what to ask instead.
        """
        raise NotImplementedError(
            f"{self.family.name} factors have no variance in closed form. Take that of draws of "
            "rsample."
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution functions of the elements, for elements that are numbers.

        Raises:
            NotImplementedError: If the family has none.
        """
        known = getattr(self.family, "cdf", None)
        if known is None or self._view != self._shape or self.event_shape:
            raise NotImplementedError(f"{self.family.name} factors have no cdf here.")
        return known(self.params, value)  # type: ignore[no-any-return]

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles of the elements' own distributions, for elements that are numbers.

        Raises:
            NotImplementedError: If the elements are vectors.
        """
        if self._view != self._shape or self.event_shape:
            raise NotImplementedError("vectors have no quantiles.")
        return self.family.quantile(self.params, value)

    def _by_batch(self, parts: Tensor) -> Tensor:
        dim = len(self.event_shape)
        return parts.flatten(parts.dim() - dim).sum(-1) if dim else parts
