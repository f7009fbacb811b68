"""Factors of discrete sites: distributions over finitely many values, elementwise over a batch.

A value is known by its index among the site's values, ``0, 1, ..., K - 1`` in the order in which
Pyro enumerates them. There is no unconstrained axis and no reparameterisation: objectives sum over
the values or draw them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.protocol import Params


@runtime_checkable
class DiscreteFamily(Protocol):
    """A family of distributions over the values of a discrete site, elementwise over a batch."""

    @property
    def name(self) -> str:
        """The name under which a guide finds the family."""
        ...

    @property
    def native_to(self) -> str:
        """``"boolean"`` or ``"integer"``: the values that a site must have."""
        ...

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Constraint of each parameter, in the order of ``param_names``."""
        ...

    @property
    def param_names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        ...

    def init(self, log_weights: Tensor) -> Params:
        """Parameters under which values have probabilities in proportion to weights."""
        ...

    def log_probs(self, params: Params) -> Tensor:
        """Log probability of every value, shape ``(*batch, K)``, in nats."""
        ...

    def log_prob(self, params: Params, index: Tensor) -> Tensor:
        """Log probability of values given by their indices, not summed, in nats."""
        ...

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element in nats, shape ``(*batch,)``."""
        ...

    def native(self, params: Params) -> Distribution:
        """The factors as a distribution of torch's own kind."""
        ...

    def fit_weighted(self, index: Tensor, log_weights: Tensor) -> Params:
        """Probabilities of values among weighted draws: the forward KL's optimum."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    r"""Factors of two values: :math:`q(k = 1) = 1 / (1 + e^{-\ell})`.

    Example:
        >>> family = Bernoulli()
        >>> params = family.init(torch.tensor([2.0, 1.0]).log())  # weights of 0 and 1
        >>> family.log_probs(params).exp()
        tensor([0.6667, 0.3333])
    """

    @property
    def name(self) -> str:
        """``"bernoulli"``."""
        return "bernoulli"

    @property
    def native_to(self) -> str:
        """``"boolean"``: sites of the values 0 and 1."""
        return "boolean"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("logits",)``: the log odds of 1, shape ``(*batch,)``."""
        return ("logits",)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real."""
        return (constraints.real,)

    def init(self, log_weights: Tensor) -> Params:
        """Log odds of log weights ``(*batch, 2)``."""
        return (log_weights[..., 1] - log_weights[..., 0],)

    def log_probs(self, params: Params) -> Tensor:
        """Log probabilities of 0 and of 1, shape ``(*batch, 2)``."""
        (logits,) = params
        return torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))

    def log_prob(self, params: Params, index: Tensor) -> Tensor:
        """Log probability of values ``(..., *batch)`` of 0 and 1, in nats."""
        (logits,) = params
        return torch.nn.functional.logsigmoid(torch.where(index.bool(), logits, -logits))

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        return _entropy(self.log_probs(params))

    def native(self, params: Params) -> torch.distributions.Bernoulli:
        """A Bernoulli with batch shape ``(*batch,)``."""
        return torch.distributions.Bernoulli(logits=params[0])

    def fit_weighted(self, index: Tensor, log_weights: Tensor) -> Params:
        """Weighted frequencies of draws ``(S, *batch)``, kept off 0 and 1 as in Categorical."""
        return self.init(_log_frequencies(index, log_weights, 2))


@dataclass(frozen=True)
class Categorical:
    r"""Factors of K values: :math:`q(k) \propto e^{\ell_k}`.

    Args:
        num_values: Number K of values, at least 2; ``None`` for as many as the site has.

    Raises:
        ValueError: If ``num_values`` is no integer of at least 2.

    Example:
        >>> family = Categorical()
        >>> params = family.init(torch.tensor([1.0, 2.0, 1.0]).log())
        >>> family.entropy(params) / torch.tensor(2.0).log()  # in bits
        tensor(1.5000)
    """

    num_values: int | None = None

    def __post_init__(self) -> None:
        k = self.num_values
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 2):
            raise ValueError(f"num_values must be an integer of at least 2, or None; got {k!r}.")

    @property
    def name(self) -> str:
        """``"categorical"``."""
        return "categorical"

    @property
    def native_to(self) -> str:
        """``"integer"``: sites of finitely many values, those of 0 and 1 included."""
        return "integer"

    @property
    def param_names(self) -> tuple[str, ...]:
        """``("logits",)``: log probabilities up to a constant, shape ``(*batch, K)``."""
        return ("logits",)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real."""
        return (constraints.real,)

    def init(self, log_weights: Tensor) -> Params:
        """Normalised log weights ``(*batch, K)``."""
        return (log_weights.log_softmax(-1),)

    def log_probs(self, params: Params) -> Tensor:
        """Log probability of every value, shape ``(*batch, K)``."""
        return params[0].log_softmax(-1)

    def log_prob(self, params: Params, index: Tensor) -> Tensor:
        """Log probability of values ``(..., *batch)`` given by their indices, in nats."""
        log_probs = self.log_probs(params)
        index = index.long().unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], log_probs.shape[:-1])
        index = index.expand(*shape, 1)
        return log_probs.expand(*shape, -1).gather(-1, index).squeeze(-1)

    def entropy(self, params: Params) -> Tensor:
        """Entropy of every element, in nats."""
        return _entropy(self.log_probs(params))

    def native(self, params: Params) -> torch.distributions.Categorical:
        """A Categorical with batch shape ``(*batch,)``."""
        return torch.distributions.Categorical(logits=params[0])

    def fit_weighted(self, index: Tensor, log_weights: Tensor) -> Params:
        """Weighted frequencies of draws, kept off zero.

        Half an effective draw is added to every value (Krichevsky and Trofimov): a value that was
        not drawn may still be possible, and the forward KL of a factor without it is infinite.

        Args:
            index: Indices of the drawn values, shape ``(S, *batch)``.
            log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        """
        num_values = int(index.max()) + 1 if self.num_values is None else self.num_values
        return self.init(_log_frequencies(index, log_weights, num_values))


DISCRETE_FAMILIES: dict[str, type[Bernoulli] | type[Categorical]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
}


def _entropy(log_probs: Tensor) -> Tensor:
    """Entropy of normalised log probabilities; impossible values contribute nothing."""
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)


def _log_frequencies(index: Tensor, log_weights: Tensor, num_values: int) -> Tensor:
    weights = torch.softmax(log_weights, 0)
    effective = 1.0 / weights.square().sum()  # number of draws
    hits = torch.nn.functional.one_hot(index.long(), num_values).to(weights)
    frequencies = torch.tensordot(weights, hits, 1)
    smoothed: Tensor = (effective * frequencies + 0.5) / (effective + 0.5 * num_values)
    return smoothed.log()
