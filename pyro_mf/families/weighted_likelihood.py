"""Maximum weighted likelihood of one-dimensional factors, for all columns of the draws at once.

This is the forward KL's optimum: given draws from the posterior, every factor is fitted to its own
column, so there are as many small problems as latents. They are solved side by side by BFGS, each
with its own step, and leave the computation as they converge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

from pyro_mf.families.protocol import Family, Params
from pyro_mf.families.weighted_draws import centre_and_width, mean_and_sd

_MAX_ROUNDS = 100
_MAX_ELEMENTS = 250_000  # draws times columns that are computed at once: bounds the memory
_ENOUGH = 1e-11  # nats that a step promises to gain; far below what draws can tell
_LONGEST = 3.0  # longest step in a stored parameter, most of which are logarithms
_SHORTEST = 1e-8  # a step cut down to so little of its length is given up
LEAST_SCALE = 1e-3  # of a fitted scale, in units of the draws' width
_SUFFICIENT = 1e-4  # share of the promised gain that a step must bring (Armijo)


def maximise(
    log_prob: Callable[[Params, Tensor], Tensor],
    param_constraints: Sequence[Constraint],
    starts: Sequence[Params],
    u: Tensor,
    log_weights: Tensor,
) -> Params:
    """Maximise the weighted log likelihood of every column.

    Columns are independent problems: each starts from the likeliest of its starts, converges by
    itself, and never ends less likely than it started. All is computed in double precision. Draws
    should be of order one in a family with locations (:func:`maximise_on_own_axis`).

    Args:
        log_prob: Log density of the family; it must treat all columns alike, and is differentiated
            once, by its parameters.
        param_constraints: Constraint of each parameter.
        starts: Constrained parameters to start from, each a tuple of tensors ``(D, *extra)``.
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.

    Returns:
        Constrained parameters, each ``(D, *extra)``, with dtype and device of ``u``.

    Example:
        >>> from torch.distributions import constraints
        >>> def log_prob(params, u):  # of exponential distributions
        ...     return params[0].log() - params[0] * u
        >>> u = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
        >>> start = (torch.ones(2),)
        >>> maximise(log_prob, [constraints.positive], [start], u, torch.zeros(2))
        (tensor([0.5000, 0.2500]),)

    References:
        Nocedal and Wright (2006), Numerical Optimization, second edition, chapter 6
    """
    stored = [
        tuple(
            transform_to(c).inv(p.detach().double())
            for c, p in zip(param_constraints, s, strict=True)
        )
        for s in starts
    ]
    weights = torch.softmax(log_weights.detach().double(), 0)[:, None]
    columns = max(1, _MAX_ELEMENTS // len(u))
    found = []
    for first in range(0, u.shape[1], columns):
        part = slice(first, first + columns)
        problem = _Problem(
            log_prob, param_constraints, stored[0], u.detach()[:, part].double(), weights
        )
        found.append(_bfgs(problem, [_flatten([p[part] for p in start]) for start in stored]))
    shaped = _unflatten(torch.cat(found), stored[0])
    return tuple(transform_to(c)(p).to(u) for c, p in zip(param_constraints, shaped, strict=True))


def maximise_on_own_axis(
    family: Family, u: Tensor, log_weights: Tensor, shapes: Sequence[tuple[float, ...]] = ()
) -> Params:
    """Maximise the weighted likelihood of a family with locations and scales.

    Columns are shifted and stretched to median zero and width one first, so what is found follows
    the draws when these are, and far outliers do no harm. It starts from the family's members
    nearest to the moments and nearest to the quantiles.

    Args:
        family: An elementwise family whose first two parameters are location and scale.
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``; a constant added changes nothing.
        shapes: Values for the parameters after location and scale, to start from as well: heavy
            tails, say, from which far outliers do not lead astray.

    Returns:
        Constrained parameters. The scale is never less than a thousandth of the draws' width:
        where one draw has most of the weight, no likelihood would bound it from below.

    Example:
        >>> from pyro_mf.families import Normal
        >>> u = torch.tensor([[1.0], [3.0]])
        >>> maximise_on_own_axis(Normal(), u, torch.zeros(2))
        (tensor([2.]), tensor([1.0000]))
    """
    u, log_weights = u.detach(), log_weights.detach()
    centre, width = centre_and_width(u, log_weights)
    x = (u.double() - centre) / width
    mean, sd = mean_and_sd(x, log_weights.double())
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    starts = [
        family.init(mean, torch.where(sd > LEAST_SCALE, sd, one)),
        family.init(zero, one),
    ]
    starts += [(zero, one, *(one * value for value in shape)) for shape in shapes]
    wide_enough = (constraints.real, constraints.greater_than(LEAST_SCALE))
    loc, scale, *shape = maximise(
        family.log_prob, (*wide_enough, *family.constraints[2:]), starts, x, log_weights
    )
    return tuple(p.to(u) for p in (centre + width * loc, width * scale, *shape))


class _Problem:
    """Negative log likelihoods of some columns by their stored parameters, side by side."""

    def __init__(
        self,
        log_prob: Callable[[Params, Tensor], Tensor],
        param_constraints: Sequence[Constraint],
        like: Params,
        u: Tensor,
        weights: Tensor,
    ) -> None:
        self.u = u
        self._log_prob, self._constraints, self._like = log_prob, param_constraints, like
        self._weights = weights

    def value_and_gradient(self, x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """In nats, ``(A,)``, and gradient ``(A, P)``, at stored parameters ``(A, P)``."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            stored = _unflatten(leaf, self._like)
            params = tuple(
                transform_to(c)(p) for c, p in zip(self._constraints, stored, strict=True)
            )
            log_prob = self._log_prob(params, self.u[:, columns])
            # A draw without weight may lie where the density is zero.
            weighted = torch.where(self._weights > 0, self._weights * log_prob, 0.0)
            value = -weighted.sum(0)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        usable = torch.isfinite(value) & torch.isfinite(gradient).all(1)
        return torch.where(usable, value.detach(), torch.inf), gradient


