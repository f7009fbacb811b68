"""The optimum of Normal factors, from which other fits start."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.families import Normal
from pyro_mf.guides import AutoMeanField
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.solvers.deterministic import solve_deterministic
from pyro_mf.solvers.outcome import Outcome, Report, silent

_INIT_SCALE = 0.1
START_TOLERANCE = 0.3  # it is only a start


class NormalStart(NamedTuple):
    """Normal factors from which another fit starts.

    Args:
        outcome: How their own fit ended; ``None`` where there was none.
        loc: Their locations, shape ``(D,)``, in double precision.
        scale: Their scales.
    """

    outcome: Outcome | None
    loc: Tensor
    scale: Tensor


def fit_normal(
    log_joint: LogJoint,
    guide: FactorisedGuide,
    *,
    seed: int = 0,
    max_gradients: int = 5000,
    disperse: bool = False,
    report: Report = silent,
) -> NormalStart:
    """Fit Normal factors of the reverse KL, in a guide of their own unless this one has them.

    Args:
        log_joint: The density, of the full data.
        guide: A guide for the same latents, set up.
        seed: Seed of everything random.
        max_gradients: Budget in gradients.
        disperse: Start at a random point.
        report: Called with the progress.

    Returns:
        The start. Angles have no Normal optimum: for models with angles there is no outcome, and
        the location is the guide's median.

    Raises:
        ModelError: If no start was found.
    """
    normal: Any = guide
    if not isinstance(guide.family, Normal):
        own = guide.flat_params()
        median = guide.family.quantile(own, torch.tensor(0.5).to(own[0])).detach()
        if any(site.is_circular for site in guide.layout.sites):
            median = median.double().cpu()
            return NormalStart(None, median, torch.ones_like(median))
        normal = AutoMeanField(log_joint.model)
        normal.setup(*log_joint.model_args, **log_joint.model_kwargs)
        normal.set_flat_params((median, torch.full_like(median, _INIT_SCALE)))
    outcome = solve_deterministic(
        log_joint,
        normal,
        seed=seed,
        tolerance=START_TOLERANCE,
        max_gradients=max_gradients,
        disperse=disperse,
        report=report,
    )
    loc, scale = (p.detach().double().cpu() for p in normal.flat_params())
    return NormalStart(outcome, loc, scale)
