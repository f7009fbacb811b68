r"""How far the posterior is from symmetric about the centre of its approximation.

Where the posterior is symmetric about a point m, every stationary point of every f-divergence in a
location family, however wrong its scales, has its location at m. Asymmetry is thus what can move
the means of a mean-field fit, and it shows without any draw of the posterior: by

.. math:: d(z) = \tfrac12 [\log p(z) - \log p(2m - z)],

the odd part of the log density about m, which is zero where there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.sites import Layout
from pyro_mf.diagnostics.proposals import gradients_at

_MIN_DRAWS = 25
_GROUPS = 20  # of draws, each left out once, for the standard error


@dataclass(frozen=True, eq=False)
class Asymmetry:
    """See :func:`asymmetry`.

    Args:
        layout: The sites.
        index: Share of the standard deviation of the log density that is odd, 0 to 1.
        index_se: Its standard error by the draws.
        nats: 90 % quantile of the difference of the log density at a draw and its mirror image.
        elements: Per element the share of the gradient's root mean square that is even, 0 to 1,
            shape ``(D,)``: where the asymmetry comes from. NaN where the density is zero at some
            draws or images, which makes ``index`` 1.
    """

    layout: Layout = field(repr=False)
    index: float
    index_se: float
    nats: float
    elements: Tensor = field(repr=False)

    @property
    def sites(self) -> dict[str, float]:
        """Per site the number of its worst element."""
        return {s.name: float(self.elements[s.start : s.stop].max()) for s in self.layout.sites}


@torch.no_grad()
def asymmetry(log_joint: LogJoint, z: Tensor, centre: Tensor) -> Asymmetry:
    r"""Measure the asymmetry of a posterior about the centre of an approximation.

    The original index divides by :math:`|\log p(z)|`, which any constant of the log density
    changes. Here the odd part d is held against how much the log density varies at all, over draws
    and their mirror images: :math:`\sqrt{E\,d^2 / \mathrm{Var} \log p}`, between 0 and 1.
    Neither constants nor units of the latents matter. ``nats`` needs no scale: a point is
    :math:`e^{\mathrm{nats}}` times likelier than its image.

    Elements are judged by gradients: where p is symmetric about m, each partial derivative is odd
    about it, whatever the correlations (reflecting one latent alone would show these, not
    asymmetry). The number is the share of a derivative's root mean square that is even.

    Cost: two gradients per draw. Where it lies:

    * Zero says that means can be right, not that the solver found them, and nothing of scales.
    * It asks where q has its draws: a second mode that q does not reach is not seen.
    * It also fires where ``centre`` is off the centre of a symmetric posterior: a fit that has not
      converged. For one standard Normal latent and a factor like it whose location is off by b
      sds, it is about 1.4 b.
    * An asymmetric element moves the means of those that are correlated with it, whose own number
      may be zero: it is the source that is named. With many latents the joint index thins out.
    * A large one is a warning, no verdict: a mean-field factor of any shape whose mean is right
      has it, too.

    Args:
        log_joint: The model on its full data.
        z: Draws of the approximation on the unconstrained space, shape ``(S, D)``, at least 25.
        centre: What to reflect about, the approximation's locations, shape ``(D,)``.

    Raises:
        ValueError: If shapes do not fit, draws are not finite or fewer than 25, or the log density
            is NaN at one.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     pyro.sample("b", dist.Gamma(1.0, 1.0))
        >>> z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = asymmetry(LogJoint(model), z, torch.zeros(2))
        >>> found.sites["a"] == 0.0, found.sites["b"] > 0.3
        (True, True)

    References:
        Margossian and Saul (2025), Variational Inference in Location-Scale Families: Exact Recovery
        of the Mean and Correlation Matrix, https://arxiv.org/abs/2410.11067, for the reverse KL;
        https://arxiv.org/abs/2511.01064 for all f-divergences, with the original of the index
    """
    _check(log_joint, z, centre)
    z = z.detach().to(dtype=log_joint.dtype, device=log_joint.device)
    mirrored = 2.0 * centre.detach().to(z) - z
    values, gradients = gradients_at(log_joint, torch.cat([z, mirrored]))
    here, there = values.double().chunk(2)
    if bool(here.isnan().any()):
        raise ValueError(
            f"the log density is NaN at {int(here.isnan().sum())} of {len(z)} draws. "
            "log_joint.evaluate(z) shows which site is to blame."
        )
    there = torch.where(there.isnan(), -math.inf, there)  # no density as far out as that
    difference = here - there
    apart = torch.where(difference.isnan(), 0.0, difference.abs())  # zero on both sides
    nats = float(apart.quantile(0.9, interpolation="higher"))
    if not bool(torch.isfinite(difference).all()):  # a wall on one side
        unknown = torch.full_like(gradients[0], math.nan)
        return Asymmetry(log_joint.layout, 1.0, 0.0, nats, unknown)
    index, index_se = _with_error(here, there)
    at, image = gradients.double().chunk(2)
    even = (0.25 * (at + image).square()).mean(0)
    total = (0.5 * (at.square() + image.square())).mean(0)
    elements = (even / torch.where(total > 0.0, total, 1.0)).sqrt().clamp(max=1.0)
    return Asymmetry(log_joint.layout, index, index_se, nats, elements)


def _with_error(here: Tensor, there: Tensor) -> tuple[float, float]:
    """The index and its standard error, by leaving out a twentieth of the pairs at a time."""
    index = _index(here, there)
    order = torch.arange(len(here), device=here.device) % _GROUPS
    left = torch.stack([_index(here[order != g], there[order != g]) for g in range(_GROUPS)])
    variance = (_GROUPS - 1) / _GROUPS * (left - left.mean()).square().sum()
    return float(index), float(variance.sqrt())


def _index(here: Tensor, there: Tensor) -> Tensor:
    odd = (0.25 * (here - there).square()).mean()
    spread = torch.cat([here, there]).var(correction=0)
    rounding = torch.finfo(here.dtype).eps * here.abs().max()
    if not bool(spread.sqrt() > rounding):
        return torch.zeros_like(odd)
    return (odd / spread).sqrt().clamp(max=1.0)


def _check(log_joint: LogJoint, z: Tensor, centre: Tensor) -> None:
    size = log_joint.size
    if z.dim() != 2 or z.shape[1] != size or centre.shape != (size,):
        raise ValueError(
            f"expected draws of shape (S, {size}) and a centre of shape ({size},); got "
            f"{tuple(z.shape)} and {tuple(centre.shape)}."
        )
    if len(z) < _MIN_DRAWS:
        raise ValueError(f"asymmetry needs at least {_MIN_DRAWS} draws; got {len(z)}.")
    if not bool(torch.isfinite(z).all() and torch.isfinite(centre).all()):
        raise ValueError("draws and centre must be finite; there is NaN or infinity among them.")
