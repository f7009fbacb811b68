"""Which site made a loss or gradient NaN or infinite."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError, NonFiniteError
from pyro_mf.density.checks import invalid_data, is_data
from pyro_mf.density.model_function import Inputs
from pyro_mf.density.program import Program
from pyro_mf.families import Family
from pyro_mf.families.stratified import weighted_draws

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

_CURE = (
    "Parameters keep their last finite values. Try a smaller step, another init_loc_fn, "
    "or float64; look for a log or division of zero at this site."
)


def raise_non_finite(
    program: Program, family: Family, params: tuple[Tensor, ...], noise: Tensor, inputs: Inputs
) -> NoReturn:
    """Run the model eagerly at the same noise and raise with the first site that is not finite.

    Args:
        program: The model.
        family: The guide's family.
        params: The guide's parameters, each ``(D,)``.
        noise: The noise of the step, shape ``(S, D)``.
        inputs: The model's inputs.

    Raises:
        NonFiniteError: If a site's log probability or gradient is not finite.
        ModelError: If data are NaN or outside their support.
    """
    params = tuple(p.detach() for p in params)
    for name, value in zip(family.param_names, params, strict=True):
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            elements = program.prototype.layout.element_names()
            index = int(bad.nonzero()[0, 0])
            first = elements[index] if len(bad) == len(elements) else f"{name}[{index}]"
            raise NonFiniteError(
                f"the guide's parameter '{name}' is not finite at {int(bad.sum())} elements, first "
                f"'{first}'. Something set it outside of this objective; set up a new guide."
            )
    for draw in weighted_draws(family, params, noise)[0]:
        try:
            place = _first_site(program, draw, inputs)
        except LinAlgError as error:
            raise_failed_factorisation(program, error)
        if place is not None:
            raise NonFiniteError(f"{place}. {_CURE}")
    raise NonFiniteError(f"the loss or its gradient is not finite, at no site alone. {_CURE}")


def raise_failed_factorisation(program: Program, error: Exception) -> NoReturn:
    """Raise with the site after which a matrix could not be factorised.

    Raises:
        NonFiniteError: Always.
    """
    raise NonFiniteError(
        f"a matrix cannot be factorised at a draw of the guide, after site "
        f"'{program.function.last_site}': {str(error).splitlines()[0]} Parameters keep their last "
        "finite values. Add jitter to the matrix's diagonal, or start from a smaller init_scale."
    ) from error


def _first_site(program: Program, draw: Tensor, inputs: Inputs) -> str | None:
    with torch.enable_grad():
        z = draw.detach().requires_grad_(True)
        trace, log_det = program.function.trace(z, inputs)
        nodes = {
            name: node
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and not _pyro.is_subsample(node)
        }
        for name, node in nodes.items():
            if is_data(node):
                outside = invalid_data(node)
                if outside is not None and bool(outside.any()):
                    raise ModelError(
                        f"observed site '{name}' ({type(node['fn']).__name__}) has "
                        f"{int(outside.sum())} values that are NaN or outside its support "
                        f"{node['fn'].support}. Parameters keep their last values. Clean the data, "
                        "or mask them with poutine.mask and put valid numbers in their place."
                    )
            elif not bool(torch.isfinite(node["value"]).all()):
                return f"site '{name}' has a value that is not finite"
            if not bool(torch.isfinite(node["log_prob"]).all()):
                worst = node["log_prob"][~torch.isfinite(node["log_prob"])].reshape(-1)[0].item()
                return f"the log probability of site '{name}' is {worst}"
        for name, node in nodes.items():
            if node["log_prob"].requires_grad and not _has_finite_gradient(node["log_prob"], z):
                return f"the gradient of the log probability of site '{name}' is not finite"
        if not _has_finite_gradient(log_det, z):
            return "the Jacobian of the latents' transforms or its gradient is not finite"
    return None


def _has_finite_gradient(value: Tensor, z: Tensor) -> bool:
    if not value.requires_grad:
        return bool(torch.isfinite(value).all())
    (gradient,) = torch.autograd.grad(
        value.sum(), z, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return bool(torch.isfinite(gradient).all())
