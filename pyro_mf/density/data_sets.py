"""One model at many data sets of one shape, through one capture.

The tensors among a model's arguments are inputs of its graph, so a row of a batch can have data of
its own: the log joint is vectorised over pairs of a draw and a data set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_mf.density.capture import GraphFunction, capture_graph, first_line
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.model_function import Inputs
from pyro_mf.density.program import difference, signature, value_and_gradients

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""

_CHECKED = 3  # data sets at which the graph is held against eager Pyro
_RADIUS = 0.5  # of the box in which it is


class DataSets:
    """The log joints of one model at many data sets.

    Args:
        log_joint: The log joint at one of the data sets.
        arguments: Positional and keyword arguments of the model for each data set.

    Attributes:
        obstacle: Why the data sets cannot share a batch, empty if they can.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> arguments = [((torch.tensor(x),), {}) for x in (0.0, 5.0)]
        >>> many = DataSets(LogJoint(model, *arguments[0]), arguments)
        >>> value, gradient = many.value_and_grad(torch.zeros(2, 1), torch.tensor([0, 1]))
        >>> gradient.squeeze(1).tolist()
        [0.0, 5.0]
    """

    def __init__(self, log_joint: LogJoint, arguments: Sequence[Arguments]) -> None:
        self.log_joint = log_joint
        self._arguments = list(arguments)
        first = signature(log_joint.model_args, log_joint.model_kwargs)
        self._is_alike = [signature(*one) == first for one in self._arguments]
        self.obstacle = self._describe_obstacle()
        if not self.obstacle:
            self.obstacle = self._capture()

    def __len__(self) -> int:
        return len(self._arguments)

    def shares_capture(self, index: int) -> bool:
        """Whether a data set has the shapes and constants of the first."""
        return self._is_alike[index] and not self.log_joint.program.function.is_frozen

    def at(
        self, index: int, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> LogJoint:
        """The log joint at one data set, without a capture of its own where that can be.

        Args:
            index: The data set's.
            evaluate: What takes the place of its ``value_and_grad``.
        """
        args, kwargs = self._arguments[index]
        _ = self.log_joint.mode  # how to capture, and whether data are constants
        if not self.shares_capture(index):
            return LogJoint(self.log_joint.model, args, kwargs)
        found = copy.copy(self.log_joint)
        found.model_args, found.model_kwargs = tuple(args), dict(kwargs)
        found._fixed_inputs = found._inputs().flat()
        if evaluate is not None:
            found.value_and_grad = evaluate  # type: ignore[assignment,method-assign]
            # As if a row's operations were many: blocks fill no more rows than they need.
            found.footprint = self.log_joint.footprint._replace(num_operations=1)
        return found

    def value_and_grad(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and gradient at each row, each with its own data.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.
            index: Which data set each row belongs to, shape ``(S,)``.

        Returns:
            Values, shape ``(S,)``, and gradients, shape ``(S, D)``.
        """
        value, gradient = self._graph(z, index, *self._stacked)
        return value, gradient

    def _describe_obstacle(self) -> str:
        if self.log_joint.program.prototype.params:
            return "the model has learnable parameters"
        mode = self.log_joint.mode
        if mode not in ("vmap", "graph"):
            return f"the model cannot be vectorised (it runs as '{mode}')"
        if self.log_joint.program.function.is_frozen:
            return "the model's control flow depends on its data"
        if not all(map(self.shares_capture, range(len(self)))):
            return "the data sets differ in more than the values of tensors of one shape"
        return ""

    def _capture(self) -> str:
        """Find a graph that agrees with eager Pyro; why there is none, empty if there is one."""
        columns = list(zip(*(self._tensors(k) for k in range(len(self))), strict=True))
        # Covariates are the same in all data sets: one copy serves, and vectorises better.
        self._varies = [not all(_is_same(x, column[0]) for x in column) for column in columns]
        self._stacked = tuple(
            torch.stack(column) if varies else column[0]
            for column, varies in zip(columns, self._varies, strict=True)
        )
        reasons = []
        for make in (lambda: self.log_joint.program.function.log_joint, self._graph_of_one):
            try:
                self._graph = self._graph_function(make())
                reason = self._disagreement()
            except Exception as error:
                reason = first_line(error)
            if not reason:
                return ""
            reasons.append(reason)
        return f"the model cannot be vectorised over data ({reasons[0]})"

    def _tensors(self, index: int) -> tuple[Tensor, ...]:
        return self.log_joint.program.inputs(*self._arguments[index]).tensors

    def _graph_of_one(self) -> Callable[[Tensor, Inputs], Tensor]:
        """The model at one draw as a graph, for models that vmap cannot run."""
        function = self.log_joint.program.function

        def at_row(row: Tensor, *data: Tensor) -> tuple[Tensor, ...]:
            return (function.log_joint(row, Inputs(data, (), ())),)

        graph = capture_graph(at_row, (self._zeros(1)[0], *self._tensors(0)))
        return lambda z, inputs: graph(z, *inputs.tensors)[0]

    def _graph_function(self, one: Callable[[Tensor, Inputs], Tensor]) -> GraphFunction:
        def batch(z: Tensor, inputs: Inputs) -> Tensor:
            def at_row(row: Tensor, *data: Tensor) -> Tensor:
                return one(row, Inputs(data, (), ()))

            dims = (0, *(0 if varies else None for varies in self._varies))
            return torch.func.vmap(at_row, in_dims=dims)(z, *inputs.tensors)

        def run(z: Tensor, index: Tensor, *stacked: Tensor) -> tuple[Tensor, ...]:
            pairs = zip(stacked, self._varies, strict=True)
            own = tuple(x.index_select(0, index) if varies else x for x, varies in pairs)
            return value_and_gradients(batch, z, Inputs(own, (), ()))

        return GraphFunction(
            lambda tensors: capture_graph(run, tensors), self.log_joint.program.backend
        )

    def _zeros(self, num: int) -> Tensor:
        like = self.log_joint
        return torch.zeros(num, like.size, dtype=like.dtype, device=like.device)

    def _disagreement(self) -> str:
        """How graph and eager Pyro differ at some data sets; empty where they agree."""
        spread = torch.linspace(0, len(self) - 1, min(_CHECKED, len(self)))
        index = spread.round().long().to(self.log_joint.device)
        generator = torch.Generator().manual_seed(20)
        noise = torch.rand(len(index), self.log_joint.size, generator=generator)
        z = self._zeros(len(index)) + _RADIUS * (2.0 * noise.to(self._zeros(1)) - 1.0)
        eager = self.log_joint.program.function.log_joint
        rows = zip(z, index.tolist(), strict=True)
        with torch.no_grad():
            truth = torch.stack([eager(row, Inputs(self._tensors(k), (), ())) for row, k in rows])
        reason = difference((truth,), (self.value_and_grad(z, index)[0],))
        return "" if reason is None else f"captured and eager outputs differ by {reason}"


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)
