"""What objectives, solvers and converters ask of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_mf.density.sites import Layout
from pyro_mf.families import Family


@runtime_checkable
class FactorisedGuide(Protocol):
    """A guide that is a product of one-dimensional factors over a flat unconstrained vector.

    Besides running as a Pyro guide it offers its density as pure functions, so that the same guide
    works on a captured graph. Everything below ``setup`` needs the guide to be set up.
    """

    @property
    def model(self) -> Callable[..., Any]:
        """The model that the guide was made for."""
        ...

    @property
    def family(self) -> Family:
        """The factors' family over the flat vector."""
        ...

    def family_over(self, layout: Layout) -> Family:
        """The family over another layout of the same sites, such as a minibatch's."""
        ...

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector, subsampled plates at full size."""
        ...

    def setup(self, *args: Any, **kwargs: Any) -> Any:
        """Read the model's structure and create the parameters; a second call does nothing."""
        ...

    def flat_params(self) -> tuple[Tensor, ...]:
        """The family's parameters, constrained and differentiable."""
        ...

    @property
    def param_constraints(self) -> tuple[Constraint, ...]:
        """Constraint under which each parameter is stored, in the family's order."""
        ...

    def flat_leaves(self) -> tuple[Tensor, ...]:
        """The unconstrained leaf tensors behind ``flat_params``."""
        ...

    def set_flat_params(self, params: tuple[Tensor, ...]) -> None:
        """Write the family's parameters, constrained."""
        ...

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of values in the model's space, leading batch dimensions kept."""
        ...

    def log_prob_unconstrained(self, z: Tensor) -> Tensor:
        """Log density of flat unconstrained vectors ``(..., D)``."""
        ...

    def sample_unconstrained(self, num_draws: int) -> Tensor:
        """Draw flat unconstrained vectors, shape ``(num_draws, D)``."""
        ...


def is_factorised(guide: object) -> TypeGuard[FactorisedGuide]:
    """Whether a guide offers its density as pure functions; it need not be set up.

    Not one with factors of discrete sites, which are not in the flat vector.
    """
    has_functions = hasattr(type(guide), "flat_params") and hasattr(
        type(guide), "log_prob_unconstrained"
    )
    return has_functions and not getattr(guide, "has_discrete_factors", False)
