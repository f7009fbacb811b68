"""Whether a model's log density has the gradient that automatic differentiation says it has."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.capture import first_line
from pyro_mf.density.program import value_and_gradients
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO

# A step along a random direction, and how far slope and gradient may be apart, relative to the
# larger. What is looked for is a missing part of the model, not the last digit.
_STEP = {torch.float64: 1e-5, torch.float32: 1e-2}
_TOLERANCE = 0.1
_ROUNDING = 50.0  # in units of the rounding error of a difference
# Draws and half the length of the way on which jumps are looked for, on the unconstrained space.
_JUMP_DRAWS, _WAY = 16, 0.3
_NUM_POINTS = 65  # of a finer rule that has to find the jump, too


def describe_missing_gradient(log_joint: LogJoint) -> str | None:
    """Compare the gradient along one direction with a finite difference, in eager Pyro.

    A model that leaves the graph (NumPy, ``.item()``, ``.detach()``, an operation without a
    derivative) still gives a number; its gradient lacks what was computed outside. Jumps, as
    of ``torch.round``, are seen by :func:`describe_jump`.

    Args:
        log_joint: The log density.

    Returns:
        Why the gradient cannot be right, or ``None`` where nothing speaks against it.
    """
    program = log_joint.program
    inputs = program.inputs(log_joint.model_args, log_joint.model_kwargs)
    rows, step = _three_points(log_joint)
    try:
        with torch.no_grad():
            value = program.function.eager_batch(rows, inputs)
    except (RuntimeError, ValueError, ArithmeticError):
        return None  # outside the density's domain, which is for the solver to see
    if not bool(torch.isfinite(value).all()):
        return None
    try:
        _, gradient, *_ = value_and_gradients(program.function.eager_batch, rows[1:2], inputs)
    except RuntimeError as error:
        return f"automatic differentiation fails ({first_line(error)})"
    direction = (rows[2] - rows[0]) / (2 * step)
    slope, predicted = (value[2] - value[0]) / (2 * step), gradient[0] @ direction
    rounding = torch.finfo(value.dtype).eps * value.abs().max() / step
    bend = (value[2] - 2 * value[1] + value[0]).abs() / step  # a step that is not small
    allowed = _TOLERANCE * torch.maximum(slope.abs(), predicted.abs()) + _ROUNDING * rounding
    if bool((slope - predicted).abs() <= allowed + bend):
        return None
    return (
        f"along a random direction its slope is {float(slope):.4g} and automatic differentiation "
        f"says {float(predicted):.4g}, as when a part is computed in NumPy or detached"
    )


def _three_points(log_joint: LogJoint) -> tuple[Tensor, float]:
    """A point near the origin with one neighbour on either side, ``(3, D)``, and the step."""
    step = _STEP.get(log_joint.dtype, 1e-2)
    generator = torch.Generator().manual_seed(7)
    point, direction = torch.randn(2, log_joint.size, generator=generator, dtype=torch.float64)
    rows = torch.stack([0.1 * point + k * step * direction for k in (-1, 0, 1)])
    return rows.to(log_joint.device, log_joint.dtype), step


def describe_jump(log_joint: LogJoint) -> str | None:
    """Compare the ELBO's change over a long way with the integral of its gradient.

    At a point a jump is invisible and the gradient beside it right; over a way it is in the values
    and not in the gradients. Where two rules of integration disagree the way is too long for them,
    and nothing is said.

    Args:
        log_joint: The log density.

    Returns:
        Why the gradient cannot be right, or ``None`` where nothing speaks against it.
    """
    elbo = FixedDrawELBO(Blocks(log_joint), fixed_draws(_JUMP_DRAWS, log_joint.size))
    generator = torch.Generator().manual_seed(7)
    sign = torch.randint(0, 2, (2 * log_joint.size,), generator=generator)
    direction = _WAY * (2.0 * sign.double() - 1.0)
    for num_points, unsettled in ((5, 0.02), (_NUM_POINTS, 0.1)):  # two may agree by chance
        at = torch.linspace(-1.0, 1.0, num_points, dtype=torch.float64)
        values, slopes = _along(elbo, direction, at)
        if not bool(torch.isfinite(values).all()):
            return None  # outside the density's domain, which is for the solver to see
        change, integral = float(values[-1] - values[0]), _simpson(slopes)
        rounding = _ROUNDING * torch.finfo(log_joint.dtype).eps * float(values.abs().max())
        is_resolved = abs(_simpson(slopes[::2]) - integral) < unsettled * abs(integral) + rounding
        most = max(abs(change), abs(integral))
        if not is_resolved or abs(change - integral) <= 0.2 * most + rounding:
            return None
    return (
        f"along a way on which its mean changes by {change:.4g} its gradients add up to "
        f"{integral:.4g}, as with rounding, comparisons and other jumps"
    )


def _along(elbo: FixedDrawELBO, direction: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The objective's values and slopes at points of a way, each of the shape of ``at``."""
    found = [elbo.value_and_gradient(t * direction) for t in at]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    return values, torch.stack([gradient @ direction for _, gradient in found])


def _simpson(slopes: Tensor) -> float:
    """Integral over the way from -1 to 1 of a function known at an odd number of points."""
    inner = 4.0 * slopes[1::2].sum() + 2.0 * slopes[2:-1:2].sum()
    return float((slopes[0] + inner + slopes[-1]) * 2.0 / (3.0 * (len(slopes) - 1)))
