"""What is asked of every approximation, whoever made it: its ELBO, its error against a reference.

An approximation is a Gaussian on our unconstrained axis: a mean of shape ``(D,)`` and a scale,
which is a vector of sds ``(D,)`` or a lower triangular matrix ``(D, D)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_mf.density import LogJoint

Reference = Mapping[str, Mapping[str, float]]

QUANTILES = ("q05", "q50", "q95")
_CHUNK_ELEMENTS = 4_000_000


class Elbo(NamedTuple):
    """An ELBO and its standard error, nats."""

    value: float
    se: float


class Errors(NamedTuple):
    """How far summaries are from a reference's, over all of its parameters.

    Args:
        mean: Mean over parameters of the mean's absolute error, in the reference's sds.
        log_sd: Mean over parameters of the absolute log ratio of sds.
        relative_sd: Median over parameters of the sd's absolute relative error.
    """

    mean: float
    log_sd: float
    relative_sd: float


def noise(num_draws: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_draws, size, generator=generator)


def log_densities(log_joint: LogJoint, z: Tensor, num_data: int) -> Tensor:
    """The log joint at each row; rows times data are kept small enough for any machine."""
    rows = max(1, _CHUNK_ELEMENTS // max(num_data, log_joint.size))
    rows = next(r for r in range(min(rows, len(z)), 0, -1) if len(z) % r == 0)
    with torch.no_grad():
        return torch.cat([log_joint(chunk) for chunk in z.split(rows)])


def count_data(args: tuple[object, ...]) -> int:
    """Elements of the largest of a model's arguments, about what one draw takes."""
    return max((x.numel() for x in args if isinstance(x, Tensor)), default=1)


def elbo(
    log_joint: LogJoint, loc: Tensor, sd: Tensor, *, num_draws: int = 20_000, seed: int = 20_000
) -> Elbo:
    """The ELBO of a product of Gaussians by fresh draws, its entropy in closed form."""
    z = loc + sd * noise(num_draws, len(loc), seed)
    log_p = log_densities(log_joint, z, count_data(log_joint.model_args))
    entropy = float(sd.log().sum()) + len(loc) / 2 * math.log(2 * math.pi * math.e)
    return Elbo(float(log_p.mean()) + entropy, float(log_p.std()) / math.sqrt(num_draws))


def errors(
    log_joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    reference: Reference,
    *,
    num_draws: int = 20_000,
    seed: int = 40_000,
) -> Errors:
    """Errors of means and sds on the model's own scale, by antithetic draws."""
    half = noise(num_draws // 2, len(loc), seed)
    half = half * scale if scale.dim() == 1 else half @ scale.T
    return errors_of_draws(log_joint, loc + torch.cat([half, -half]), reference)


def errors_of_draws(log_joint: LogJoint, z: Tensor, reference: Reference) -> Errors:
    """Errors of means and sds on the model's own scale, of draws on the unconstrained axis."""
    means, sds = summaries(log_joint, z)
    names = [name for name in reference if reference[name]["sd"] > 0]
    column = {
        key: torch.tensor([reference[n][key] for n in names], dtype=torch.float64)
        for key in ("mean", "sd")
    }
    mean = torch.tensor([means[n] for n in names], dtype=torch.float64)
    sd = torch.tensor([sds[n] for n in names], dtype=torch.float64)
    ratio = sd / column["sd"]
    return Errors(
        mean=float(((mean - column["mean"]).abs() / column["sd"]).mean()),
        log_sd=float(ratio.log().abs().mean()),
        relative_sd=float((ratio - 1).abs().median()),
    )


def summaries(log_joint: LogJoint, z: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sd of every element of every latent and deterministic, named as ``theta[3]``."""
    found = dict(elements(log_joint, z))
    means = {name: float(element.mean()) for name, element in found.items()}
    return means, {name: float(element.std()) for name, element in found.items()}


def elements(log_joint: LogJoint, z: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Draws ``(S,)`` of every element of every latent and deterministic, named as ``theta[3]``."""
    found = log_joint.evaluate(z)
    for site, value in {**found.latents, **found.deterministics}.items():
        for index in itertools.product(*map(range, value.shape[1:])):
            suffix = f"[{','.join(str(i + 1) for i in index)}]" if index else ""
            yield site + suffix, value[(slice(None), *index)]


def quantile_errors(log_joint: LogJoint, z: Tensor, reference: Reference) -> tuple[float, ...]:
    """Errors of the 5, 50 and 95 % quantiles, in the reference's sds, averaged over its latents."""
    latents = {site.name for site in log_joint.layout.sites}
    known = {
        name: row
        for name, row in reference.items()
        if row["sd"] > 0 and name.split("[")[0] in latents
    }
    at = torch.tensor([0.05, 0.5, 0.95], dtype=z.dtype)
    off = [
        (torch.quantile(element.to(z.dtype), at) - torch.tensor([row[q] for q in QUANTILES]))
        / row["sd"]
        for name, element in elements(log_joint, z)
        if (row := known.get(name)) is not None
    ]
    return tuple(torch.stack(off).abs().mean(0).tolist())
