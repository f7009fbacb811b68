"""A model's log joint at many draws of its continuous latents, by values of discrete sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._pyro import Packed, Term
from pyro_mf.density import LogJoint
from pyro_mf.density.capture import GraphFunction, PureFunction, capture_graph
from pyro_mf.density.model_function import Inputs
from pyro_mf.density.program import value_and_gradients
from pyro_mf.objectives.enumeration import EnumeratedJoint

_CHUNK = 128  # draws whose terms are in memory at once


class LabelledJoint:
    """The log joint of a model in which some discrete sites are kept and others summed out.

    Whether the model can be run with all values of the kept sites at once is for
    :func:`~pyro_mf.objectives.discrete.make_plan` to find out.

    Args:
        log_joint: The model with its data, in which all discrete sites are summed out.
        names: The discrete sites that are kept.

    Attributes:
        nodes: The kept sites as a trace shows them, by the symbols of their dimensions.
    """

    def __init__(self, log_joint: LogJoint, names: Iterable[str]) -> None:
        self._log_joint = log_joint
        self._program = log_joint.program
        self._kept = frozenset(names)
        origin = torch.zeros(log_joint.size, dtype=log_joint.dtype, device=log_joint.device)
        with torch.no_grad():
            joint, _ = self._at(origin, self._inputs())
        self.nodes = joint.nodes
        self._places = [(term.dims, term.plates) for term in joint.terms]
        backend = self._program.backend
        self._graphs: dict[Any, PureFunction] = {}
        self._terms = GraphFunction(lambda x: self._captured(self._all_terms, x), backend)
        self._expected = GraphFunction(lambda x: self._captured(self._gradients, x), backend)

    def probs(self, factors: Mapping[str, Any]) -> dict[str, Packed]:
        """Probabilities of the kept sites' values, by symbol, from a distribution by name."""
        return EnumeratedJoint([], self.nodes).probs(factors)

    def mean(self, z: Tensor) -> EnumeratedJoint:
        """The log joint averaged over draws, log Jacobians left out.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.
        """
        flat, sums = self._inputs().flat(), []
        for chunk in z.split(min(_CHUNK, len(z))):
            terms = self._terms(chunk, *flat)
            sums.append([term.sum(0) for term in terms])
        totals = [torch.stack(parts).sum(0) / len(z) for parts in zip(*sums, strict=True)]
        means = [Term(x, *place) for x, place in zip(totals, self._places, strict=True)]
        return EnumeratedJoint(means, self.nodes)

    def value_and_grad(self, z: Tensor, probs: Mapping[str, Packed]) -> tuple[Tensor, Tensor]:
        """Log joint averaged over independent factors of the kept sites, at each row.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.
            probs: Probabilities of the kept sites' values, by symbol.

        Returns:
            Values in nats, shape ``(S,)``, Jacobian included, and gradients, shape ``(S, D)``.
        """
        weights = [probs[symbol].value for symbol in self.nodes]
        self._dims = [probs[symbol].dims for symbol in self.nodes]
        value, gradient = self._expected(z, *weights, *self._inputs().flat())
        return value, gradient

    @torch.no_grad()
    def at(self, z: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Log joint at draws of continuous and of kept sites.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.
            values: For every kept site a tensor ``(S, *shape)``.

        Returns:
            In nats, shape ``(S,)``, Jacobian included.
        """
        inputs = self._inputs()
        names = sorted(self._kept)

        def one(row: Tensor, *labels: Tensor) -> Tensor:
            joint, log_det = self._at(row, inputs)
            chosen = dict(zip(names, labels, strict=True))
            probs = {
                symbol: _one_hot(node, chosen[node["name"]], row.dtype)
                for symbol, node in joint.nodes.items()
            }
            return log_det + joint.total(probs)

        parts = zip(*(x.split(_CHUNK) for x in (z, *(values[n] for n in names))), strict=True)
        return torch.cat([self._each(one, *part) for part in parts])

    def _at(self, row: Tensor, inputs: Inputs) -> tuple[EnumeratedJoint, Tensor]:
        """The joint at one flat vector ``(D,)``, and the log Jacobian."""
        trace, log_det = self._program.function.trace(row, inputs)
        nesting = self._program.prototype.max_plate_nesting
        terms = _pyro.enumerated_terms(trace, nesting, kept=self._kept)
        nodes: dict[str, Any] = {}
        for name in sorted(self._kept):
            symbol = _pyro.enumerated_symbol(trace.nodes[name])
            if symbol is not None:
                nodes[symbol] = trace.nodes[name]
        return EnumeratedJoint(terms, nodes), log_det

    def _all_terms(self, z: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        def terms(row: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            joint, _ = self._at(row, self._program.unflatten(flat))
            return tuple(term.value for term in joint.terms)

        return self._rows("terms", terms, z, *flat)

    def _gradients(self, z: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.nodes)

        def expected(row: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            joint, log_det = self._at(row, self._program.unflatten(tensors[count:]))
            weights = map(Packed, tensors[:count], self._dims)
            return (log_det + joint.total(dict(zip(self.nodes, weights, strict=True))),)

        def batch(z: Tensor, inputs: Inputs) -> Tensor:
            return self._rows("expected", expected, z, *tensors[:count], *inputs.flat())[0]

        return value_and_gradients(batch, z, self._program.unflatten(tensors[count:]))[:2]

    def _captured(self, fn: PureFunction, tensors: tuple[Tensor, ...]) -> PureFunction:
        if self._log_joint.mode == "eager":
            return fn
        if self._log_joint.mode == "graph":
            fn(tensors[0][:1], *tensors[1:])  # makes the graph of one draw, not while recording
        return capture_graph(fn, tensors)

    def _rows(self, name: str, one: PureFunction, z: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """A function of one draw and of what draws share, at each of many."""
        if self._log_joint.mode == "graph":  # enumeration cannot be vmapped, its graph can
            key = (name, tuple(x.shape for x in shared))
            if key not in self._graphs:
                self._graphs[key] = capture_graph(one, (z[0].detach(), *shared))
            one = self._graphs[key]
        if self._log_joint.mode != "eager":
            return torch.func.vmap(lambda row: tuple(one(row, *shared)))(z)
        found = [one(row, *shared) for row in z]
        return tuple(map(torch.stack, zip(*found, strict=True)))

    def _each(self, one: Callable[..., Any], *rows: Tensor) -> Any:
        """A function of one draw at each of many."""
        if self._log_joint.mode == "vmap":
            return torch.func.vmap(one)(*rows)
        return torch.stack([one(*row) for row in zip(*rows, strict=True)])

    def _inputs(self) -> Inputs:
        return self._program.inputs(self._log_joint.model_args, self._log_joint.model_kwargs)


def _one_hot(node: Any, value: Tensor, dtype: torch.dtype) -> Packed:
    """Probabilities under which a site has the one value."""
    hit = node["value"] == value
    hit = hit.all(-1) if node["fn"].event_shape else hit
    return _pyro.pack_like(hit.to(dtype), node)
