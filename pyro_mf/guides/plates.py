"""The guide's plates follow the model's minibatch.

Stock autoguides draw a minibatch of their own and replay it into the model, also where the model
was given its indices by the caller. Here the model decides and the guide follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError
from pyro_mf.density.prototype import value_at_zero
from pyro_mf.density.sites import Layout, Site


class _AllKnown(Exception):  # noqa: N818 - a signal, not an error
    """Every plate asked for has been seen."""


@dataclass(frozen=True)
class MinibatchPlates:
    """Which plates around a guide's sites are subsampled, and how to follow them.

    Args:
        followed: Plates whose indices the guide takes from the model at every call.
        given: Those of them whose indices the caller gives to the model.
    """

    followed: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()

    def create(
        self,
        created: Mapping[str, Any],
        frames: Mapping[str, Any],
        model: tuple[Callable[..., Any]] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
    ) -> dict[str, Any]:
        """Make the plates of one call.

        Args:
            created: Plates that the user's ``create_plates`` made.
            frames: Every plate around the guide's sites.
            model: The model in a tuple, or ``None`` where it was lost in pickling.
            args: Positional arguments of this call.
            kwargs: Keyword arguments of this call.
            layout: The guide's layout.

        Raises:
            GuideMismatchError: If a created plate has another size than the model's.
        """
        plates = dict(created)
        for name, plate in plates.items():
            if name in frames and plate.size != _full_size(frames[name]):
                raise GuideMismatchError(
                    f"create_plates made plate '{name}' with size {plate.size}; in the model the "
                    f"full plate has size {_full_size(frames[name])}."
                )
        wanted = self.followed - plates.keys()
        indices = {}
        if wanted and model is not None:
            indices = model_indices(model[0], args, kwargs, wanted, layout)
        for name, frame in sorted(frames.items()):
            if name not in plates:
                subsample = indices.get(name)
                size = frame.size if subsample is None else None
                plates[name] = pyro.plate(
                    name,
                    _full_size(frame),
                    dim=frame.dim,
                    subsample_size=size,
                    subsample=subsample,
                )
        return plates

    def check_followed(
        self,
        plates: Mapping[str, Any],
        model: tuple[Callable[..., Any]] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
    ) -> None:
        """Check plates that someone else made, as ``AutoGuideList`` does for its members.

        Raises:
            GuideMismatchError: If the model was given other indices.
        """
        given = self.followed & self.given & plates.keys()
        if not given or model is None:
            return
        for name, indices in model_indices(model[0], args, kwargs, given, layout).items():
            if not torch.equal(indices.cpu(), plates[name].indices.cpu()):
                raise GuideMismatchError(
                    f"the model was given the indices of plate '{name}', but AutoGuideList drew "
                    "others and would put them in their place. Pass create_plates=... to "
                    f'AutoGuideList, with pyro.plate("{name}", ..., subsample=indices).'
                )

    def take(self, value: Tensor, site: Site, plates: Mapping[str, Any]) -> Tensor:
        """Select the elements of a full-size parameter that the plates visit."""
        for plate in site.plates:
            made = plates[plate.name]
            if plate.name in self.followed or made.subsample_size != made.size:
                indices = made.indices.to(value.device)
                value = value.index_select(plate.dim - site.unconstrained_event_dim, indices)
        return value


def model_indices(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plates: frozenset[str],
    layout: Layout,
) -> dict[str, Tensor]:
    """Ask the model which elements of its subsampled plates this call visits.

    The model runs, hidden from outer handlers, only until the last of these plates is made: what
    comes after it, usually the likelihood, is not computed.

    Args:
        model: The Pyro model.
        args: Positional arguments of this call.
        kwargs: Keyword arguments of this call.
        plates: Names of the plates to ask about.
        layout: The guide's sites, which are put at the unconstrained zero.

    Returns:
        Long tensors by plate name. A plate that the model does not show is left out.
    """
    found: dict[str, Tensor] = {}
    latents = {site.name for site in layout.sites}

    def follow(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            if msg["value"] is None:
                msg["value"], msg["done"] = msg["fn"](), True
            found[msg["name"]] = torch.as_tensor(msg["value"])
            if plates <= found.keys():
                raise _AllKnown
        elif msg["name"] in latents and not msg["is_observed"]:
            msg["value"], msg["done"] = value_at_zero(msg), True

    try:
        with torch.no_grad(), poutine.block(), _pyro.substitute(follow):
            model(*args, **kwargs)
    except _AllKnown:
        pass
    return {name: found[name] for name in plates if name in found}


def _full_size(frame: Any) -> int:
    return int(frame.full_size or frame.size)
