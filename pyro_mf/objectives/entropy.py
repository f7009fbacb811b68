"""Estimators of the entropy term of the ELBO, each a part of its own.

The ELBO is an expected log joint plus the entropy of q. The log joint always gets the pathwise
(reparameterisation) gradient; these differ in how the entropy and its gradient are estimated.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pyro_mf.families import Family


class EntropyEstimator(Protocol):
    """An unbiased estimate of q's entropy, elementwise."""

    @property
    def name(self) -> str:
        """The name under which objectives find it."""
        ...

    @property
    def detaches_params(self) -> bool:
        """Whether log q is differentiated through the draws alone."""
        ...

    @property
    def uses_closed_form(self) -> bool:
        """Whether an exact entropy is used where there is one."""
        ...

    def per_element(self, family: Family, params: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """Entropy of each factor at draws ``z`` of shape ``(S, D)``: ``(D,)`` or ``(S, D)``."""
        ...


@dataclass(frozen=True)
class ClosedForm:
    """The exact entropy, where the family has one; else like :class:`MonteCarlo`.

    The default: no variance of its own, and no assumption about q.
    """

    name: str = "closed_form"
    detaches_params: bool = False
    uses_closed_form: bool = True

    def per_element(self, family: Family, params: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """See :class:`EntropyEstimator`."""
        exact = family.entropy(params)
        return -family.log_prob(params, z) if exact is None else exact


@dataclass(frozen=True)
class StickingTheLanding:
    """Minus log q at the draws, differentiated through the draws alone.

    The score term is dropped, which has expectation zero. At q = posterior every single gradient is
    zero; away from it, as mean-field q always is under correlation, its variance can be the larger.

    References:
        Roeder, Wu and Duvenaud (2017), Sticking the Landing, https://arxiv.org/abs/1703.09194
    """

    name: str = "stl"
    detaches_params: bool = True
    uses_closed_form: bool = False

    def per_element(self, family: Family, params: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """See :class:`EntropyEstimator`."""
        return -family.log_prob(tuple(p.detach() for p in params), z)


@dataclass(frozen=True)
class MonteCarlo:
    """Minus log q at the draws, differentiated in full, as stock ``Trace_ELBO`` does."""

    name: str = "monte_carlo"
    detaches_params: bool = False
    uses_closed_form: bool = False

    def per_element(self, family: Family, params: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """See :class:`EntropyEstimator`."""
        return -family.log_prob(params, z)


ESTIMATORS: dict[str, EntropyEstimator] = {
    e.name: e for e in (ClosedForm(), StickingTheLanding(), MonteCarlo())
}


def get_entropy(entropy: str | EntropyEstimator) -> EntropyEstimator:
    """Find an estimator by name, or return the one given.

    Raises:
        TypeError: If it is neither a name nor an estimator.
        ValueError: If the name is unknown.
    """
    if not isinstance(entropy, str):
        if not hasattr(entropy, "per_element"):
            raise TypeError(
                f"entropy must be one of {', '.join(ESTIMATORS)}, or an object with the methods of "
                f"EntropyEstimator; got {entropy!r}."
            )
        return entropy
    if entropy in ESTIMATORS:
        return ESTIMATORS[entropy]
    near = difflib.get_close_matches(entropy, ESTIMATORS, n=1, cutoff=0.3)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"entropy must be one of {', '.join(ESTIMATORS)}; got {entropy!r}.{hint}")
