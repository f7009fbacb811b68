r"""The same posterior in coordinates in which hierarchies are easier to draw from.

Where the prior of a latent has a scale that is a latent itself, the two form a funnel: no step size
suits its neck and its mouth. In units of the prior's scale, :math:`e = (z - \mu) / \tau`, the prior
is a product; in the units of the data, z itself, a precise likelihood is. In between are
:math:`e = (z - \mu) \tau^{c - 1} + c \mu` with c from 0, non-centred, to 1, centred. The best c is
about the share of what is known of z that is known from the data.

References:
    Papaspiliopoulos, Roberts and Sköld (2007), A General Framework for the Parametrization of
    Hierarchical Models, Statistical Science 22(1)
    Gorinova, Moore and Hoffman (2020), Automatic Reparameterisation of Probabilistic Programs,
    https://arxiv.org/abs/1906.03028
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.infer.reparam import LocScaleReparam
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.density.prior import without_likelihood

_NUM_DRAWS = 64  # at which scales are looked at
# Share of the data from which on a latent stays centred by as much, and the quantile of the prior's
# scale at which it is taken: what is typical is no guide to the neck of a funnel.
_CENTRED, _LOW = 0.5, 0.25
_VARIES = 1e-6  # relative difference of a scale between draws that is none by rounding
# Relative difference of log densities, which are the same number, by the rounding of the dtype.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}


class Noncentred:
    """A log joint with some of its latents in units of their priors' scales, in part.

    Args:
        log_joint: The log joint.
        centred: By site how far each element stays centred, from 0 to 1, in the site's shape.

    Raises:
        ModelError: If Pyro cannot reparametrise the model so.

    Attributes:
        log_joint: The log joint in the new coordinates, in which a site ``theta`` is
            ``theta_decentered``.
        sites: Names of the sites that are not as they were.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def funnel():
        ...     v = pyro.sample("v", dist.Normal(0.0, 3.0))
        ...     pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))
        >>> found = Noncentred(LogJoint(funnel), {"x": torch.tensor(0.0)})
        >>> found.to_centred(torch.tensor([[2.0, 1.0]]))
        (tensor([[2.0000, 2.7183]]), tensor([1.]))
    """

    def __init__(self, log_joint: LogJoint, centred: Mapping[str, Tensor]) -> None:
        self._centred = dict(centred)
        args, kwargs = log_joint.model_args, log_joint.model_kwargs
        config: dict[str, Reparam] = {n: LocScaleReparam(c) for n, c in centred.items()}
        self.sites = tuple(centred)
        self._old = _prior_of(log_joint)
        try:
            self.log_joint = LogJoint(poutine.reparam(log_joint.model, config), args, kwargs)
            # Reparametrised last, or the site's value would be hidden as if it were observed.
            model = poutine.reparam(self._old.model, config)
            self._new = LogJoint(model, args, kwargs, backend="graph")
        except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"Pyro cannot reparametrise {list(self.sites)}: {error}") from error

    def to_noncentred(self, z: Tensor) -> Tensor:
        """The new coordinates ``(S, D)`` of rows ``(S, D)`` in the old ones."""
        found = self._old.layout.unpack(z)
        for name, (loc, scale) in _locs_and_scales(self._old, self.sites, z).items():
            c = self._centred[name].to(z)
            delta = (found[name] - loc) * scale.pow(c - 1.0)
            found[f"{name}_decentered"] = delta + c * loc
        return self.log_joint.layout.pack(found)

    def to_centred(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The old coordinates ``(S, D)`` of rows in the new ones, and log Jacobians ``(S,)``.

        The log density in the old coordinates is that in the new ones less the log Jacobian.
        """
        new = self.log_joint.layout.unpack(e)
        values = self._new.collect(
            e, lambda trace: {name: trace.nodes[name]["value"] for name in self.sites}
        )
        z = self._old.layout.pack(new | values).to(e)
        log_det = e.new_zeros(len(e))
        for name, (_, scale) in _locs_and_scales(self._old, self.sites, z).items():
            log_det += ((1.0 - self._centred[name].to(e)) * scale.log()).reshape(len(e), -1).sum(1)
        return z, log_det


