"""Every number that a user reads off a posterior: elements of latents and deterministic sites."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from pyro_mf.convert.groups import evaluate_draws
from pyro_mf.density import LogJoint

_MAX_NUMBERS = 20_000_000  # of one table of values, 160 MB
_MAX_COSTLY = 4_000  # draws at which a costly model is run for its deterministic sites


class Quantities:
    """Scalar elements of a model's latents and deterministic sites, in the model's own space.

    Booleans and integers count as numbers: the mean of an event is its probability.

    Args:
        log_joint: The model with its full data.
        is_costly: Whether a run of the model takes so long that each one counts.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.deterministic("pair", torch.stack([scale, scale**2]))
        >>> Quantities(LogJoint(model)).names
        ['scale', 'pair[0]', 'pair[1]']
    """

    def __init__(self, log_joint: LogJoint, *, is_costly: bool = False) -> None:
        self.log_joint, self._is_costly = log_joint, is_costly

    @cached_property
    def _deterministic(self) -> dict[str, torch.Size]:
        """Shapes of the deterministic sites, by name."""
        like = self.log_joint
        origin = torch.zeros(1, like.size, dtype=like.dtype, device=like.device)
        found = evaluate_draws(like, origin, log_likelihood=False).deterministics
        return {name: x.shape[1:] for name, x in found.items() if not x.is_complex()}

    @cached_property
    def names(self) -> list[str]:
        """A name per quantity, such as ``theta[0]``."""
        sites = {site.name: site.shape for site in self.log_joint.layout.sites}
        return [
            f"{site}[{','.join(map(str, index))}]" if index else site
            for site, shape in (sites | self._deterministic).items()
            for index in itertools.product(*map(range, shape))
        ]

    @property
    def max_draws(self) -> int:
        """Draws for which the table fits into memory and the time is bearable."""
        most = max(1000, _MAX_NUMBERS // max(1, len(self.names)))
        return min(most, _MAX_COSTLY) if self._is_costly and self._deterministic else most

    def at(self, z: Tensor) -> Tensor:
        """Values at flat unconstrained vectors.

        Args:
            z: Shape ``(S, D)``.

        Returns:
            Shape ``(S, P)``, in double precision on the CPU, in the order of :attr:`names`.
        """
        like = self.log_joint
        rows = z.to(dtype=like.dtype, device=like.device)
        values: Mapping[str, Tensor]
        if self._deterministic:
            found = evaluate_draws(like, rows, log_likelihood=False)
            values = found.latents | {n: found.deterministics[n] for n in self._deterministic}
        else:
            values = like.constrain(rows)
        columns = [v.detach().reshape(len(z), -1).double().cpu() for v in values.values()]
        return torch.cat(columns, 1)
