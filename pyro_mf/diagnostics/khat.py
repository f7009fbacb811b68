r"""Pareto k-hat of every marginal: are the factors right, whatever the joint is?

The k-hat of the joint ratio :math:`p(z) / q(z)` is bad for almost every mean-field fit of ten
correlated latents, whose marginals may be fine. Here it is asked of each scalar element on its own,
of :math:`p_i(z_i) / q_i(z_i)`, with :math:`p_i` estimated from draws of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_mf.density.sites import Layout
from pyro_mf.families import NormalMixture
from pyro_mf.families.protocol import event_dim_of
from pyro_mf.families.weighted_draws import condensed
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.weights import effective_sample_size, psis

LogDensity: TypeAlias = Callable[[Tensor], Tensor]
"""Log density of every element at values ``(S, D)``, shape ``(S, D)``."""

_MIN_REFERENCE = 100.0  # effective draws, for eight parameters per element
_GROUPS = 5  # of the reference, each left out once
_SMALL_SAMPLE = 1.39  # of Student's t with 4 degrees of freedom over the Normal, at 97.5 %
# Log likelihood ratio below which draws do not tell p from q: half the 99 % point of a chi square
# with as many degrees of freedom as the estimate has parameters.
_TELLS_APART = 10.0


@dataclass(frozen=True, eq=False)
class SiteKhats:
    """What the marginals say, per element of the flat unconstrained vector.

    Args:
        layout: The sites.
        khat: k-hat of each element's marginal ratio, shape ``(D,)``; ``-inf`` where the reference
            does not tell the two marginals apart.
        khat_se: Its standard error, shape ``(D,)``: of the draws of q and, by leaving out fifths,
            of the reference; that of the missed share where k-hat is bad by it alone; 0 where k-hat
            is ``-inf``.
        threshold: Largest k-hat that is good at the number of draws used.
        ess: Effective share of draws under the marginal ratio, 0 to 1, shape ``(D,)``.
        distance: Total variation between the marginals, 0 to 1, shape ``(D,)``: the share of
            probability that q puts in wrong places. Noise makes it 0.02 at 2000 reference draws.
        num_draws: Draws of q used: no more than the effective draws of the reference.
    """

    layout: Layout = field(repr=False)
    khat: Tensor = field(repr=False)
    khat_se: Tensor = field(repr=False)
    threshold: float
    ess: Tensor = field(repr=False)
    distance: Tensor = field(repr=False)
    num_draws: int

    @property
    def good(self) -> Tensor:
        """Elements whose k-hat is at most the threshold, booleans of shape ``(D,)``."""
        return self.khat <= self.threshold

    @property
    def bad(self) -> Tensor:
        """Elements whose k-hat is above the threshold by two standard errors, shape ``(D,)``."""
        return self.khat - 2.0 * self.khat_se > self.threshold

    @property
    def sites(self) -> dict[str, float]:
        """k-hat of every site: that of its worst element."""
        return {s.name: float(self.khat[s.start : s.stop].max()) for s in self.layout.sites}

    @property
    def worst(self) -> tuple[str, float]:
        """Name and k-hat of the worst element."""
        at = int(self.khat.argmax())
        return self.layout.element_names()[at], float(self.khat[at])


@torch.no_grad()
def site_khats(
    layout: Layout,
    z: Tensor,
    reference: Tensor,
    *,
    log_weights: Tensor | None = None,
    log_q: LogDensity | None = None,
    reference_ess: float | None = None,
) -> SiteKhats:
    r"""k-hat of each element's marginal ratio, and of each site: the worst of its elements.

    Marginals of p are mixtures of three Normals that are fitted to the reference. On pairs of known
    densities k-hat is then within two of its standard errors of that with the true density.

    Cost: no density; some ten milliseconds per element whose marginals are alike, five times as
    much for others. Where it lies:

    * A reference that is wrong. Linear response gives a Gaussian's marginals, not those of p.
    * It is the shape of the ratio's tail, however little is in it: the best Normal for a mildly
      skewed marginal has a k-hat above 1 with 97 % of the draws effective. Read ``distance``, too.
    * Draws of q cannot see what they do not reach, such as another mode. The reference does: a
      share m of its weight outside of the range of S draws of q is what an index of
      :math:`1 + \log(m / 2) / \log S` leaves there. Where that is above the threshold, for m of
      about a fifth, k-hat is at least that. A mode with less weight goes unseen.
    * Of a tail beyond the last of R reference draws nothing is known. No more than R draws of q are
      used, so that where p outweighs q there are about as many of either.
    * Where the reference is as likely under q as under the estimate (10 nats, the 99 % point for
      its eight parameters), k-hat would be that of noise, and is ``-inf``. Of equal marginals a
      few in a hundred are told apart all the same, more where the density of q is estimated and
      has heavy tails; ``bad``, by two errors, hardly any is.

    Args:
        layout: The sites of the flat vector.
        z: Draws of q on the unconstrained space, independent, shape ``(S, D)``.
        reference: Draws of the posterior, shape ``(R, D)``; rows that depend on each other, as of
            chains, should be near each other, iteration by iteration.
        log_weights: Log weights of the reference in nats, shape ``(R,)``; equal by default.
        log_q: Log densities of q's marginals, a function of values ``(S, D)`` to nats ``(S, D)``,
            such as :func:`marginal_log_prob` of a guide; what is NaN, or not given, is estimated
            from ``z`` as p's are from the reference.
        reference_ess: Effective number of reference draws, where that is below what the weights
            say: chains.

    Raises:
        ValueError: If shapes do not fit, draws are not finite or have no spread, or the reference
            has fewer than 100 effective draws.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.density import LogJoint
        >>> def model():
        ...     pyro.sample("a", dist.Normal(0.0, 1.0))
        ...     pyro.sample("b", dist.Normal(0.0, 1.0))
        >>> _ = torch.manual_seed(0)
        >>> p, z = torch.randn(2000, 2), torch.randn(2000, 2)
        >>> z[:, 1] *= 0.4                          # q is too narrow in "b"
        >>> found = site_khats(LogJoint(model).layout, z, p)
        >>> found.good.tolist(), found.worst[0]
        ([True, False], 'b')

    References:
        Yao, Vehtari, Simpson and Gelman (2018), Yes, but Did It Work?: Evaluating Variational
        Inference, https://arxiv.org/abs/1802.02538, section 3.2
    """
    weights = z.new_zeros(len(reference)) if log_weights is None else log_weights.detach()
    _check(layout, z, reference, weights)
    enough = float(effective_sample_size(weights))
    enough = min(enough, reference_ess or enough)
    if not enough >= _MIN_REFERENCE:
        raise ValueError(
            f"the reference has {enough:.0f} effective draws, and k-hat of marginals needs "
            f"{_MIN_REFERENCE:.0f}. Take more, or a better reference."
        )
    used = min(len(z), round(enough))
    z, reference = _unwound(layout, z.detach().double(), reference.detach().double())
    weights = weights.double()
    q = _density_of(log_q, z)
    p = _fit(reference, weights)
    log_ratio = p(z[:used]) - q(z[:used])
    is_alike = _are_alike(p, q, z, reference, weights, enough)
    results = [psis(column) for column in log_ratio.T]
    threshold = results[0].threshold
    khat = torch.tensor([r.khat for r in results], dtype=z.dtype)
    own_se = torch.tensor([r.khat_se for r in results], dtype=z.dtype)
    known = None if log_q is None else log_q(z[:used]).double()
    reference_se = _reference_se(z, reference, weights, known, used, ~is_alike)
    outside = _outside(z, reference, weights)
    khat, khat_se = _with_missed(
        khat, torch.hypot(own_se, reference_se), outside, len(z), enough, threshold
    )
    wrong = 0.5 * (log_ratio.exp() - 1.0).abs().mean(0)
    return SiteKhats(
        layout=layout,
        khat=torch.where(is_alike, -math.inf, khat),
        khat_se=torch.where(is_alike | khat.isinf(), 0.0, khat_se),
        threshold=threshold,
        ess=torch.tensor([r.ess for r in results], dtype=z.dtype) / used,
        distance=torch.maximum(wrong, outside).clamp(max=1.0),
        num_draws=used,
    )


@torch.no_grad()
def marginal_log_prob(guide: FlatGuide, z: Tensor) -> Tensor:
    """Log density of each marginal of a guide, NaN for elements of blocks, which have no formula.

    Args:
        guide: A guide with flat parameters that is set up.
        z: Unconstrained vectors, shape ``(S, D)``.

    Returns:
        Nats, shape ``(S, D)``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model():
        ...     pyro.sample("a", dist.Normal(0.0, 1.0))
        >>> marginal_log_prob(AutoMeanField(model, init_scale=1.0).setup(), torch.zeros(1, 1))
        tensor([[-0.9189]])
    """
    columns = []
    for site in guide.layout.sites:
        family, params = guide.site_family(site)
        own = z[:, site.start : site.stop]
        if event_dim_of(family) == 0:
            u = own.reshape(len(z), *site.unconstrained_shape)
            columns.append(family.log_prob(tuple(params.values()), u).reshape(len(z), -1))
        else:
            columns.append(torch.full_like(own, math.nan))
    return torch.cat(columns, 1)


def _fit(draws: Tensor, log_weights: Tensor) -> LogDensity:
    family = NormalMixture(num_components=3)
    params = family.fit_weighted(*condensed(draws, log_weights))
    return lambda u: family.log_prob(params, u)


def _density_of(log_q: LogDensity | None, z: Tensor) -> LogDensity:
    """Log density of draws: as it is known, its columns of NaN estimated."""
    if log_q is None:
        return _fit(z, z.new_zeros(len(z)))
    is_unknown = log_q(z).isnan().all(0)
    if not bool(is_unknown.any()):
        return lambda u: log_q(u).double()
    fitted = _fit(z, z.new_zeros(len(z)))
    return lambda u: torch.where(is_unknown, fitted(u), log_q(u).double())


def _are_alike(
    p: LogDensity, q: LogDensity, z: Tensor, reference: Tensor, weights: Tensor, enough: float
) -> Tensor:
    """Elements of which the reference is about as likely under q as under the estimate of p.

    Within the range of the draws of q: an outlier beyond has a likelihood that no estimate knows.
    There have to be about as few of those as two equal samples have.
    """
    beyond = (reference < z.min(0).values) | (reference > z.max(0).values)
    gain = torch.where(beyond, 0.0, p(reference) - q(reference))
    weight = enough * torch.softmax(weights, 0)
    ratio = 1.0 + enough / len(z)  # an estimate of q has noise of its own, by its own draws
    return ((weight @ gain) < ratio * _TELLS_APART) & ((weight @ beyond.double()) < 10.0 * ratio)


def _with_missed(
    khat: Tensor, khat_se: Tensor, outside: Tensor, draws: int, enough: float, threshold: float
) -> tuple[Tensor, Tensor]:
    """k-hat and its error, or the index of the missed share where that alone is bad."""
    missed = 1.0 + (outside / 2.0).log() / math.log(draws)
    missed_se = ((1.0 - outside) / (outside * enough)).sqrt() / math.log(draws)
    low = missed - 2.0 * missed_se
    is_bad = (outside > 0.0) & (low > threshold)
    low = torch.maximum(khat - 2.0 * khat_se, low)
    most = torch.maximum(khat, missed)
    return torch.where(is_bad, most, khat), torch.where(is_bad, 0.5 * (most - low), khat_se)


def _reference_se(
    z: Tensor, reference: Tensor, weights: Tensor, known: Tensor | None, used: int, asked: Tensor
) -> Tensor:
    """Standard error of k-hat by the estimates of densities: a jackknife over groups of rows.

    Of the elements that are asked for, zero of all others: it takes most of the time.
    """
    result = torch.zeros(z.shape[1], dtype=z.dtype, device=z.device)
    if not bool(asked.any()):
        return result
    log_q = z.new_full((used, int(asked.sum())), math.nan) if known is None else known[:, asked]
    khats = []
    for group in range(_GROUPS):
        ours, log_weights, theirs = (
            torch.cat([part for k, part in enumerate(x.chunk(_GROUPS)) if k != group])
            for x in (reference[:, asked], weights, z[:, asked])
        )
        at = z[:used, asked]
        own = log_q
        if bool(log_q.isnan().any()):
            fitted = _fit(theirs, theirs.new_zeros(len(theirs)))
            own = torch.where(log_q.isnan(), fitted(at), log_q)
        khats.append([psis(column).khat for column in (_fit(ours, log_weights)(at) - own).T])
    spread = torch.tensor(khats, dtype=z.dtype)
    variance = (_GROUPS - 1) / _GROUPS * (spread - spread.mean(0)).square().sum(0)
    result[asked] = _SMALL_SAMPLE * variance.sqrt().nan_to_num(nan=math.inf)
    return result


def _outside(z: Tensor, reference: Tensor, weights: Tensor) -> Tensor:
    """Share of the reference's weight beyond the outermost draws of q, shape ``(D,)``."""
    beyond = (reference < z.min(0).values) | (reference > z.max(0).values)
    return torch.softmax(weights, 0) @ beyond.double()


