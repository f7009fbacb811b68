r"""The scales of a fixed-draw optimum, with most of the draws' error taken out.

At the optimum over all draws a factor's precision is the expected curvature,
:math:`1 / \sigma_d^2 = -E_q[\partial_{dd} \log p]` (Price's theorem). Over fixed draws the optimum
estimates that from gradients, whose products with other latents' noise do not cancel; the second
derivatives themselves have no such terms, and on a Gaussian posterior no error at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_mf.solvers.fixed_draw_elbo import Curvature


def settle_scales(x: Tensor, noise: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    """Replace scales by those of the expected curvature, where that is known better.

    Args:
        x: Location and log scale, shape ``(2 D,)``.
        noise: Relative standard error that the draws put on each scale there, shape ``(D,)``.
        curvature: Second derivatives there.

    Returns:
        The new point, and the relative standard error of each of its scales, shape ``(D,)``.
    """
    size = len(noise)
    precision = curvature.precision.mean(0)
    pairs = torch.stack(curvature.precision.chunk(2)).mean(0)
    error = pairs.std(0) / len(pairs) ** 0.5 / (2.0 * precision.abs())
    is_better = (precision > 0) & ~(error > noise)  # a noise that is not known is no reason
    log_scale = torch.where(is_better, -0.5 * precision.abs().log(), x[size:])
    return torch.cat([x[:size], log_scale]), torch.where(is_better, error, noise)
