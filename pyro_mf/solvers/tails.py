"""Whether draws can know an sd: its error needs a fourth moment, which heavy tails do not have."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mf.solvers.posterior_draws import PosteriorDraws
from pyro_mf.weights import psis

# Pareto index of the squares above which their variance is infinite, by draws and by weights, whose
# own tails are in it; latents for which it is asked.
_MAX_KHAT, _MAX_WEIGHTED_KHAT, _NUM_ASKED = 0.5, 0.7, 8
# Power of the distance with which a density must fall for a fourth moment; sds between which it is
# looked at.
_MIN_POWER, _NEAR, _FAR = 5.0, 30.0, 90.0


def describe_tails(
    values: Callable[[Tensor], Tensor], draws: PosteriorDraws, names: list[str]
) -> list[str]:
    """Say which tails are too heavy for the error of an sd to be told.

    Args:
        values: Log density, shape ``(S,)``, at the rows of ``(S, D)``.
        draws: Draws of the posterior.
        names: A name per latent element.

    Returns:
        Up to two sentences: by the draws, and by the density far out along the axes.
    """
    found = []
    index, khat, khat_se = _heaviest(draws)
    limit = _MAX_WEIGHTED_KHAT if draws.source in ("importance", "mixture") else _MAX_KHAT
    if khat - khat_se > limit:
        found.append(
            f"the tails of '{names[index]}' are so heavy (k-hat {khat:.2f} of its squares, above "
            f"{limit}) that the error of its sd cannot be told from draws"
        )
    index, power = _slowest(values, draws)
    if power < _MIN_POWER:
        found.append(
            f"the density of '{names[index]}' falls only with the power {power:.1f} of its "
            "distance, so that the error of its sd, which needs a fourth moment, cannot be told"
        )
    return found


def _heaviest(draws: PosteriorDraws) -> tuple[int, float, float]:
    """The latent whose squares have the heaviest tail under the weights, k-hat and its error."""
    # Draws that depend on each other know the tail as well as their effective number would.
    surplus = len(draws.z) / min(draws.diagnostics.get("ess", math.inf), len(draws.z))
    standard = (draws.z - draws.mean) / draws.sd.clamp_min(torch.finfo(draws.z.dtype).tiny)
    fourth = draws.weights @ standard.pow(4)
    found = (0, -math.inf, 0.0)
    for index in fourth.topk(min(_NUM_ASKED, len(fourth))).indices.tolist():
        squares = standard[:, index].square().clamp_min(torch.finfo(standard.dtype).tiny)
        tail = psis(draws.log_weights + squares.log())
        if tail.khat > found[1]:
            found = (index, tail.khat, tail.khat_se * math.sqrt(surplus))
    return found


def _slowest(values: Callable[[Tensor], Tensor], draws: PosteriorDraws) -> tuple[int, float]:
    """The latent along whose axis the density falls with the least power, and this power."""
    axes = torch.diag(draws.sd)
    rows = [draws.mean + sign * r * axes for r in (_NEAR, _FAR) for sign in (1.0, -1.0)]
    near, far = values(torch.cat(rows)).reshape(2, 2, -1)
    fall = (near - far).nan_to_num(nan=math.inf, posinf=math.inf).min(0).values
    power = fall / math.log(_FAR / _NEAR)
    return int(power.argmin()), float(power.min())
