"""Several families over one flat vector, each for some of its elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_mf.families.distribution import FamilyDistribution
from pyro_mf.families.protocol import Family, Params, event_dim_of


@dataclass(frozen=True)
class Part:
    """One family and the elements of the flat vector that it describes.

    Args:
        family: The family.
        ranges: Where its elements are, as pairs of start and stop, ascending and apart.
        block_size: Number of elements k of one vector of a block family; else 1.
    """

    family: Family
    ranges: tuple[tuple[int, int], ...]
    block_size: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(stop - start for start, stop in self.ranges)

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape in which the family sees its elements: ``(n,)``, for blocks ``(n / k, k)``."""
        if event_dim_of(self.family):
            return (self.size // self.block_size, self.block_size)
        return (self.size,)

    @cached_property
    def noise_shape(self) -> torch.Size:
        """Shape of the noise of one draw."""
        return self.family.noise((0, *self.batch)).shape[1:]

    def take(self, flat: Tensor) -> Tensor:
        """This part of flat vectors ``(..., D)``, shape ``(..., *batch)``."""
        pieces = [flat[..., start:stop] for start, stop in self.ranges]
        own = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return own.unflatten(-1, self.batch) if len(self.batch) > 1 else own

    def give(self, own: Tensor) -> list[tuple[int, Tensor]]:
        """Pieces of flat vectors from values ``(..., *batch)``, each with where it starts."""
        flat = own.flatten(-2) if len(self.batch) > 1 else own
        sizes = [stop - start for start, stop in self.ranges]
        starts = (start for start, _ in self.ranges)
        return list(zip(starts, flat.split(sizes, -1), strict=True))

    def local(self, start: int) -> int:
        """Where a range of the flat vector that starts there starts among this part's elements.

        Raises:
            KeyError: If it is not in this part.
        """
        offset = 0
        for first, stop in self.ranges:
            if first <= start < stop:
                return offset + start - first
            offset += stop - first
        raise KeyError(start)


@dataclass(frozen=True)
class Product:
    """Independent parts, each with a family of its own, as one family over ``(D,)``.

    Args:
        parts: The parts; together they cover the flat vector once.

    Example:
        >>> from pyro_mf.families import Normal
        >>> family = Product((Part(Normal(), ((0, 1), (3, 4))), Part(Normal(), ((1, 3),))))
        >>> family.param_names
        ('normal_loc', 'normal_scale', 'normal_2_loc', 'normal_2_scale')
        >>> params = family.init(torch.arange(4.0), torch.ones(4))
        >>> family.quantile(params, torch.tensor(0.5))
        tensor([0., 1., 2., 3.])
    """

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The parts' names, joined."""
        return "+".join(dict.fromkeys(part.family.name for part in self.parts))

    @cached_property
    def param_names(self) -> tuple[str, ...]:
        """The families' parameters, with the family's name before them."""
        seen: dict[str, int] = {}
        names: list[str] = []
        for part in self.parts:
            own = part.family.name
            seen[own] = seen.get(own, 0) + 1
            prefix = own if seen[own] == 1 else f"{own}_{seen[own]}"
            names += [f"{prefix}_{name}" for name in part.family.param_names]
        return tuple(names)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The families' own."""
        return tuple(c for part in self.parts for c in part.family.constraints)

    def own_params(self, params: Sequence[Tensor]) -> list[Params]:
        """Parameters part by part."""
        own, at = [], 0
        for part in self.parts:
            count = len(part.family.param_names)
            own.append(tuple(params[at : at + count]))
            at += count
        return own

    def part_of(self, start: int) -> int:
        """Index of the part that an element of the flat vector belongs to.

        Raises:
            KeyError: If there is none.
        """
        for index, part in enumerate(self.parts):
            if any(first <= start < stop for first, stop in part.ranges):
                return index
        raise KeyError(start)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Parameters of the members nearest to location and scale, each ``(D,)``."""
        return tuple(
            p for part in self.parts for p in part.family.init(part.take(loc), part.take(scale))
        )

    def noise(
        self,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Noise of all parts side by side, shape ``(S, M)`` for values ``(S, D)``."""
        drawn = []
        for part in self.parts:
            own = part.family.noise((*shape[:-1], *part.batch), dtype=dtype, device=device)
            drawn.append(own.reshape(*shape[:-1], part.noise_shape.numel()))
        return torch.cat(drawn, -1)

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Map noise to values ``(S, D)``, part by part."""
        pieces = noise.split([part.noise_shape.numel() for part in self.parts], -1)
        shaped = [x.unflatten(-1, p.noise_shape) for x, p in zip(pieces, self.parts, strict=True)]
        return self._join(lambda k, own: self.parts[k].family.transform(own, shaped[k]), params)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Contributions to the log density, in nats, shape that of ``u``."""
        return self._join(
            lambda k, own: self.parts[k].family.log_prob(own, self.parts[k].take(u)), params
        )

    def entropy(self, params: Params) -> Tensor | None:
        """Entropies, where every family has a closed form."""
        own = self.own_params(params)
        found = [part.family.entropy(p) for part, p in zip(self.parts, own, strict=True)]
        if any(x is None for x in found):
            return None
        return self._join(lambda k, _: found[k], params)

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Marginal quantiles; ``p`` broadcasts against ``(D,)``."""
        size = sum(part.size for part in self.parts)

        def of_part(k: int, own: Params) -> Tensor:
            part = self.parts[k]
            at = part.take(p) if p.dim() and p.shape[-1] == size > 1 else p
            if len(part.batch) > 1 and at is p and p.dim():
                at = p[..., None]
            return part.family.quantile(own, at)

        return self._join(of_part, params)

    def distribution(self, params: Params) -> Distribution:
        """The product as one distribution with batch shape ``(D,)``."""
        return FamilyDistribution(self, params, (sum(part.size for part in self.parts),))

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Fit every part to its columns of the draws."""
        return tuple(
            p for part in self.parts for p in part.family.fit_weighted(part.take(u), log_weights)
        )

    def _join(self, value: Callable[[int, Params], Tensor | None], params: Params) -> Tensor:
        """Flat vectors from what every part says of its own elements."""
        pieces: list[tuple[int, Tensor]] = []
        for k, own in enumerate(self.own_params(params)):
            found = value(k, own)
            if found is not None:
                pieces += self.parts[k].give(found)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda x: x[0])], -1)
