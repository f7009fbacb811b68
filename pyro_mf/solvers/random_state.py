"""Random numbers of a run: forked from the program's, seeded, saved and restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import torch
from torch import Tensor


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Leave the generators of torch, NumPy and Python afterwards as they are now.

    Args:
        seed: Seed inside.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, what pyro seeds
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with torch.random.fork_rng(devices=devices):
        try:
            pyro.set_rng_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def get_state(device: torch.device) -> dict[str, Tensor]:
    """The generators' states as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor(float(gauss), dtype=torch.float64),
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss]).double(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators where :func:`get_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    *keys, position, has_gauss = state["numpy"].tolist()
    gauss = float(state["numpy_gauss"])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, *internal = state["python"].tolist()
    next_gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(internal), next_gauss[0] if next_gauss else None))
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
