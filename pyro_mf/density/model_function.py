"""The model as a pure function: every input handed in, one number out.

:class:`ModelFunction` is eager and runs one draw at a time. It is the meaning that every captured
graph is held to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.prototype import Prototype


class Inputs(NamedTuple):
    """Everything a model's log density depends on besides the latents.

    Args:
        tensors: Tensors in the model's arguments.
        params: Values for the unconstrained leaves of the model's learnable parameters.
        indices: Indices of the plates that the model subsamples at random.
    """

    tensors: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]

    def flat(self) -> tuple[Tensor, ...]:
        """All tensors in a row, as a graph takes them."""
        return (*self.tensors, *self.params, *self.indices)

    def unflatten(self, flat: tuple[Tensor, ...]) -> Inputs:
        """Inputs of the same structure from a row of tensors."""
        first = len(self.tensors)
        second = first + len(self.params)
        return Inputs(flat[:first], flat[first:second], flat[second:])


class ModelFunction:
    """``log p(x, z)`` of one flat unconstrained vector, Jacobian included.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        prototype: What one execution of it showed.
        frozen: Take the arguments' tensors as constants instead of inputs, for models whose control
            flow depends on their values.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        prototype: Prototype,
        *,
        frozen: bool = False,
    ) -> None:
        self.model = model
        self.prototype = prototype
        self.frozen = frozen
        self._leaves, self._tree = tree_flatten((tuple(args), dict(kwargs)))
        self._sites = {site.name: site for site in prototype.layout.sites}
        self._runnable = model
        if prototype.discrete:
            self._runnable = _pyro.enumerated(model, prototype.max_plate_nesting)

    def inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], indices: tuple[Tensor, ...] = ()
    ) -> Inputs:
        """Collect the inputs for these arguments; their structure is that of the prototype's."""
        leaves, _ = tree_flatten((tuple(args), dict(kwargs)))
        tensors = () if self.frozen else tuple(x for x in leaves if isinstance(x, Tensor))
        return Inputs(tensors, tuple(p.detach() for p in self.prototype.params.values()), indices)

    def draw_indices(self) -> tuple[Tensor, ...]:
        """Draw the indices of every plate that the model subsamples at random."""
        return tuple(
            torch.randperm(p.full_size)[: p.size] for p in self.prototype.subsamples.values()
        )

    def trace(self, z: Tensor, inputs: Inputs) -> tuple[Any, Tensor]:
        """Run the model at one flat vector ``(D,)``; returns its trace and the log Jacobian."""
        unconstrained = self.prototype.layout.unpack(z)
        indices = dict(zip(self.prototype.subsamples, inputs.indices, strict=True))
        log_det: list[Tensor] = []

        def put_values(msg: Any) -> None:
            name = msg["name"]
            if _pyro.is_subsample(msg):
                if name in indices:
                    msg["value"], msg["done"] = indices[name], True
                return
            if msg["is_observed"] or name in self.prototype.discrete:
                return
            if name not in self._sites:
                raise ModelError(
                    f"the model visits latent site '{name}', which its first execution did not: "
                    "its structure depends on random values. Static structure is needed."
                )
            # The support may depend on the data, so it is read here and not from the prototype.
            transform = biject_to(msg["fn"].support)
            value = transform(unconstrained[name])
            log_det.append(transform.log_abs_det_jacobian(unconstrained[name], value).sum())
            msg["value"], msg["done"] = value, True

        args, kwargs = self._arguments(inputs)
        with (
            _replace_leaves(self.prototype.params, inputs.params),
            poutine.block(),
            _pyro.substitute(put_values),
        ):
            trace = poutine.trace(self._runnable).get_trace(*args, **kwargs)
        total = sum(log_det[1:], log_det[0]) if log_det else z.new_zeros(())
        return trace, total

    def log_joint(self, z: Tensor, inputs: Inputs) -> Tensor:
        """``log p(x, z)`` on the unconstrained space at one flat vector ``(D,)``: a scalar."""
        with _replace_leaves(self.prototype.params, inputs.params):
            trace, log_det = self.trace(z, inputs)
            if self.prototype.discrete:
                nesting = self.prototype.max_plate_nesting
                return log_det + _pyro.enumerated_log_prob(trace, nesting)
            return log_det + trace.log_prob_sum()

    def eager_batch(self, z: Tensor, inputs: Inputs) -> Tensor:
        """:meth:`log_joint` at each row of ``(S, D)``, one after another."""
        with pyro.validation_enabled(False):
            return torch.stack([self.log_joint(row, inputs) for row in z])

    def _arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.frozen:
            return tree_unflatten(self._leaves, self._tree)  # type: ignore[no-any-return]
        tensors = iter(inputs.tensors)
        leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self._leaves]
        return tree_unflatten(leaves, self._tree)  # type: ignore[no-any-return]


class _Replace(TorchFunctionMode):
    """Every torch function sees other tensors in place of some, told apart by identity."""

    def __init__(self, table: dict[int, Tensor]) -> None:
        self.table = table

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(
            Tensor, lambda t: self.table.get(id(t), t), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _replace_leaves(leaves: Mapping[str, Tensor], values: tuple[Tensor, ...]) -> _Replace:
    # By identity, because a parameter reaches the model along many ways: pyro.param, a PyroModule's
    # attribute, or an nn.Module that was registered with pyro.module and holds its own reference.
    table = {id(leaf): value for leaf, value in zip(leaves.values(), values, strict=True)}
    return _Replace(table)
