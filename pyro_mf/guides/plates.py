"""The guide's plates follow the model's minibatch.

Stock autoguides draw a minibatch of their own and replay it into the model, also where the model
was given its indices by the caller. Here the model decides and the guide follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor

from pyro_mf._errors import GuideMismatchError, MinibatchWarning, ModelError
from pyro_mf.density.sites import Plate, Site

AskModel: TypeAlias = Callable[[frozenset[str]], dict[str, Tensor]]
"""Gives the indices that the model visits in this call, for plates by name."""


@dataclass(frozen=True)
class MinibatchPlates:
    """Which plates around a guide's sites are subsampled, and how to follow them.

    Args:
        followed: Plates whose indices the guide takes from the model at every call.
        given: Plates whose indices the caller hands to the model.
    """

    followed: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()

    def create(
        self, created: Mapping[str, Any], frames: Mapping[str, Any], ask_model: AskModel
    ) -> dict[str, Any]:
        """Make the plates of one call.

        Args:
            created: Plates that the user's ``create_plates`` made.
            frames: Every plate around the guide's sites, as the model showed it at setup.
            ask_model: Gives the model's indices in this call.

        Raises:
            GuideMismatchError: If a created plate has another size than the model's.
        """
        for name, plate in created.items():
            if name in frames and plate.size != _full_size(frames[name]):
                raise GuideMismatchError(
                    f"create_plates made plate '{name}' with size {plate.size}; in the model the "
                    f"full plate has size {_full_size(frames[name])}."
                )
        plates = dict(created)
        wanted = self.followed - created.keys()
        indices = ask_model(wanted) if wanted else {}
        for name, frame in sorted(frames.items()):
            if name not in plates:
                subsample = indices.get(name)
                size = frame.size if subsample is None else None
                plates[name] = pyro.plate(
                    name, _full_size(frame), size, subsample=subsample, dim=frame.dim
                )
        return plates

    def check_followed(self, plates: Mapping[str, Any], ask_model: AskModel) -> None:
        """Check plates that someone else made, as ``AutoGuideList`` does for its members.

        Args:
            plates: Plates by name.
            ask_model: Gives the model's indices in this call.

        Raises:
            GuideMismatchError: If the model was given other indices.
        """
        given = self.followed & self.given & plates.keys()
        for name, indices in (ask_model(given) if given else {}).items():
            if not torch.equal(indices.cpu(), plates[name].indices.cpu()):
                raise GuideMismatchError(
                    f"the model was given the indices of plate '{name}', but AutoGuideList drew "
                    "others and would put them in their place. Pass create_plates=... to "
                    f'AutoGuideList, with pyro.plate("{name}", ..., subsample=indices).'
                )

    def warn_of_lost_indices(self, names: Iterable[str]) -> None:
        """Say that draws of these plates are about to be returned without their indices.

        Args:
            names: Plates that the guide made.
        """
        lost = sorted((self.followed - self.given).intersection(names))
        if lost:
            warnings.warn(
                f"the model subsamples {lost} at random, so these draws hold whichever elements "
                "came up, and nothing tells which. For draws of the full plate use "
                "guide.sample_posterior(num_draws), or give the model its indices: "
                f'pyro.plate("{lost[0]}", ..., subsample=indices).',
                MinibatchWarning,
                stacklevel=2,
            )

    def _is_subsample(self, made: Any) -> bool:
        return made.name in self.followed or made.subsample_size != made.size

    def visits_all(self, site: Site, plates: Mapping[str, Any]) -> bool:
        """Whether the plates visit all elements of a site, in order."""
        return not any(self._is_subsample(plates[plate.name]) for plate in site.plates)

    def shape_of(self, site: Site, plates: Mapping[str, Any]) -> torch.Size:
        """Unconstrained shape of the elements of a site that the plates visit."""
        shape = list(site.unconstrained_shape)
        batch_dim = len(shape) - site.unconstrained_event_dim
        for plate in site.plates:
            shape[batch_dim + plate.dim] = plates[plate.name].subsample_size
        return torch.Size(shape)

    def take(self, value: Tensor, site: Site, plates: Mapping[str, Any]) -> Tensor:
        """Select the elements of a site's full-size parameter that the plates visit.

        Args:
            value: The parameter, the site's batch dimensions first, then any others.
            site: The site.
            plates: Plates by name.
        """
        batch_dim = len(site.unconstrained_shape) - site.unconstrained_event_dim
        return self.take_batch(value, batch_dim, site.plates, plates)

    def take_batch(
        self, value: Tensor, batch_dim: int, around: Iterable[Plate], plates: Mapping[str, Any]
    ) -> Tensor:
        """Select the elements of a full-size tensor that the plates visit.

        Args:
            value: The tensor, batch dimensions first, then any others.
            batch_dim: Number of its batch dimensions.
            around: The plates, at full size, that it has dimensions for.
            plates: Plates of this call, by name.
        """
        for plate in around:
            if self._is_subsample(plates[plate.name]):
                indices = plates[plate.name].indices.to(value.device)
                value = value.index_select(batch_dim + plate.dim, indices)
        return value


def as_plates(created: pyro.plate | Iterable[pyro.plate]) -> dict[str, Any]:
    """What ``create_plates`` returned, by name.

    Raises:
        ModelError: If there is something else than a plate in it.
    """
    plates = [created] if isinstance(created, pyro.plate) else list(created)
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            raise ModelError(
                "create_plates must return a pyro.plate or an iterable of them; got "
                f"{type(plate).__name__}."
            )
    return {plate.name: plate for plate in plates}


def _full_size(frame: Any) -> int:
    return int(frame.full_size or frame.size)