def _bfgs(problem: _Problem, starts: Sequence[Tensor]) -> Tensor:
    """Minimise from the best of the starts, each ``(D, P)``; returns ``(D, P)``.

    A round computes each column that has not converged once: it steps on, or if the step does not
    bring enough, halves it for the next round.
    """
    x = starts[0].clone()
    active = torch.arange(len(x), device=x.device)
    value, gradient = problem.value_and_gradient(x, active)
    for start in starts[1:]:
        other_value, other_gradient = problem.value_and_gradient(start, active)
        better = other_value < value
        value = torch.where(better, other_value, value)
        x, gradient = (
            torch.where(better[:, None], a, b) for a, b in ((start, x), (other_gradient, gradient))
        )
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    inverse = identity.expand(len(x), -1, -1).clone()  # of the Hessian
    fresh, length = torch.ones_like(value, dtype=torch.bool), torch.ones_like(value)
    active = active[torch.isfinite(value)]
    for _ in range(_MAX_ROUNDS):
        step = -(inverse[active] @ gradient[active, :, None])[..., 0]
        step = step * (_LONGEST / step.abs().amax(1, keepdim=True)).clamp_max(1.0)
        promised = -(step * gradient[active]).sum(1)
        going = (promised > _ENOUGH) & (length[active] > _SHORTEST)
        active, step, promised = active[going], step[going], promised[going]
        if not len(active):
            break
        step = step * length[active, None]
        new_value, new_gradient = problem.value_and_gradient(x[active] + step, active)
        enough = value[active] - new_value >= _SUFFICIENT * length[active] * promised
        length[active] = torch.where(enough, 1.0, 0.4 * length[active])
        moved, step, new_gradient = active[enough], step[enough], new_gradient[enough]
        change = new_gradient - gradient[moved]
        inverse[moved], updated = _updated(inverse[moved], fresh[moved], step, change)
        fresh[moved] &= ~updated
        x[moved], value[moved] = x[moved] + step, new_value[enough]
        gradient[moved] = new_gradient
    return x


def _updated(inverse: Tensor, fresh: Tensor, step: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """BFGS update of inverse Hessians ``(A, P, P)``, where the curvature is positive.

    Before its first update an inverse is scaled by that curvature (Nocedal and Wright, 6.20).
    """
    along, across = (step * change).sum(1), change.square().sum(1)
    positive = along > 1e-10 * (step.square().sum(1) * across).sqrt()
    safe = torch.where(positive, along, 1.0)
    scale = torch.where(fresh & positive, safe / torch.where(positive, across, 1.0), 1.0)
    scaled = inverse * scale[:, None, None]
    outer = step[:, :, None] * change[:, None, :] / safe[:, None, None]
    left = torch.eye(step.shape[1], dtype=step.dtype, device=step.device) - outer
    new = left @ scaled @ left.mT + step[:, :, None] * step[:, None, :] / safe[:, None, None]
    return torch.where(positive[:, None, None], new, inverse), positive


def _flatten(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.reshape(len(p), -1) for p in params], 1)


def _unflatten(x: Tensor, like: Sequence[Tensor]) -> Params:
    sizes = [p[0].numel() for p in like]
    parts = zip(x.split(sizes, 1), like, strict=True)
    return tuple(part.reshape(len(x), *p.shape[1:]) for part, p in parts)
