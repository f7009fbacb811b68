"""``LogJoint``: a Pyro model with its data as a density on one flat unconstrained vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density.capture import Backend, PureFunction
from pyro_mf.density.evaluation import Evaluation, collect, evaluate
from pyro_mf.density.footprint import Footprint, measure
from pyro_mf.density.model_function import Inputs
from pyro_mf.density.program import Batch, Mode, Program, value_and_gradients
from pyro_mf.density.sites import Layout


class LogJoint:
    """The log joint density of a Pyro model, captured once and batched over draws.

    Continuous latents are mapped to the unconstrained space and packed into one flat vector;
    discrete latents with a finite support are summed out. Learnable parameters of the model are
    read anew at every call; what else it reads besides its arguments is read once.

    Args:
        model: A Pyro model.
        model_args: Its positional arguments (data).
        model_kwargs: Its keyword arguments.
        backend: ``"auto"`` (a graph, compiled when that pays), ``"graph"``, ``"compile"`` or
            ``"eager"``.

    Raises:
        TypeError: If ``model_args`` is no tuple.
        ModelError: If the model has no latent sites, data or arguments are bad, a latent cannot be
            mapped to an unconstrained space, or a plate is subsampled.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> log_joint = LogJoint(model, (torch.tensor([1.0, 2.0]),))
        >>> log_joint(torch.zeros(3, 1)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        model_args: tuple[Any, ...] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        if not isinstance(model_args, tuple | list):
            raise TypeError(
                "model_args must be a tuple of the model's positional arguments; got "
                f"{type(model_args).__name__}. For a single argument x write (x,)."
            )
        self.model = model
        self.model_args = tuple(model_args)
        self.model_kwargs = dict(model_kwargs or {})
        self._backend = backend
        self._prepare()

    def _prepare(self) -> None:
        self.program = Program(
            self.model, self.model_args, self.model_kwargs, backend=self._backend
        )
        if self.program.prototype.subsampled:
            name = self.program.prototype.subsampled[0]
            raise ModelError(
                f"the model subsamples plate '{name}', so its log density is that of a minibatch. "
                "Expected the full data: call the model with the whole plate."
            )
        self._fixed_inputs: tuple[Tensor, ...] | None = None
        if not self.program.prototype.params:
            self._fixed_inputs = self._inputs().flat()
        # Gradients by learnable parameters are sums over draws.
        is_per_draw = not self.program.prototype.params
        self._value, self._value_and_grad = (
            self.program.graph_function(build, is_per_draw=is_per_draw)
            for build in (self._build_value, self._build_value_and_grad)
        )

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector."""
        return self.program.prototype.layout

    @property
    def size(self) -> int:
        """Length D of the flat unconstrained vector."""
        return self.layout.size

    @property
    def mode(self) -> Mode:
        """How draws are vectorised: ``"vmap"``, ``"graph"``, ``"loop"``, or not: ``"eager"``."""
        if not self.program.is_checked:
            self.value_and_grad(torch.zeros(1, self.size, dtype=self.dtype, device=self.device))
        return self.program.mode

    @property
    def capture_seconds(self) -> float:
        """Seconds spent on capturing graphs so far."""
        return self._value.capture_seconds + self._value_and_grad.capture_seconds

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint at ``z``, Jacobian of the transforms included.

        Args:
            z: Unconstrained vectors, shape ``(..., D)``.

        Returns:
            Log density in nats, shape ``(...)``; differentiable once with respect to ``z``.
        """
        flat = self._check(z)
        return _Differentiable.apply(flat, self).reshape(z.shape[:-1])  # type: ignore[no-any-return,no-untyped-call]

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log joint and its gradient at each row.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.

        Returns:
            Values, shape ``(S,)``, and gradients, shape ``(S, D)``, both detached.
        """
        value, gradient, *_ = self._value_and_grad(self._check(z).detach(), *self._flat_inputs())
        return value, gradient

    def plan(self, num_gradients: int) -> None:
        """Say how many calls of :meth:`value_and_grad` are to come.

        With ``backend="auto"`` the graph is compiled at once where so many calls pay for it,
        instead of after some time has been spent.

        Args:
            num_gradients: Number of calls, about; 0 where that is not known.
        """
        self._value_and_grad.planned_calls = num_gradients

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Map ``z`` of shape ``(..., D)`` to the latents' own space."""
        return self.layout.constrain(z)

    def evaluate(self, z: Tensor) -> Evaluation:
        """Run the model at each row of ``(S, D)`` and collect everything it computes."""
        _ = self.mode  # how to vectorise is known from the first capture on
        return evaluate(self.program, self._check(z).detach(), self._inputs())

    def collect(self, z: Tensor, read: Callable[[Any], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run the model at each row of ``(S, D)`` and read tensors off its trace.

        Args:
            z: Unconstrained vectors, shape ``(S, D)``.
            read: From a trace with latents in their own space to tensors by name.

        Returns:
            The tensors of all rows, ``(S, ...)``.
        """
        _ = self.mode
        return collect(self.program, self._check(z).detach(), self._inputs(), read)

    def trace_at(self, z: Tensor) -> Any:
        """The model's trace at one unconstrained vector ``(D,)``."""
        with torch.no_grad():
            return self.program.function.trace(self._check(z)[0], self._inputs())[0]

    def initial_points(self, num: int, *, seed: int | None = None, radius: float = 2.0) -> Tensor:
        """Points with a finite log joint and gradient, uniform in a box as in Stan.

        Args:
            num: Number of points.
            seed: Seed of the draw; ``None`` uses torch's global generator.
            radius: Half the side of the box; halved when no point is finite.

        Returns:
            Unconstrained vectors, shape ``(num, D)``.

        Raises:
            ModelError: If no finite point was found.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        failures = 0
        while failures < 100:
            width = radius * 0.5 ** (failures // 10)
            unit = torch.rand(1, self.size, generator=generator, dtype=self.dtype)
            point = (width * (2 * unit - 1)).to(self.device)
            if self._is_finite_at(point):
                found.append(point)
            else:
                failures += 1
            if len(found) == num:
                return torch.cat(found)
        raise ModelError(
            f"only {len(found)} of {num} starting points with a finite log density and gradient "
            "were found before 100 failed. Check priors and data for impossible combinations."
        )

    def _is_finite_at(self, point: Tensor) -> bool:
        try:
            value, gradient = self.value_and_grad(point)
        except (RuntimeError, ValueError):  # a Cholesky that fails, an argument out of range
            return False
        return bool(torch.isfinite(value).all() and torch.isfinite(gradient).all())

    @cached_property
    def footprint(self) -> Footprint:
        """What one evaluation at one draw allocates, its gradient apart."""
        z = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        inputs = self._inputs()
        try:
            with torch.no_grad():
                return measure(lambda: self.program.function.log_joint(z, inputs))
        except (RuntimeError, ValueError):  # no density there; what was made before is not known
            return Footprint(sum(x.nbytes for x in inputs.flat()), 1)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the flat vector."""
        return self.program.prototype.dtype

    @property
    def device(self) -> torch.device:
        """Device of the flat vector."""
        return self.program.prototype.device

    def _inputs(self) -> Inputs:
        if not self.program.has_current_params():  # the parameter store was loaded or cleared
            self._prepare()
        return self.program.inputs(self.model_args, self.model_kwargs)

    def _flat_inputs(self) -> tuple[Tensor, ...]:
        return self._inputs().flat() if self._fixed_inputs is None else self._fixed_inputs

    def _check(self, z: Tensor) -> Tensor:
        if z.dim() == 0 or z.shape[-1] != self.size:
            raise ValueError(
                f"expected unconstrained vectors of shape (..., {self.size}), one entry per "
                f"element of {[s.name for s in self.layout.sites]}; got shape {tuple(z.shape)}."
            )
        return z.reshape(z.shape[:-1].numel(), self.size)

    def _build_value(self, batch: Batch) -> PureFunction:
        return lambda z, *flat: (batch(z, self.program.unflatten(flat)),)

    def _build_value_and_grad(self, batch: Batch) -> PureFunction:
        return lambda z, *flat: value_and_gradients(batch, z, self.program.unflatten(flat))


class _Differentiable(torch.autograd.Function):
    """The captured log joint with its captured gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_joint: LogJoint) -> Tensor:
        if ctx.needs_input_grad[0]:
            value, gradient = log_joint.value_and_grad(z)
            ctx.save_for_backward(gradient)
            return value
        return log_joint._value(z, *log_joint._flat_inputs())[0]

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return outputs[0].unsqueeze(-1) * gradient, None
