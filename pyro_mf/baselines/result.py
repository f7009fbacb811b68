"""What ``run_nuts`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from pyro_mf.density import LogJoint


@dataclass(frozen=True, eq=False, repr=False)
class NUTSResult:
    """Draws of a NUTS run, with what is needed to judge and to convert them.

    Args:
        z: Draws on the unconstrained space, shape ``(chains, draws, D)``.
        stats: Per draw, each of shape ``(chains, draws)``: ``lp`` (log joint on the unconstrained
            space, nats), ``diverging``, ``step_size``, ``tree_depth``, ``n_steps``,
            ``acceptance_rate`` and, from nutpie, ``energy``.
        log_joint: The density that was sampled.
        backend: ``"pyro"`` or ``"nutpie"``.
        seconds: Wall time of ``capture``, ``warmup`` and ``sample``.
        seed: Seed of the run.
        interrupted: Whether Ctrl-C ended the run; the draws are those made before.
    """

    z: Tensor
    stats: dict[str, np.ndarray]
    log_joint: LogJoint
    backend: str
    seconds: dict[str, float]
    seed: int
    interrupted: bool = False

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Draws in the model's own space: per latent site, shape ``(chains, draws, *shape)``."""
        return self.log_joint.constrain(self.z)

    def to_arviz(self, **kwargs: Any) -> Any:
        """Convert for ArviZ.

        Args:
            **kwargs: As for :func:`pyro_mf.from_pyro`.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).
        """
        from pyro_mf.convert import from_pyro

        return from_pyro(self, **kwargs)

    def __repr__(self) -> str:
        chains, draws, size = self.z.shape
        return (
            f"NUTSResult({self.backend}: {chains} chains x {draws} draws of {size} latents, "
            f"{int(self.stats['diverging'].sum())} diverging, {sum(self.seconds.values()):.1f} s"
            f"{', interrupted' if self.interrupted else ''})"
        )
