"""What the samplers are told and what they hand back, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What a sampler is told.

    Args:
        num_samples: Draws per chain after warmup.
        warmup_steps: Draws per chain that tune step size and metric, and are dropped.
        num_chains: Number of chains.
        target_accept_prob: Acceptance statistic that the step size is tuned to, in (0, 1).
        max_tree_depth: A trajectory has at most ``2 ** max_tree_depth`` steps.
        seed: Seed of everything random.
        progress: Whether to show a progress bar.
    """

    num_samples: int
    warmup_steps: int
    num_chains: int
    target_accept_prob: float
    max_tree_depth: int
    seed: int
    progress: bool


@dataclass(frozen=True)
class Draws:
    """What a sampler hands back.

    Args:
        z: Unconstrained draws after warmup, shape ``(chains, draws, D)``.
        stats: Per draw, each of shape ``(chains, draws)``.
        seconds: Wall time of ``"warmup"`` and ``"sample"``.
        interrupted: Whether Ctrl-C ended the run early.
    """

    z: Tensor
    stats: dict[str, np.ndarray]
    seconds: dict[str, float]
    interrupted: bool = False


def largest_block(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Which chains, cut to which length, keep the most draws of an interrupted run.

    Args:
        lengths: Draws that each chain has made.

    Returns:
        Indices of the chains kept, in order, and the number of draws of each.

    Example:
        >>> largest_block([1000, 900, 40, 0])
        ([0, 1], 900)
    """
    order = sorted(range(len(lengths)), key=lambda chain: -lengths[chain])
    sizes = [(k + 1) * lengths[chain] for k, chain in enumerate(order)]
    best = max(range(len(order)), key=sizes.__getitem__)
    return sorted(order[: best + 1]), lengths[order[best]]
