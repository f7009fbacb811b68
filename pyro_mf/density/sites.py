"""Where each latent site lives in the flat unconstrained vector.

A :class:`Layout` is read off one execution of the model. It knows supports, plates and shapes, and
no inference: how to cut a flat vector into sites, and how to map sites between the unconstrained
space and the model's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pyro_mf._errors import ModelError
from pyro_mf.density.supports import support_of


@dataclass(frozen=True)
class Plate:
    """One vectorised plate around a site.

    Args:
        name: The plate's name.
        dim: Its batch dimension, negative, counted from the right of the batch shape.
        size: Number of elements the model ran with (the subsample's size).
        full_size: Number of elements of the full plate.
    """

    name: str
    dim: int
    size: int
    full_size: int

    @property
    def is_subsampled(self) -> bool:
        """Whether the model sees only part of the plate at a time."""
        return self.size != self.full_size


@dataclass(frozen=True)
class Site:
    """One continuous latent site.

    Args:
        name: The site's name in the model.
        support: Constraint on the site's values.
        shape: Shape of one value in the model's space (batch shape, then event shape).
        unconstrained_shape: Shape of the same value on the unconstrained axis.
        event_dim: Number of event dimensions of the model's distribution.
        plates: Vectorised plates around the site, outermost first.
        start: Where the site starts in the flat vector.
        is_circular: Whether values that are a turn apart are the same, as for angles.
    """

    name: str
    support: constraints.Constraint
    shape: torch.Size
    unconstrained_shape: torch.Size
    event_dim: int
    plates: tuple[Plate, ...]
    start: int
    is_circular: bool = False

    @property
    def size(self) -> int:
        """Number of elements of the site in the flat vector."""
        return self.unconstrained_shape.numel()

    @property
    def stop(self) -> int:
        """Where the site ends in the flat vector."""
        return self.start + self.size

    @property
    def transform(self) -> Transform:
        """The bijection from the unconstrained axis to the support."""
        return biject_to(self.support)  # type: ignore[no-any-return]

    @property
    def unconstrained_event_dim(self) -> int:
        """Event dimensions on the unconstrained axis; differs from ``event_dim`` for matrices."""
        return self.event_dim + len(self.unconstrained_shape) - len(self.shape)

    @property
    def plate_scale(self) -> float:
        """How many elements of the full plates each element of a minibatch stands for."""
        return math.prod(p.full_size / p.size for p in self.plates)

    @property
    def is_real(self) -> bool:
        """Whether the unconstrained axis is the model's own."""
        return _base_constraint(self.support) is constraints.real

    @property
    def is_elementwise(self) -> bool:
        """Whether each element of a value depends on one coordinate alone."""
        transform = biject_to(_base_constraint(self.support))
        return bool(transform.domain.event_dim == 0 and transform.codomain.event_dim == 0)

    def log_abs_det(self, unconstrained: Tensor, value: Tensor) -> Tensor:
        """Log Jacobian of the transform, summed over the event: the site's batch shape."""
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        return sum_rightmost(log_det, log_det.dim() - (value.dim() - self.event_dim))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layout:
    """All continuous latent sites of a model, in the order in which the model visits them."""

    sites: tuple[Site, ...]

    @property
    def size(self) -> int:
        """Length D of the flat unconstrained vector."""
        return self.sites[-1].stop if self.sites else 0

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    @classmethod
    def from_trace(cls, nodes: Mapping[str, Any], *, full_size: bool = False) -> Layout:
        """Read the layout off a trace's latent nodes.

        Args:
            nodes: ``{name: site}`` of the continuous latent sites of a Pyro trace.
            full_size: Count subsampled plates at their full size, as a guide's parameters do.

        Raises:
            ModelError: If a site's support has no bijection to an unconstrained space.
        """
        sites: list[Site] = []
        start = 0
        for name, node in nodes.items():
            site = _read_site(name, node, start, full_size=full_size)
            sites.append(site)
            start = site.stop
        return cls(tuple(sites))

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Cut flat vectors ``(..., D)`` into sites ``(..., *unconstrained_shape)``."""
        batch = z.shape[:-1]
        return {
            s.name: z[..., s.start : s.stop].reshape(batch + s.unconstrained_shape)
            for s in self.sites
        }

    def pack(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Join sites ``(..., *unconstrained_shape)`` into flat vectors ``(..., D)``."""
        parts = []
        for s in self.sites:
            value = unconstrained[s.name]
            batch = value.shape[: value.dim() - len(s.unconstrained_shape)]
            parts.append(value.reshape(*batch, s.size))
        return torch.cat(parts, -1)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map flat vectors ``(..., D)`` to values in the model's space ``(..., *shape)``."""
        return {s.name: s.transform(u) for s, u in self._pairs(z)}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Map values ``(..., *shape)`` to flat vectors ``(..., D)``."""
        return self.pack({s.name: s.transform.inv(values[s.name]) for s in self.sites})

    def flat_index(self, indices: Mapping[str, Tensor]) -> Tensor | None:
        """Positions in this full-size layout of the elements that a subsample visits.

        Args:
            indices: For each subsampled plate its indices, shape ``(size,)``.

        Returns:
            A long tensor in the order of the subsample's own layout, or ``None`` where the
            subsample is everything.
        """
        if not any(p.name in indices for s in self.sites for p in s.plates):
            return None
        parts = []
        for s in self.sites:
            position = torch.arange(s.start, s.stop).reshape(s.unconstrained_shape)
            for plate in s.plates:
                if plate.name in indices:
                    dim = plate.dim - s.unconstrained_event_dim
                    position = position.index_select(dim, indices[plate.name].cpu())
            parts.append(position.reshape(-1))
        return torch.cat(parts)

    def plate_scale(self) -> Tensor:
        """Per element, how many elements of the full plate it stands for, shape ``(D,)``."""
        scales = [torch.full((s.size,), s.plate_scale, dtype=torch.float64) for s in self.sites]
        return torch.cat(scales)

    def element_names(self) -> list[str]:
        """A readable name per element of the flat vector, such as ``theta[3]``."""
        names = []
        for s in self.sites:
            for index in itertools.product(*map(range, s.unconstrained_shape)):
                names.append(f"{s.name}[{','.join(map(str, index))}]" if index else s.name)
        return names

    def describe_flat(self, gradient: Tensor) -> str | None:
        """Say on which elements a log density does not depend, judged by gradients.

        Args:
            gradient: Gradients of the log density at one or more points, shape ``(..., D)``.

        Returns:
            A sentence, or ``None`` where it depends on all.
        """
        flat = (gradient.reshape(-1, self.size) == 0).all(0).nonzero().reshape(-1).tolist()
        if not flat:
            return None
        names = self.element_names()
        return (
            f"the log density does not depend on {len(flat)} of {self.size} latent elements, first "
            f"'{names[flat[0]]}': their posterior is flat and improper. Give them a proper prior, "
            "or leave out what is masked"
        )

    def _pairs(self, z: Tensor) -> list[tuple[Site, Tensor]]:
        unconstrained = self.unpack(z)
        return [(s, unconstrained[s.name]) for s in self.sites]


def _base_constraint(support: constraints.Constraint) -> constraints.Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _is_circular(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.VonMises)


def _read_site(name: str, node: Any, start: int, *, full_size: bool) -> Site:
    fn = node["fn"]
    shape = list(node["value"].shape)
    plates = []
    for frame in node["cond_indep_stack"]:
        if not frame.vectorized:
            continue
        plate = Plate(frame.name, frame.dim, frame.size, frame.full_size or frame.size)
        plates.append(plate)
        if full_size:
            shape[plate.dim - fn.event_dim] = plate.full_size
    if full_size:
        plates = [Plate(p.name, p.dim, p.full_size, p.full_size) for p in plates]
    plates.sort(key=lambda p: p.dim)
    try:
        unconstrained_shape = biject_to(support_of(fn)).inverse_shape(torch.Size(shape))
    except RuntimeError as error:
        raise ModelError(
            f"latent site '{name}' ({type(fn).__name__}) has bounds that come with the minibatch, "
            "so they are not known for the full plate. Sample it on a fixed support and rescale."
        ) from error
    except NotImplementedError as error:
        raise ModelError(
            f"latent site '{name}' ({type(fn).__name__}) has support {fn.support}, which has no "
            "bijection to an unconstrained space. Give the site a distribution with another "
            "support, or marginalise it."
        ) from error
    return Site(
        name=name,
        support=support_of(fn),
        shape=torch.Size(shape),
        unconstrained_shape=torch.Size(unconstrained_shape),
        event_dim=fn.event_dim,
        plates=tuple(plates),
        start=start,
        is_circular=_is_circular(fn),
    )