def _unwound(layout: Layout, z: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Angles to within half a turn of where q is."""
    turn = torch.zeros(layout.size, dtype=z.dtype, device=z.device)
    for site in layout.sites:
        turn[site.start : site.stop] = 2.0 * math.pi * site.is_circular
    if not bool(turn.any()):
        return z, reference
    centre = torch.atan2(z.sin().mean(0), z.cos().mean(0))
    step = torch.where(turn > 0, turn, 1.0)
    near, far = (x - turn * ((x - centre) / step).round() for x in (z, reference))
    return near, far


def _check(layout: Layout, z: Tensor, reference: Tensor, weights: Tensor) -> None:
    size = layout.size
    for name, draws in {"z": z, "reference": reference}.items():
        if draws.dim() != 2 or draws.shape[1] != size:
            raise ValueError(
                f"{name} must be draws of shape (number, {size}), an entry per element of "
                f"{[s.name for s in layout.sites]}; got {tuple(draws.shape)}."
            )
        if not bool(torch.isfinite(draws).all()):
            raise ValueError(f"{name} must be finite; some of its draws are NaN or infinite.")
        is_constant = (draws == draws[:1]).all(0)
        if bool(is_constant.any()):
            element = layout.element_names()[int(is_constant.nonzero()[0])]
            raise ValueError(
                f"{name} has one value only at element '{element}': a point mass has no density."
            )
    if weights.shape != reference.shape[:1]:
        raise ValueError(
            f"expected log_weights of shape ({len(reference)},), one per draw of the reference; "
            f"got {tuple(weights.shape)}."
        )
