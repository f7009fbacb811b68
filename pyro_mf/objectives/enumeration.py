"""A model's log joint with its discrete sites enumerated, and its expectation under factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import GuideMismatchError, NonFiniteError
from pyro_mf._pyro import Packed, Term

Fn = Callable[..., Any]


class NotEnumerableError(Exception):
    """Sites cannot be summed over in parallel; the message says why."""


@dataclass(frozen=True, eq=False)
class EnumeratedJoint:
    """A model's log joint at given values of all other sites, by values of enumerated ones.

    Args:
        terms: Its summands.
        nodes: The enumerated sites of the model's trace, by the symbols of their dimensions.
        impossible: Names of sites that have probability zero at some of the values.
    """

    terms: list[Term]
    nodes: dict[str, Any]
    impossible: tuple[str, ...] = ()

    def probs(self, factors: Mapping[str, Any]) -> dict[str, Packed]:
        """Probabilities of the enumerated sites' values, ready for :meth:`expectation`.

        Args:
            factors: A distribution by the name of each site.
        """
        return {
            symbol: _pyro.pack_like(factors[node["name"]].log_prob(node["value"]).exp(), node)
            for symbol, node in self.nodes.items()
        }

    def expectation(self, probs: Mapping[str, Packed]) -> Tensor:
        """Expectation under independent factors, in nats.

        Each term is summed against the factors of the sites that it depends on, and no others, so
        the cost is that of the terms.

        Args:
            probs: Probabilities of every enumerated site, by symbol.

        Raises:
            NonFiniteError: If it is not finite.
        """
        total = self.total(probs)
        if not bool(torch.isfinite(total)):
            self._refuse(float(total.detach()))
        return total

    def total(self, probs: Mapping[str, Packed]) -> Tensor:
        """:meth:`expectation`, whatever it is."""
        parts = [_weighted(t, [probs[d] for d in t.dims if d in self.nodes])[0] for t in self.terms]
        return torch.stack([part.sum() for part in parts]).sum()

    def _refuse(self, total: float) -> None:
        """Say why the log joint is not finite.

        Raises:
            NonFiniteError: Always.
        """
        names = ", ".join(f"'{name}'" for name in self.impossible)
        if not self.nodes:
            raise NonFiniteError(
                f"the log joint is {total}: {names} has probability zero at every value of the "
                "discrete sites. Check the data, or start elsewhere."
            )
        raise NonFiniteError(
            f"the expected log joint is {total}: the factors of discrete sites give weight to "
            f"values at which {names} has probability zero, for which the ELBO is minus infinity. "
            "Sum these sites out (leave them out of family), or give such values a small "
            "probability in the model."
        )

    def conditional(self, symbol: str, probs: Mapping[str, Packed]) -> Packed:
        """Expected log joint by the values of one site, the others' factors averaged over.

        Args:
            symbol: The site's.
            probs: Probabilities of every enumerated site, by symbol.

        Returns:
            In the dimensions of ``probs[symbol]``, up to what the site's value does not change.
        """
        target = probs[symbol].dims
        total = torch.zeros_like(probs[symbol].value)
        for term in self.terms:
            if symbol in term.dims:
                others = [probs[d] for d in term.dims if d in self.nodes and d != symbol]
                value, dims = _weighted(term, others)
                extra = [i for i, d in enumerate(dims) if d not in target]
                left = "".join(d for d in dims if d in target)
                total = total + _aligned(value.sum(extra) if extra else value, left, target)
        return Packed(total, target)


def enumerate_joint(
    model: Fn,
    guide_trace: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    nesting: int,
    *,
    kept: frozenset[str] = frozenset(),
) -> EnumeratedJoint:
    """Run a model at a guide's draws.

    Discrete latents without a site in the guide are summed out.

    Args:
        model: The model.
        guide_trace: A trace of the guide.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        nesting: Number of batch dimensions that plates use.
        kept: Discrete sites of the guide that are enumerated instead of taken from its trace.

    Raises:
        GuideMismatchError: If a continuous latent of the model has no site in the guide.
        NonFiniteError: If some site's log probability is not finite.
        NotEnumerableError: If the model does not keep values and elements of plates apart.
    """
    drawn = guide_trace.copy()
    for name in kept:
        drawn.remove_node(name)
    runnable = _pyro.enumerated(model, nesting, sampled=frozenset(drawn.nodes))
    trace = poutine.trace(poutine.replay(runnable, trace=drawn)).get_trace(*args, **kwargs)
    _check_latents(trace, guide_trace)
    trace.compute_log_prob()
    impossible = _check_finite(trace)
    absent = [name for name in kept if name not in trace]
    if absent:
        raise GuideMismatchError(
            f"the guide has factors for the discrete sites {absent}, which the model does not "
            "visit. Make a new guide for this model."
        )
    if not any(map(_pyro.has_enumerated_dims, trace.nodes.values())):
        return EnumeratedJoint([Term(torch.as_tensor(trace.log_prob_sum()), "", frozenset())], {})
    terms = _pyro.enumerated_terms(trace, nesting, kept=kept)
    nodes = {_symbol(trace.nodes[name]): trace.nodes[name] for name in sorted(kept)}
    for symbol, node in nodes.items():
        plates = {trace.plate_to_symbol[f.name] for f in node["cond_indep_stack"] if f.vectorized}
        if any(symbol in term.dims and not plates <= term.plates for term in terms):
            raise NotEnumerableError(
                f"something outside of the plate around '{node['name']}' depends on all of its "
                "elements"
            )
    return EnumeratedJoint(terms, nodes, impossible)


def _symbol(node: Any) -> str:
    """The symbol of an enumerated site's dimension.

    Raises:
        NotEnumerableError: If the site is not enumerated.
    """
    symbol = _pyro.enumerated_symbol(node)
    if symbol is None:
        raise NotEnumerableError(f"'{node['name']}' is observed, or marked for another treatment")
    return symbol


def _check_latents(trace: Any, guide_trace: Any) -> None:
    missing = [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not node["is_observed"]
        and not _pyro.is_subsample(node)
        and name not in guide_trace
        and not _pyro.is_enumerable(node)
    ]
    if missing:
        raise GuideMismatchError(
            f"latent sites {missing} of the model have no sample statement in the guide, which has "
            f"{list(guide_trace.stochastic_nodes)}. Add them to the guide, or observe them."
        )


def _check_finite(trace: Any) -> tuple[str, ...]:
    """Refuse log densities that are not finite, and name sites that are impossible at some values.

    Raises:
        NonFiniteError: If one is NaN or infinite, minus infinity at enumerated values apart.
    """
    impossible = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or bool(torch.isfinite(total := node["log_prob_sum"]).all()):
            continue
        if not _pyro.has_enumerated_dims(node) or not bool((total == -torch.inf).all()):
            raise NonFiniteError(
                f"the log probability of site '{name}' is {total.sum().item()}. "
                "Parameters keep their last finite values. Try a smaller step or another start."
            )
        impossible.append(name)
    return tuple(impossible)


def _weighted(term: Term, probs: list[Packed]) -> tuple[Tensor, str]:
    """A term times probabilities, not summed, with its dimensions; what is impossible is zero."""
    if not probs:
        return term.value, term.dims
    own = set(term.dims)
    dims = term.dims + "".join(sorted({d for p in probs for d in p.dims} - own))
    product = _aligned(*probs[0], dims)
    for other in probs[1:]:
        product = product * _aligned(*other, dims)
    product, value = torch.broadcast_tensors(product, _aligned(term.value, term.dims, dims))
    return product * torch.where(product > 0, value, 0.0), dims


def _aligned(value: Tensor, own: str, dims: str) -> Tensor:
    """A packed tensor in other dimensions, those that it lacks of size one."""
    value = value.permute([own.index(d) for d in dims if d in own])
    sizes = iter(value.shape)
    return value.reshape([next(sizes) if d in own else 1 for d in dims])
