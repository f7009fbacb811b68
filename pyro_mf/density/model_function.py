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
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.checks import invalid_data
from pyro_mf.density.prototype import Prototype
from pyro_mf.density.supports import support_of
from pyro_mf.density.tracing import TracingMode, without_validation


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


class ModelFunction:
    """``log p(x, z)`` of one flat unconstrained vector, Jacobian included.

    Args:
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        prototype: What one execution of it showed.
        is_frozen: Take the tensors of these very arguments as constants, whatever is handed in, for
            models whose control flow depends on their values.
        checks_data: Be NaN where observed data are outside their support, for data that change
            from call to call.

    Attributes:
        last_site: The sample statement that the model reached last; tells where it failed.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        prototype: Prototype,
        *,
        is_frozen: bool = False,
        checks_data: bool = False,
    ) -> None:
        self.model = model
        self.prototype = prototype
        self.is_frozen = is_frozen
        self.checks_data = checks_data
        self.last_site: str | None = None
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
        tensors = tuple(x for x in leaves if isinstance(x, Tensor))
        return Inputs(tensors, tuple(p.detach() for p in self.prototype.params.values()), indices)

    def draw_indices(self) -> tuple[Tensor, ...]:
        """Draw the indices of every plate that the model subsamples at random."""
        return tuple(
            torch.randperm(p.full_size)[: p.size] for p in self.prototype.subsamples.values()
        )

    def typical_indices(self) -> tuple[Tensor, ...]:
        """Indices like those of :meth:`draw_indices`, without a draw."""
        return tuple(torch.arange(p.size) for p in self.prototype.subsamples.values())

    def trace(self, z: Tensor, inputs: Inputs) -> tuple[Any, Tensor]:
        """Run the model at one flat vector ``(D,)``.

        Returns:
            Its trace with every ``log_prob`` computed, and the log Jacobian, a scalar.
        """
        log_det: list[Tensor] = []
        self.last_site = None
        data = () if self.is_frozen else inputs.tensors
        with (
            TracingMode(self.prototype.params, inputs.params, (z, *data, *inputs.indices)),
            poutine.block(),
            pyro.validation_enabled(False),
        ):
            args, kwargs = self._arguments(inputs)
            with _pyro.substitute(self._hook(z, inputs, log_det)):
                trace = poutine.trace(self._runnable).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            return trace, sum(log_det, z.new_zeros(()))

    def log_joint(self, z: Tensor, inputs: Inputs) -> Tensor:
        """``log p(x, z)`` on the unconstrained space at one flat vector ``(D,)``: a scalar."""
        trace, log_det = self.trace(z, inputs)
        if self.checks_data:
            for name in self.prototype.observed:
                outside = invalid_data(trace.nodes[name])
                if outside is not None:  # NaN, since a graph cannot raise
                    log_det = log_det + torch.where(outside.any(), torch.nan, 0.0)
        if self.prototype.discrete:
            nesting = self.prototype.max_plate_nesting
            return log_det + _pyro.enumerated_log_prob(trace, nesting)
        terms = [n["log_prob_sum"] for n in trace.nodes.values() if n["type"] == "sample"]
        return sum(terms, log_det)

    def eager_batch(self, z: Tensor, inputs: Inputs) -> Tensor:
        """:meth:`log_joint` at each row of ``(S, D)``, one after another."""
        return torch.stack([self.log_joint(row, inputs) for row in z])

    def _hook(self, z: Tensor, inputs: Inputs, log_det: list[Tensor]) -> Callable[[Any], None]:
        """What happens at each sample statement: latents are looked up, not drawn."""
        unconstrained = self.prototype.layout.unpack(z)
        indices = dict(zip(self.prototype.subsamples, inputs.indices, strict=True))

        def at_sample(msg: Any) -> None:
            name = msg["name"]
            if _pyro.is_subsample(msg):
                if name in indices:
                    msg["value"], msg["done"] = indices[name], True
                return
            self.last_site = name
            msg["fn"] = without_validation(msg["fn"])
            if msg["is_observed"] or name in self.prototype.discrete:
                return
            if name not in self._sites:
                raise ModelError(
                    f"the model visits latent site '{name}', which its first execution did not: "
                    "its structure depends on random values. Static structure is needed."
                )
            # The support may depend on the data, so it is read here and not from the prototype.
            transform = biject_to(support_of(msg["fn"]))
            value = transform(unconstrained[name])
            jacobian = transform.log_abs_det_jacobian(unconstrained[name], value).sum()
            log_det.append(jacobian * self._sites[name].plate_scale)
            msg["value"], msg["done"] = value, True

        return at_sample

    def _arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.is_frozen:
            return tree_unflatten(self._leaves, self._tree)  # type: ignore[no-any-return]
        tensors = iter(inputs.tensors)
        leaves = [next(tensors) if isinstance(x, Tensor) else x for x in self._leaves]
        return tree_unflatten(leaves, self._tree)  # type: ignore[no-any-return]