def find_noncentred(log_joint: LogJoint, loc: Tensor, scale: Tensor) -> list[Noncentred | None]:
    """Coordinates to draw a posterior in, the most promising first.

    They are judged by a Gaussian near the posterior, which is rarely near its neck. So where the
    first are not those in which every hierarchical latent is non-centred, these come second.

    Args:
        log_joint: The log joint.
        loc: Location of the Gaussian, shape ``(D,)``.
        scale: Its sds, shape ``(D,)``, or the Cholesky factor of its covariance, ``(D, D)``.

    Returns:
        One or two, ``None`` for the model's own: alone where no latent's scale is a latent, and
        first where data say enough about most of those. Left out are coordinates in which the
        posterior is not the same, as it is not under ``poutine.scale``.
    """
    if log_joint.mode not in ("vmap", "graph"):  # drawn one after another; nothing would be won
        return [None]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NUM_DRAWS, len(loc), generator=generator, dtype=loc.dtype)
    z = loc + (noise * scale if scale.dim() == 1 else noise @ scale.T)
    z = z.to(dtype=log_joint.dtype, device=log_joint.device)
    try:
        shares = _shares_of_data(log_joint, z, _conditional_sd(scale).to(z))
        if not shares:
            return [None]
        wholly = Noncentred(log_joint, {n: torch.zeros_like(c) for n, c in shares.items()})
        if not _is_same(log_joint, wholly, z):
            return [None]
        if all(float(c.median()) >= _CENTRED for c in shares.values()):
            return [None, wholly]
        partly = {n: torch.where(c < _CENTRED, 0.0, c) for n, c in shares.items()}
        if not any(bool(c.any()) for c in partly.values()):
            return [wholly]
        return [Noncentred(log_joint, partly), wholly]
    except (ModelError, RuntimeError, ValueError):  # a help that is not to stand in the way
        return [None]


def _shares_of_data(log_joint: LogJoint, z: Tensor, sd: Tensor) -> dict[str, Tensor]:
    """How much of each latent's precision is the data's where the prior's scale is small.

    For sites whose scale varies and which Pyro can reparametrise.
    """
    prior = _prior_of(log_joint)
    nodes = prior.trace_at(z[0]).nodes
    sites = {
        site.name: site
        for site in log_joint.layout.sites
        if site.is_real
        and _has_scale(nodes[site.name], site.shape)
        and f"{site.name}_decentered" not in nodes
    }
    found = {}
    for name, (_, scale) in _locs_and_scales(prior, tuple(sites), z).items():
        site = sites[name]
        if not bool((scale - scale[0]).abs().max() > _VARIES * scale.abs().max()):
            continue
        known = sd[site.start : site.stop].reshape(site.shape)
        typical, low = scale.median(0).values, scale.quantile(_LOW, 0)
        data = (known.square().reciprocal() - typical.square().reciprocal()).clamp_min(0.0)
        found[name] = data / (data + low.square().reciprocal())
    return found


def _prior_of(log_joint: LogJoint) -> LogJoint:
    """The prior on the same latents, which knows their distributions and takes less to run.

    Raises:
        ModelError: If its latents are others.
    """
    model, args, kwargs = log_joint.model, log_joint.model_args, log_joint.model_kwargs
    prior = LogJoint(without_likelihood(model), args, kwargs, backend="graph")
    if prior.layout.element_names() != log_joint.layout.element_names():
        raise ModelError("the model has other latent sites once its observations are hidden.")
    return prior


def _has_scale(node: Any, shape: torch.Size) -> bool:
    """Whether a site's distribution has a location and a scale, no larger than its value.

    They are larger where they depend on a discrete latent that is summed out.
    """
    fn = _base(node["fn"])
    if not {"loc", "scale"} <= set(fn.arg_constraints) or fn.event_dim:
        return False
    return all(torch.broadcast_shapes(x.shape, shape) == shape for x in (fn.loc, fn.scale))


def _base(fn: Any) -> Any:
    while isinstance(fn, Independent):  # as Pyro's reparametrisation does
        fn = fn.base_dist
    return fn


def _conditional_sd(scale: Tensor) -> Tensor:
    """Sds of a Gaussian's elements given all others, shape ``(D,)``."""
    if scale.dim() == 1:
        return scale
    identity = torch.eye(len(scale), dtype=scale.dtype)
    inverse = torch.linalg.solve_triangular(scale, identity, upper=False)
    conditional: Tensor = inverse.square().sum(0).rsqrt()
    return conditional


def _locs_and_scales(
    prior: LogJoint, names: tuple[str, ...], z: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of the sites' distributions at each row, in the sites' shapes."""

    def read(trace: Any) -> dict[str, Tensor]:
        found = {}
        for name in names:
            node = trace.nodes[name]
            fn, shape = _base(node["fn"]), node["value"].shape
            found[f"{name} loc"] = fn.loc.expand(shape)
            found[f"{name} scale"] = fn.scale.expand(shape)
        return found

    if not names:
        return {}
    found = prior.collect(z, read)
    return {name: (found[f"{name} loc"].to(z), found[f"{name} scale"].to(z)) for name in names}


def _is_same(log_joint: LogJoint, found: Noncentred, z: Tensor) -> bool:
    """Whether log densities differ by the log Jacobian and nothing else."""
    e = found.to_noncentred(z)
    back, log_det = found.to_centred(e)
    old, new = log_joint.value_and_grad(z)[0], found.log_joint.value_and_grad(e)[0] - log_det
    usable = torch.isfinite(old) & torch.isfinite(new)
    close = _ROUNDING[log_joint.dtype]
    same = (old - new).abs() <= close * (1.0 + old.abs())
    there = (back - z).abs().amax(1) <= close**0.5 * (1.0 + z.abs().amax(1))
    return bool(usable.sum() > len(z) // 2) and bool((same & there)[usable].all())
