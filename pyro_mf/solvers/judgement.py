"""What speaks against draws of a posterior, and which to take where something does against all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_mf.density.blocks import Blocks
from pyro_mf.solvers.posterior_draws import PosteriorDraws, Source
from pyro_mf.solvers.scouts import count_astray
from pyro_mf.solvers.tails import describe_tails

_NUM_COMPARED = 4000  # draws among which scouts must find neighbours
# Draws by which one failure is preferred to another; by how much those that are of any use may fail
# Stein's identities, on average; and the order of those that fail them by as much.
_NUM_JUDGED, _MAX_DISCREPANCY = 1024, 1.0
_PREFERENCE: tuple[Source, ...] = ("hmc", "smc", "mixture", "importance")


def with_checks(
    draws: PosteriorDraws,
    blocks: Blocks,
    scouts: Tensor,
    own: Callable[[Tensor], Tensor] | None = None,
) -> PosteriorDraws:
    """The draws with what the scouts and the tails say against them.

    Args:
        draws: The draws.
        blocks: The log joint.
        scouts: Points of the posterior reached from elsewhere, shape ``(K, D)``.
        own: To the coordinates in which these must have draws near them; by default the same.
    """
    problems = list(draws.problems)
    near = draws.sample(_NUM_COMPARED, seed=0)
    astray = count_astray(scouts, near) if own is None else count_astray(own(scouts), own(near))
    if astray and draws.source != "hmc":  # whose chains start there, and R-hat tells
        problems.append(
            f"{astray} of {len(scouts)} climbs from elsewhere ended where none of the draws is: "
            "there is another mode, or a long bend"
        )
    problems += describe_tails(blocks.values, draws, blocks.log_joint.layout.element_names())
    return replace(draws, problems=tuple(problems))


def least_far(candidates: Sequence[PosteriorDraws], blocks: Blocks) -> int | None:
    """Which draws are least far from the posterior, of several that all failed some check.

    Not those of the smallest stated error, which the worst draws may have. Where the differences
    are small, chains are preferred to tempered draws and those to weighted ones.

    Args:
        candidates: The draws.
        blocks: The log joint.

    Returns:
        The index, or ``None`` where none is of any use.
    """
    far, _, index = min(
        (round(_discrepancy(draws, blocks), 1), _PREFERENCE.index(draws.source), k)
        for k, draws in enumerate(candidates)
    )
    return index if far < _MAX_DISCREPANCY else None


def _discrepancy(draws: PosteriorDraws, blocks: Blocks) -> float:
    """By how much the draws fail Stein's identities, which those of the posterior meet."""
    z = draws.sample(_NUM_JUDGED, seed=0)
    gradients = blocks.value_and_grad(z)[1]
    location = draws.sd * gradients.mean(0)
    scale = ((z - draws.mean) * gradients).mean(0) + 1.0
    return float((location.abs() + scale.abs()).mean().nan_to_num(nan=torch.inf))
