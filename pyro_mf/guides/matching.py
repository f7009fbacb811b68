"""Whether a guide and a model are about the same latent sites."""

from __future__ import annotations

from pyro_mf._errors import GuideMismatchError
from pyro_mf.density.sites import Layout, Plate, Site


def check_same_sites(layout_model: Layout, layout_guide: Layout) -> None:
    """Raise unless a guide's layout describes the model's latent sites.

    Args:
        layout_model: Layout of the model as it is called now; it may be a subsample's.
        layout_guide: The guide's layout, subsampled plates at full size.

    Raises:
        GuideMismatchError: If sites are missing, surplus, of another shape or in another order.
    """
    model = {site.name: site for site in layout_model.sites}
    guide = {site.name: site for site in layout_guide.sites}
    missing = [name for name in model if name not in guide]
    extra = [name for name in guide if name not in model]
    if missing or extra:
        raise GuideMismatchError(
            f"the guide was built for a model with latent sites {list(guide)}, this model has "
            f"{list(model)}: {_count('missing in the guide', missing)}"
            f"{'; ' if missing and extra else ''}{_count('only in the guide', extra)}. "
            "Make a new guide for this model."
        )
    for name, site in model.items():
        check_plates(name, site.plates, guide[name].plates)
        _check_shape(site, guide[name])
    if list(model) != list(guide):
        raise GuideMismatchError(
            f"the model visits its latent sites in the order {list(model)}, the guide was built "
            f"for the order {list(guide)}. Make a new guide for this model."
        )


def check_plates(name: str, model: tuple[Plate, ...], guide: tuple[Plate, ...]) -> None:
    """Raise if plates around a site have another size than those that a guide was set up for.

    Args:
        name: The site's name.
        model: Plates around it in the model, as it is called now.
        guide: Plates around it as the guide knows them.

    Raises:
        GuideMismatchError: If one has another full size.
    """
    sizes = {plate.name: plate.full_size for plate in guide}
    for plate in model:
        if sizes.get(plate.name, plate.full_size) != plate.full_size:
            raise GuideMismatchError(
                f"plate '{plate.name}' around latent site '{name}' has size "
                f"{plate.full_size}, but the guide was set up for size {sizes[plate.name]}. "
                "Make a new guide for data of another size. If this is a minibatch, say so in the "
                f'model: pyro.plate("{plate.name}", full_size, subsample=indices).'
            )


def _check_shape(model: Site, guide: Site) -> None:
    expected = list(guide.shape)
    for plate in model.plates:
        expected[plate.dim - guide.event_dim] = plate.size
    if list(model.shape) != expected or model.event_dim != guide.event_dim:
        raise GuideMismatchError(
            f"latent site '{model.name}' has shape {tuple(model.shape)} with {model.event_dim} "
            f"event dimensions, but the guide was set up for shape {tuple(expected)} with "
            f"{guide.event_dim}. Make a new guide for this shape."
        )


def _count(what: str, names: list[str]) -> str:
    return f"{names} {what}" if names else ""
