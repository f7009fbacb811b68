"""``ForwardKL``: the cross-entropy of posterior and guide as an objective of stock ``SVI``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_mf.density.capture import Backend, check_backend
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.objectives.forward_pair import Pair
from pyro_mf.objectives.gradients import backward_if_finite

Fn = Callable[..., Any]

NAMES = ("hmc", "imh", "msc", "snis", "smc", "prior")

# Chains are kept for this many combinations of model, guide and data.
_MAX_PAIRS = 8


class ForwardKL(ELBO):
    r"""Forward (inclusive) divergence KL(p || q), through the cross-entropy.

    Minimises :math:`-\mathbb{E}_{p(z \mid x)}[\log q(z)]` in nats on the unconstrained space, which
    is the divergence plus the entropy of the posterior there, a constant.

    Args:
        num_particles: Draws N per step, chains where there are chains; at least 2.
        estimator: Where the draws come from: ``"hmc"``, ``"imh"``, ``"msc"``, ``"snis"``,
            ``"smc"`` or ``"prior"``; ``None`` chooses by model.
        defensive: For ``"imh"``, ``"msc"`` and ``"snis"``, the share of proposals that come from
            Student-t factors three times as wide as q, from 0 to below 1.
        backend: ``"auto"``, ``"graph"``, ``"compile"`` or ``"eager"`` for the log joint.
        vectorize_particles: Accepted for code that was written for Pyro's objectives.
        max_plate_nesting: As in :class:`pyro.infer.ELBO`.

    Raises:
        TypeError: If ``num_particles`` is no integer.
        ValueError: If an argument is out of range or unknown.
    """

    def __init__(
        self,
        num_particles: int = 32,
        *,
        estimator: str | None = None,
        defensive: float = 0.0,
        backend: Backend = "auto",
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be an integer; got {num_particles!r}.")
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2; got {num_particles}.")
        if not 0.0 <= defensive < 1.0:
            raise ValueError(f"defensive must be a share from 0 to below 1; got {defensive!r}.")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles, max_plate_nesting=max_plate_nesting
        )
        self.estimator = _check_name(estimator)
        self.defensive = defensive
        self.backend = check_backend(backend)
        self._pairs: list[Pair] = []
        self._generator: torch.Generator | None = None

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the cross-entropy in nats, without gradients; chains stay where they are."""
        with torch.no_grad():
            return float(self._pair(model, guide, args, kwargs).loss(is_step=False))

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the cross-entropy in nats and add its gradients to the parameters'.

        Raises:
            NonFiniteError: If loss or gradient is not finite. No gradient is stored then, so the
                parameters keep their values.
        """
        total = self.differentiable_loss(model, guide, *args, **kwargs)
        if total.requires_grad:
            backward_if_finite(total)
        return float(total.detach())

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the cross-entropy in nats as a tensor that can be differentiated once."""
        return self._pair(model, guide, args, kwargs).loss(is_step=True)

    def _pair(self, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pair:
        for pair in self._pairs:
            if pair.matches(model, guide, args, kwargs):
                return pair
        # Graphs are captured with gradients, which tensors made in inference mode refuse.
        with torch.inference_mode(mode=False):
            log_joint = LogJoint(model, args, kwargs, backend=self.backend)
            pair = Pair(
                model,
                guide,
                args,
                kwargs,
                log_joint,
                name=self.estimator or "imh",
                reason="asked for",
                num_particles=self.num_particles,
                defensive=self.defensive,
                generator=self._own_generator(),
            )
        self._pairs = [*self._pairs[-_MAX_PAIRS:], pair]
        return pair

    def _own_generator(self) -> torch.Generator:
        """Randomness of its own, seeded once by torch's global generator."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        return self._generator

    def _get_trace(self, model: Fn, guide: Fn, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            "ForwardKL does not hand out traces; use loss, loss_and_grads or differentiable_loss."
        )


def _check_name(estimator: str | None) -> str | None:
    if estimator is None or estimator in NAMES:
        return estimator
    near = difflib.get_close_matches(str(estimator), NAMES, n=1, cutoff=0.3)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"estimator must be None or one of {', '.join(NAMES)}; got {estimator!r}.{hint}"
    )
