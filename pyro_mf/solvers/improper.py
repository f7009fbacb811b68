"""Which latents a posterior leaves undetermined, for the message of a fit that cannot converge."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_mf.density.blocks import Blocks
from pyro_mf.solvers.fixed_draw_elbo import Curvature
from pyro_mf.solvers.start import curvature

# Log factor by which a scale may exceed what the curvature at the origin suggests.
_RUNAWAY = math.log(1e4)
# Least share of the loosest direction that a latent is named for, and most names.
_SHARE, _MAX_NAMES = 0.1, 3


def describe_runaway(blocks: Blocks, x: Tensor, *, seed: int) -> str:
    """Latents whose scales are out of all proportion to the curvature at the origin.

    Args:
        blocks: The log joint.
        x: Location and log scale where the solver has come to, shape ``(2 D,)``.
        seed: Seed of the probes of the curvature.

    Returns:
        A sentence, empty where there are none.
    """
    size = blocks.size
    known = curvature(blocks, torch.zeros_like(x[:size]), seed).clamp_min(1e-12)
    growth = (x[size:] + 0.5 * known.log()).tolist()
    names = blocks.log_joint.layout.element_names()
    runaway = [name for name, g in zip(names, growth, strict=True) if g > _RUNAWAY]
    if not runaway:
        return ""
    return (
        f"the ELBO grows without bound as the scale of {', '.join(runaway[:_MAX_NAMES])} does: the "
        "posterior looks improper. Give it a proper prior, or look for data that leave it "
        "undetermined (separable classes, collinear predictors)"
    )


def describe_loose(blocks: Blocks, found: Curvature) -> str:
    """Latents along the direction in which the ELBO is least curved, in a sentence.

    Args:
        blocks: The log joint.
        found: Second derivatives at the point.
    """
    root = found.hessian.diagonal().abs().clamp_min(1e-300).sqrt()
    vectors = torch.linalg.eigh(found.hessian / torch.outer(root, root)).eigenvectors
    first, second = vectors[:, 0].square().chunk(2)
    share = first + second
    names = blocks.log_joint.layout.element_names()
    order = share.argsort(descending=True)[:_MAX_NAMES].tolist()
    loose = sorted(i for i in order if share[i] > _SHARE)
    return f"Least determined: {', '.join(names[i] for i in loose)}; a proper prior may be missing"
