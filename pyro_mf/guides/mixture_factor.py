"""The distribution of one latent site under a mixture, given the sites before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_mf.families.factorised_mixture import FactorisedMixture


class MixtureFactor(TorchDistribution):
    """One site of a mixture of factorised Normals, on the unconstrained axis.

    Elements of the site are dependent, those of its batch too: log densities of the batch are
    contributions that sum to the site's own.

    Args:
        log_weights: Log weights of the components given the sites before, up to a constant, shape
            ``(*lead, *ones, K)`` with a one for each of the site's batch dimensions.
        loc: Locations, shape ``(*shape, K)``.
        scale: Scales, the same shape.
        event_dim: How many dimensions of ``shape`` are the event, at the right.
        component: Draw from this component only, while densities are still the mixture's; by
            default from all.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        log_weights: Tensor,
        loc: Tensor,
        scale: Tensor,
        *,
        event_dim: int,
        component: int | None = None,
    ) -> None:
        self.loc, self.scale, self.component = loc, scale, component
        self.has_rsample = component is not None  # whether draws carry all gradients
        self._own = loc.shape[:-1]
        batch_dim = len(self._own) - event_dim
        lead = tuple(log_weights.shape[: max(0, log_weights.dim() - 1 - batch_dim)])
        while lead and lead[0] == 1:  # left by a site with more batch dimensions
            lead = lead[1:]
        self.logits = log_weights.reshape((*lead, log_weights.shape[-1]))
        self._family = FactorisedMixture(loc.shape[-1])
        shape = torch.Size((*lead, *self._own))
        split = len(shape) - event_dim
        super().__init__(shape[:split], shape[split:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        dim = len(self.event_shape)
        return constraints.independent(constraints.real, dim) if dim else constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureFactor:
        """Independent repetitions of the site, in dimensions to the left of its own.

        Raises:
            ValueError: If the site's own dimensions are to be repeated.
        """
        new = torch.Size(batch_shape)
        own = self._own[: len(self._own) - len(self.event_shape)]
        if own != new[len(new) - len(own) :]:
            raise ValueError(
                f"a site of batch shape {tuple(own)} can be repeated to the left of it only; got "
                f"{tuple(new)}."
            )
        expanded = copy.copy(self)
        expanded._batch_shape = new
        return expanded

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the chosen component, differentiably.

        Raises:
            NotImplementedError: If draws are from all components: the choice has no derivative.
        """
        if self.component is None:
            raise NotImplementedError("draws of a mixture choose a component: no derivative.")
        loc, scale = self.loc[..., self.component], self.scale[..., self.component]
        noise = torch.randn(
            self._extended_shape(torch.Size(sample_shape)), dtype=loc.dtype, device=loc.device
        )
        return loc + scale * noise

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values, without gradients; one component for all elements of a draw."""
        if self.component is not None:
            return self.rsample(sample_shape)
        shape = self._extended_shape(torch.Size(sample_shape))
        lead = shape[: len(shape) - len(self._own)]
        probs = torch.softmax(self.logits, -1).expand(*lead, -1)
        chosen = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1).reshape(lead)
        loc, scale = (x.movedim(-1, 0)[chosen] for x in (self.loc, self.scale))
        return loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density by element of the batch, in nats."""
        lead = value.shape[: value.dim() - len(self._own)]
        num = self.logits.shape[-1]
        params = (self.loc.reshape(-1, num), self.scale.reshape(-1, num), self.logits)
        parts = self._family.log_prob(params, value.reshape((*lead, -1)))
        parts = parts.reshape((*parts.shape[:-1], *self._own))
        dim = len(self.event_shape)
        return parts.flatten(parts.dim() - dim).sum(-1) if dim else parts

    def evidence(self, value: Tensor) -> Tensor:
        """Log density of a value under every component, by which the next site's weights change.

        Args:
            value: Shape ``(*lead, *shape)``.

        Returns:
            Shape ``(*lead, *ones, K)``.
        """
        each = self._family.component_log_probs((self.loc, self.scale, self.logits), value)
        event = tuple(range(-1 - len(self.event_shape), -1))
        each = each.sum(event) if event else each
        batch = tuple(range(-1 - (len(self._own) - len(event)), -1))
        return each.sum(batch, keepdim=True) if batch else each
