r"""Penalised maximum likelihood of factors with many shape parameters, column by column.

The steps are Newton's with Fisher's information in place of the Hessian, estimated by the draws'
own scores, :math:`\sum_s w_s \nabla\log q_s \nabla\log q_s^\top`, and with Levenberg's damping.
That takes tens of steps where the curvatures of the parameters differ by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from pyro_mf.families.protocol import Params

_MAX_STEPS = 40
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 0.1, 1e-9, 1e6
_ENOUGH = 0.01  # nats, in the log likelihood of all draws, that a step promises to gain
_LONGEST = 3.0  # longest step in a stored parameter, most of which are logarithms


def maximise_by_scores(
    log_prob: Callable[[Params, Tensor], Tensor],
    residuals: Callable[[Params], Tensor],
    constraints: Sequence[Constraint],
    starts: Sequence[Params],
    u: Tensor,
    log_weights: Tensor,
) -> Params:
    """Maximise the weighted log likelihood less half the sum of squared residuals.

    Every column starts from the best of its starts and never ends lower. Parameters may have a row
    per draw, which is how scores are found; nothing else is asked of the functions.

    Args:
        log_prob: Log density by element, given parameters ``(*batch, *extra)`` and values
            ``(*batch,)``, in nats.
        residuals: Shape ``(*batch, R)``, given parameters: what a prior would have be zero, in its
            standard deviations over the root of the number of draws.
        constraints: Constraint of each parameter.
        starts: Parameters to start from, each a tuple of tensors ``(D, *extra)``.
        u: Draws, shape ``(S, D)``.
        log_weights: Log weights in nats, shape ``(S,)``.

    Returns:
        Parameters, each ``(D, *extra)``.

    References:
        Berndt, Hall, Hall and Hausman (1974), Estimation and Inference in Nonlinear Structural
        Models, Annals of Economic and Social Measurement 3(4)
    """
    weights = torch.softmax(log_weights, 0)
    draws = 1.0 / weights.square().sum()
    stored = [
        tuple(transform_to(c).inv(p) for c, p in zip(constraints, start, strict=True))
        for start in starts
    ]
    like = stored[0]

    def constrained(flat: Tensor) -> Params:
        parts = flat.split([p[0].numel() for p in like], -1)
        shaped = [
            x.reshape(*flat.shape[:-1], *p.shape[1:]) for x, p in zip(parts, like, strict=True)
        ]
        return tuple(transform_to(c)(x) for c, x in zip(constraints, shaped, strict=True))

    def model(flat: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value ``(D,)``, gradient ``(D, P)`` and information ``(D, P, P)``."""
        with torch.enable_grad():
            rows = flat.expand(len(z), -1, -1).detach().requires_grad_()
            log_density = log_prob(constrained(rows), z)
            (scores,) = torch.autograd.grad(log_density.sum(), rows)
            num = residuals(constrained(flat)).shape[-1]
            rows = flat.expand(num, -1, -1).detach().requires_grad_()
            off = residuals(constrained(rows)).diagonal(dim1=0, dim2=-1)  # shape: (D, R)
            (slopes,) = torch.autograd.grad(off.sum(), rows)
        used = weights[:, None] * log_density.detach()
        value = torch.where(weights[:, None] > 0.0, used, 0.0).sum(0) - 0.5 * off.square().sum(-1)
        gradient = torch.einsum("s,sdp->dp", weights, scores)
        gradient = gradient - torch.einsum("dr,rdp->dp", off, slopes)
        rooted = weights.sqrt()[:, None, None] * scores
        information = torch.einsum("sdp,sdq->dpq", rooted, rooted)
        information = information + torch.einsum("rdp,rdq->dpq", slopes, slopes)
        finite = value.isfinite() & gradient.isfinite().all(-1)
        return torch.where(finite, value, -torch.inf).detach(), gradient.detach(), information

    flat = [torch.cat([p.reshape(len(p), -1) for p in start], -1) for start in stored]
    values = torch.stack([model(x, u)[0] for x in flat])
    best = torch.stack(flat).gather(0, values.argmax(0)[None, :, None].expand_as(flat[0][None]))[0]
    return constrained(_climb(model, best, u, float(_ENOUGH / draws)))


def _climb(
    model: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    u: Tensor,
    enough: float,
) -> Tensor:
    """Damped steps ``(D, P)``; columns leave the computation as they converge."""
    x = x.clone()
    value, gradient, information = model(x, u)
    damping = torch.full_like(value, _FIRST_DAMPING)
    active = torch.arange(len(x), device=x.device)[value.isfinite()]
    for _ in range(_MAX_STEPS):
        if not len(active):
            break
        diagonal = information[active].diagonal(dim1=-2, dim2=-1)
        ridge = damping[active, None] * diagonal + 1e-10
        matrix = information[active] + torch.diag_embed(ridge)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        step = torch.cholesky_solve(gradient[active, :, None], factor)[..., 0]
        step = step * (_LONGEST / step.abs().amax(-1, keepdim=True)).clamp(max=1.0)
        promised = (step * gradient[active]).sum(-1)
        trial = x[active] + step
        new_value, new_gradient, new_information = model(trial, u[:, active])
        better = new_value > value[active]
        moved = active[better]
        x[moved], value[moved] = trial[better], new_value[better]
        gradient[moved], information[moved] = new_gradient[better], new_information[better]
        factor_of_damping = torch.where(better, 0.2, 5.0)
        damping[active] = (damping[active] * factor_of_damping).clamp(min=_LEAST_DAMPING)
        active = active[(promised > enough) & (damping[active] < _MOST_DAMPING)]
    return x
