"""Which chains and draws a result has."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyro_mf.convert import generations
from pyro_mf.convert.groups import Draws


def sample_coords(like: Any) -> tuple[np.ndarray, np.ndarray]:
    """Chain and draw labels of another result, so that both can be drawn in one picture.

    Args:
        like: An ``InferenceData``, a ``DataTree``, or an object with ``to_arviz()``.

    Raises:
        TypeError: If it is no result.
        ValueError: If its posterior lacks chain or draw.
    """
    result = like
    if not generations.is_result(like):
        if not hasattr(like, "to_arviz"):
            raise TypeError(
                "like must be an InferenceData, a DataTree or an object with to_arviz(); got "
                f"{type(like).__name__}."
            )
        result = like.to_arviz()
    posterior = generations.dataset(result, "posterior")
    if not {"chain", "draw"} <= set(posterior.dims):
        raise ValueError(
            "the posterior of `like` must have the dimensions chain and draw; it has "
            f"{sorted(map(str, posterior.dims))}."
        )
    return posterior["chain"].values, posterior["draw"].values


def take_like(z: Tensor, like: Any | None) -> tuple[Draws, tuple[Any, Any]]:
    """Choose as many chains and draws as another result has.

    Args:
        z: Draws, shape ``(C, T, D)``.
        like: The other result; ``None`` takes all.

    Returns:
        The first chains and evenly spaced draws, labelled as in ``like``, and the index of both.

    Raises:
        ValueError: If there are not enough, or none.
    """
    chains, length = z.shape[:2]
    if not chains * length:
        raise ValueError("there are no draws to convert. Run the chains first.")
    if like is None:
        return Draws(z, range(chains), range(length)), (slice(None), slice(None))
    chain, draw = sample_coords(like)
    if len(chain) > chains or len(draw) > length:
        raise ValueError(
            f"`like` has {len(chain)} chains of {len(draw)} draws, and only {chains} chains of "
            f"{length} draws are there. Run longer, or convert the other result like this one."
        )
    picked = np.linspace(0, length - 1, len(draw)).round().astype(int)
    return Draws(z[: len(chain)][:, picked], chain, draw), (slice(0, len(chain)), picked)
