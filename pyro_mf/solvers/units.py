r"""What a parameter is measured in: the change of it that matters.

A step of :math:`\delta` in a guide's parameters changes the guide by
:math:`\tfrac12 \delta^\top F \delta` nats, with Fisher's information :math:`F`. The unit of a
parameter is :math:`F_{jj}^{-1/2}`: for a location the standard deviation, for a log scale
:math:`1/\sqrt 2`, in any parametrisation and for any guide that has a density.

A parameter that no density of the guide depends on (one of the model's, or a point estimate) is
measured by the loss instead: its unit is :math:`(\partial^2 \mathrm{loss})^{-1/2}`, the standard
error of a maximum-likelihood estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from pyro_mf import _pyro
from pyro_mf.families import Family
from pyro_mf.guides.protocol import FactorisedGuide, is_factorised
from pyro_mf.solvers import random_state
from pyro_mf.solvers.leaves import Leaves
from pyro_mf.solvers.noisy_loss import FAILURES, NoisyLoss

_MAX_NUMBERS = 2**20  # that scores of a factorised guide are kept in
_MAX_DRAWS = 256
_NUM_PROBES = 8
_FIRST_UNIT = 0.1  # relative to a parameter of at least 1, until something is known
_DIFFERENCE = 0.1  # step of a difference, in units


def guide_information(
    guide: Any, leaves: Leaves, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_draws: int
) -> Tensor:
    """Diagonal of the guide's Fisher information, estimated by squared scores.

    Args:
        guide: Any Pyro guide.
        leaves: The parameters, guide's and model's.
        args: The guide's positional arguments.
        kwargs: The guide's keyword arguments.
        num_draws: Draws where each costs a run of the guide; factorised guides get many.

    Returns:
        Shape ``(P,)``; zero for what the guide's density does not depend on.
    """
    if is_factorised(guide):
        return leaves.flatten(_factorised_information(guide))
    total = torch.zeros_like(leaves.flatten())
    for _ in range(num_draws):
        total += _squared_score(guide, leaves, args, kwargs)
    return total / num_draws


def _factorised_information(guide: FactorisedGuide) -> dict[int, Tensor | None]:
    stored, family = guide.flat_leaves(), guide.family
    size, like = guide.layout.size, stored[0]
    numbers = max(1, size, *(leaf.numel() for leaf in stored))
    num_draws = max(8, min(_MAX_DRAWS, _MAX_NUMBERS // numbers))
    with torch.no_grad():
        noise = family.noise((num_draws, size), dtype=like.dtype, device=like.device)
        draws = family.transform(guide.flat_params(), noise)
    found = score_information(family, guide.param_constraints, stored, draws)
    return {id(leaf): x for leaf, x in zip(stored, found, strict=True)}


def score_information(
    family: Family,
    param_constraints: Sequence[Constraint],
    stored: Sequence[Tensor],
    draws: Tensor,
) -> list[Tensor]:
    """Diagonal of a family's Fisher information, by squared scores at draws of its own.

    All draws of all factors in one backward pass, since no parameter is shared by factors.

    Args:
        family: The family, over a flat vector.
        param_constraints: Constraints under which its parameters are stored.
        stored: The stored parameters.
        draws: Draws of the factors, shape ``(N, D)``.

    Returns:
        A tensor like each of the stored ones.
    """
    copies = tuple(x.detach().expand(len(draws), *x.shape).requires_grad_() for x in stored)
    with torch.enable_grad():
        params = tuple(transform_to(c)(x) for c, x in zip(param_constraints, copies, strict=True))
        log_q = family.log_prob(params, draws).sum()
        scores = torch.autograd.grad(log_q, copies, allow_unused=True, materialize_grads=True)
    return [s.square().mean(0) for s in scores]


def _squared_score(
    guide: Any, leaves: Leaves, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    with torch.no_grad():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    with torch.enable_grad():
        trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        log_q = torch.zeros(())
        for node in trace.nodes.values():
            if node["type"] == "sample" and not _pyro.is_subsample(node):
                # An element of a minibatch stands for N / n others. Of a sum of their squared
                # scores the estimate is unbiased if scores are scaled by the root of that.
                log_prob = node["fn"].log_prob(node["value"])
                scale = torch.as_tensor(node["scale"]).sqrt()
                log_q = log_q + _pyro.scaled_and_masked(log_prob, {**node, "scale": scale}).sum()
        if not log_q.requires_grad:
            return torch.zeros_like(leaves.flatten())
        scores = torch.autograd.grad(log_q, leaves.tensors, allow_unused=True)
    known = zip(leaves.tensors, scores, strict=True)
    return leaves.flatten({id(leaf): None if s is None else s.square() for leaf, s in known})


class Units:
    """The units of all parameters of a run, measured again as the parameters change; mutable.

    Args:
        loss: The loss.
        leaves: Its parameters.

    Attributes:
        values: Shape ``(P,)``, positive.
        num_gradients: Gradients that measuring has cost.
    """

    def __init__(self, loss: NoisyLoss, leaves: Leaves) -> None:
        self._loss, self._leaves = loss, leaves
        x = leaves.flatten()
        self._information, self._curvature = torch.zeros_like(x), torch.zeros_like(x)
        self.values = _FIRST_UNIT * x.abs().clamp(min=1.0)
        self.num_gradients = 0

    def measure(self, x: Tensor, *, num_draws: int, weight: float, curvature: bool) -> None:
        """Measure at the present parameters.

        Args:
            x: The parameters, as they are in the leaves, shape ``(P,)``.
            num_draws: Draws of the guide, where each costs a run.
            weight: Share of this measurement against earlier ones.
            curvature: Whether to look at the loss too, which costs gradients.
        """
        try:
            new = guide_information(
                self._loss.guide, self._leaves, self._loss.args, self._loss.kwargs, num_draws
            )
        except FAILURES:  # the guide cannot run here; so the next step will say
            return
        self._information = _mixed(self._information, new, weight)
        information = self._filled(self._information)
        is_density = information > 0
        if curvature and not bool(is_density.all()):
            self._measure_curvature(x, ~is_density, weight)
        limit = x.abs().clamp(min=1.0)
        by_loss = torch.where(self._curvature > 0, self._curvature.rsqrt(), self.values)
        self.values = torch.where(is_density, information.rsqrt(), by_loss.minimum(limit))

    def _filled(self, information: Tensor) -> Tensor:
        """Elements of a leaf that no draw has touched yet count as the others of the leaf."""
        parts = []
        for part in self._leaves.split(information):
            known = part[part > 0]
            parts.append(torch.where(part > 0, part, known.median() if known.numel() else part))
        return torch.cat([part.reshape(-1) for part in parts])

    def _measure_curvature(self, x: Tensor, which: Tensor, weight: float) -> None:
        """Diagonal of the loss's Hessian for some parameters, by differences along random signs."""
        step = _DIFFERENCE * self.values
        total, count = torch.zeros_like(x), 0
        for _ in range(_NUM_PROBES):
            signs = torch.where(which, torch.randint_like(x, 2) * 2.0 - 1.0, 0.0)
            seed = int(torch.randint(2**31, ()))
            above = self._gradient(x + step * signs, seed)
            below = self._gradient(x - step * signs, seed)
            if above is not None and below is not None:
                total += signs * (above - below) / (2.0 * step)
                count += 1
        self._leaves.write(x)
        if count:
            self._curvature = _mixed(self._curvature, total / count, weight)

    def _gradient(self, x: Tensor, seed: int) -> Tensor | None:
        """The gradient at a point, with the same draws at each call with the same seed."""
        self._leaves.write(x)
        self.num_gradients += 1
        with random_state.forked(seed):
            estimate = self._loss.gradient(self._leaves)
        return None if estimate is None else estimate[1]

    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which :meth:`restore` goes on."""
        return {
            "information": self._information,
            "curvature": self._curvature,
            "values": self.values,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` described."""
        self._information, self._curvature = state["information"], state["curvature"]
        self.values = state["values"]


def _mixed(old: Tensor, new: Tensor, weight: float) -> Tensor:
    return torch.where(old == 0, new, torch.where(new == 0, old, old.lerp(new, weight)))
