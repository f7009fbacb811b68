"""Whether a model's log density has the gradient that automatic differentiation says it has."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mf.density import LogJoint
from pyro_mf.density.capture import first_line
from pyro_mf.density.program import value_and_gradients

# A step along a random direction, and how far slope and gradient may be apart, relative to the
# larger. What is looked for is a missing part of the model, not the last digit.
_STEP = {torch.float64: 1e-5, torch.float32: 1e-2}
_TOLERANCE = 0.1
_ROUNDING = 50.0  # in units of the rounding error of a difference


def describe_missing_gradient(log_joint: LogJoint) -> str | None:
    """Compare the gradient along one direction with a finite difference, in eager Pyro.

    A model that leaves the graph (NumPy, ``.item()``, ``.detach()``, an operation without a
    derivative) still gives a number; its gradient lacks what was computed outside. Jumps, as
    of ``torch.round``, are not seen.

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
