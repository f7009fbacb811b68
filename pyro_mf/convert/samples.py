"""Which chains and draws a result has, and arguments that are not what they should be."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pyro_mf.convert import generations
from pyro_mf.convert.groups import Draws


def check_arguments(model_args: Any) -> None:
    """Refuse a lone argument where a tuple is meant: a tensor would be taken apart row by row.

    Raises:
        TypeError: If ``model_args`` is neither a tuple nor a list.
    """
    if model_args is not None and not isinstance(model_args, tuple | list):
        raise TypeError(
            "model_args must be a tuple of the model's positional arguments; got "
            f"{type(model_args).__name__}. Write model_args=(data,) for one argument."
        )


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
