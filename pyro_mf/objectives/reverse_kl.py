"""``ReverseKL``: the negative ELBO as an objective of stock ``SVI``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf.density.capture import Backend, check_backend
from pyro_mf.density.recorder import map_tensors
from pyro_mf.guides.protocol import is_factorised
from pyro_mf.guides.prototype import call_key
from pyro_mf.objectives.captured import CapturedELBO, Estimate
from pyro_mf.objectives.discrete import Plan, make_plan, score_surrogate
from pyro_mf.objectives.entropy import EntropyEstimator, get_entropy
from pyro_mf.objectives.general import traced_draw, traced_elbo
from pyro_mf.objectives.gradients import (
    WithGradients,
    add_gradients,
    backward_if_finite,
    outside_inference_mode,
)

Fn = Callable[..., Any]

# Graphs are kept for this many pairs of model and guide; an older pair is captured again.
_MAX_PAIRS = 8


class ReverseKL(ELBO):
    r"""Reverse (exclusive) divergence KL(q || p), through the evidence lower bound.

    Minimises :math:`-\mathrm{ELBO} = \mathbb{E}_q[\log q(z) - \log p(x, z)]` in nats, which is the
    divergence minus the log evidence, a constant. The estimate is unbiased at any number of
    particles, for subsampled plates too.

    There are two roads with one meaning. With a factorised guide such as
    :class:`~pyro_mf.AutoMeanField` the loss and its gradient are captured once as a graph, batched
    over particles. With any other guide, or inside other effect handlers, Pyro runs model and guide
    as usual. Discrete latents that the guide leaves out are summed out on both.

    Discrete sites that have factors in the guide are summed over exactly, each term of the log
    joint against the factors that it depends on. Where the model cannot be run with all values at
    once, or there are too many, they are drawn: a :class:`~pyro_mf.ScoreGradientWarning` says so.

    Args:
        num_particles: Draws S per step, at least 1.
        entropy: How the entropy term is estimated: ``"closed_form"``, ``"stl"`` (sticking the
            landing) or ``"monte_carlo"``.
        backend: ``"auto"``, ``"graph"``, ``"compile"`` or ``"eager"`` for the captured road.
        vectorize_particles: Accepted for code that was written for Pyro's objectives; the captured
            road is always vectorised, the general one never.
        max_plate_nesting: As in :class:`pyro.infer.ELBO`; needed only on the general road with
            discrete latents and dynamic structure.

    Raises:
        TypeError: If ``num_particles`` is no integer.
        ValueError: If an argument is out of range or unknown.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> guide, optim = AutoMeanField(model), pyro.optim.Adam({"lr": 0.05})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=ReverseKL(num_particles=8))
        >>> losses = [svi.step(torch.tensor([1.0, 2.0])) for _ in range(200)]
        >>> abs(guide.median()["loc"].item() - 1.0) < 0.2
        True

    References:
        Kucukelbir et al. (2017), Automatic Differentiation Variational Inference,
        https://arxiv.org/abs/1603.00788
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        entropy: str | EntropyEstimator = "closed_form",
        backend: Backend = "auto",
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be an integer; got {num_particles!r}.")
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1; got {num_particles}.")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles, max_plate_nesting=max_plate_nesting
        )
        self.entropy = get_entropy(entropy)
        self.backend = check_backend(backend)
        self._captured: list[CapturedELBO] = []
        self._plans: list[tuple[Fn, Any, Any, Plan]] = []

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the negative ELBO in nats, without gradients."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the negative ELBO in nats and add its gradients to the parameters'.

        Raises:
            NonFiniteError: If loss or gradient is not finite. No gradient is stored then, so the
                parameters keep their values.
        """
        estimate = self._captured_estimate(model, guide, args, kwargs)
        if estimate is not None:
            loss, tensors, gradients = estimate
            add_gradients(tensors, gradients)
            return float(loss)
        total = self._general_loss(model, guide, args, kwargs)
        if total.requires_grad:
            backward_if_finite(total)
        return float(total.detach())

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the negative ELBO in nats as a tensor that can be differentiated once."""
        estimate = self._captured_estimate(model, guide, args, kwargs)
        if estimate is not None:
            loss, tensors, gradients = estimate
            return WithGradients.apply(loss, gradients, *tensors)  # type: ignore[no-any-return,no-untyped-call]
        return self._general_loss(model, guide, args, kwargs)

    def _general_loss(self, model: Fn, guide: Any, args: Any, kwargs: Any) -> Tensor:
        if getattr(guide, "has_discrete_factors", False):
            return self._discrete_loss(model, guide, args, kwargs)
        is_mixture = hasattr(type(guide), "strata")
        strata = guide.strata(*args, **kwargs) if is_mixture else [(1.0, guide)]
        elbos = [
            weight * traced_elbo(model, part, args, kwargs, self.entropy, self.max_plate_nesting)
            for _ in range(self.num_particles)
            for weight, part in strata
        ]
        loss: Tensor = -torch.stack(elbos).sum() / self.num_particles
        return loss

    def _discrete_loss(self, model: Fn, guide: Any, args: Any, kwargs: Any) -> Tensor:
        """The loss where discrete sites have factors: exact in these, or with score gradients."""
        guide.setup(*args, **kwargs)
        plan = self._plan(model, guide, args, kwargs)
        # A baseline of the other draws needs another draw.
        count = max(2, self.num_particles) if plan.drawn else self.num_particles
        draws = [traced_draw(model, guide, args, kwargs, self.entropy, plan) for _ in range(count)]
        elbo = torch.stack([draw.elbo for draw in draws]).mean()
        if plan.drawn:
            elbo = elbo + score_surrogate(
                [draw.log_joint for draw in draws], [draw.log_score for draw in draws]
            )
        return -elbo

    def _plan(self, model: Fn, guide: Any, args: Any, kwargs: Any) -> Plan:
        key = call_key(args, kwargs)
        for other, of, known, plan in self._plans:
            if other is model and of is guide and known == key:
                return plan
        plan = make_plan(model, guide, args, kwargs, self.max_plate_nesting)
        self._plans = [*self._plans[-_MAX_PAIRS:], (model, guide, key, plan)]
        return plan

    def _get_trace(self, model: Fn, guide: Fn, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            "ReverseKL does not hand out traces; use loss, loss_and_grads or differentiable_loss."
        )

    def _captured_estimate(self, model: Fn, guide: Any, args: Any, kwargs: Any) -> Estimate | None:
        """The captured road's estimate, where that means the same as running model and guide."""
        if (
            not is_factorised(guide)
            or getattr(guide, "create_plates", None) is not None
            or _pyro.handlers_around()
        ):
            return None
        captured = self._captured_elbo(model, guide)
        # Graphs are captured with gradients, which tensors made in inference mode refuse.
        with torch.inference_mode(mode=False):
            args, kwargs = map_tensors((args, kwargs), outside_inference_mode)
            return captured.value_and_gradients(self.num_particles, args, kwargs)

    def _captured_elbo(self, model: Fn, guide: Any) -> CapturedELBO:
        for captured in self._captured:
            if captured.model is model and captured.guide is guide:
                return captured
        captured = CapturedELBO(model, guide, self.entropy, self.backend)
        self._captured = [*self._captured[-_MAX_PAIRS:], captured]
        return captured

    def __getstate__(self) -> dict[str, Any]:
        # Graphs and plans are cheap to make again and cannot travel.
        return self.__dict__ | {"_captured": [], "_plans": []}
