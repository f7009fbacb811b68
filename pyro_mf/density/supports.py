"""Supports of latent sites: a value inside, and whether they stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_mf._errors import ModelError


def support_of(fn: Any) -> constraints.Constraint:
    """The support of a distribution, that of a mixture being its components'.

    Example:
        >>> import pyro.distributions as dist
        >>> halves = dist.Categorical(torch.ones(2))
        >>> support_of(dist.MixtureSameFamily(halves, dist.Normal(torch.zeros(2), 1.0)))
        Real()
    """
    support: constraints.Constraint = _unwrapped(fn.support)
    return support


def _unwrapped(support: Any) -> Any:
    if type(support).__name__ == "MixtureSameFamilyConstraint":  # which torch does not export
        return _unwrapped(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = _unwrapped(support.base_constraint)
        if base is not support.base_constraint:
            return constraints.independent(base, support.reinterpreted_batch_ndims)
    return support


def value_at_zero(msg: Any) -> Tensor:
    """The value of a latent site at zero on its unconstrained axis.

    Raises:
        ModelError: If its support has no bijection to an unconstrained space.
    """
    fn = msg["fn"]
    try:
        transform = biject_to(support_of(fn))
    except NotImplementedError as error:
        raise ModelError(
            f"latent site '{msg['name']}' ({type(fn).__name__}) has support {fn.support}, which "
            "has no bijection to an unconstrained space and cannot be summed out. Give the site a "
            "distribution with another support, or marginalise it by hand."
        ) from error
    like = _reference(fn)
    zero = torch.zeros(transform.inverse_shape(fn.shape()), dtype=like.dtype, device=like.device)
    return transform(zero)  # type: ignore[no-any-return]


def _reference(fn: Any) -> Tensor:
    """A floating tensor with the dtype and device of a distribution's values."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return torch.empty(0)


def check_supports_are_fixed(
    latents: Mapping[str, Any], run: Callable[[Callable[[Any], Tensor]], Any]
) -> None:
    """Refuse supports that depend on other latents: no fixed bijection maps onto them.

    Args:
        latents: The continuous latent nodes of a run at the unconstrained zero.
        run: Runs the model with the latents at given values and returns its trace.

    Raises:
        ModelError: If a support moves when other latents do.
    """
    movable = [name for name, node in latents.items() if has_tensor_bounds(support_of(node["fn"]))]
    if not movable:
        return

    def elsewhere(node: Any) -> Tensor:
        transform = biject_to(support_of(node["fn"]))
        return transform(transform.inv(value_at_zero(node)) + 0.5)  # type: ignore[no-any-return]

    moved = run(elsewhere)
    for name in movable:
        if not torch.equal(value_at_zero(latents[name]), value_at_zero(moved.nodes[name])):
            raise ModelError(
                f"the support of latent site '{name}' depends on other latent sites "
                f"({latents[name]['fn'].support} at the start). Sample it on a fixed support "
                "instead and rescale: for Uniform(0, x) sample Uniform(0, 1) and multiply by x."
            )


def has_tensor_bounds(support: constraints.Constraint) -> bool:
    """Whether a support's bounds are tensors, and so may change from one run to the next."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return any(isinstance(bound, Tensor) for bound in vars(support).values())
