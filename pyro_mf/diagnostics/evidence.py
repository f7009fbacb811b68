r"""Between which numbers the log evidence lies: the ELBO, tighter ELBOs, and the EUBO.

.. math::
   \mathrm{ELBO} \le \mathrm{ELBO}_K = \mathbb{E}_q \log \tfrac1K \textstyle\sum_{k=1}^K w_k
   \le \log Z \le \mathrm{EUBO} = \mathbb{E}_p \log w,

with :math:`w = p(x, z) / q(z)`, and :math:`\mathrm{EUBO} - \mathrm{ELBO}` is
KL(q || p) + KL(p || q). An upper bound from draws of q alone, the chi upper bound, takes their
second moment, which is infinite for most mean-field fits of more than ten latents: it is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_mf.density.log_joint import LogJoint
from pyro_mf.diagnostics.proposals import Proposal, weigh
from pyro_mf.kernels.mixing import effective_sample_size as chain_ess
from pyro_mf.solvers.evidence import EvidenceBounds, bounds_from
from pyro_mf.solvers.fixed_draw_elbo import Estimate, estimate_from
from pyro_mf.solvers.posterior_draws import PosteriorDraws
from pyro_mf.weights import psis

_MIN_BATCHES = 32  # at the largest K, for a standard error
_NUM_ORDERS = 20  # in which draws are put together
# Standard errors by which the EUBO may be below the ELBO by chance, and of it by rounding.
_MAX_Z, _ROUNDING = 4.0, 1e-6
_SCARCE = 100.0  # effective draws


@dataclass(frozen=True, eq=False)
class EvidenceBracket:
    """Bounds and an estimate of the log evidence, in nats; see :func:`evidence_bracket`.

    Args:
        name: The approximation that they are by.
        elbo: ELBO.
        elbo_se: Its standard error.
        multi_draw: The ELBO of K draws by K, a power of two, never falling with K.
        log_evidence: Log of the mean smoothed weight.
        log_evidence_se: Its standard error; too small where k-hat is above the threshold.
        khat: k-hat of the weights.
        khat_se: Its standard error.
        threshold: Largest k-hat at which ``log_evidence`` can be depended on.
        eubo: EUBO; infinite without draws of the posterior.
        eubo_se: Its standard error; NaN without.
        notes: What is wrong with them, in sentences.
    """

    name: str
    elbo: float
    elbo_se: float
    multi_draw: dict[int, Estimate] = field(repr=False)
    log_evidence: float
    log_evidence_se: float
    khat: float
    khat_se: float
    threshold: float
    eubo: float
    eubo_se: float
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> Estimate:
        """``eubo - elbo``, KL(q || p) + KL(p || q), with its standard error."""
        return Estimate(self.eubo - self.elbo, math.hypot(self.eubo_se, self.elbo_se))

    @property
    def bounds(self) -> EvidenceBounds:
        """The bound from below that is tightest after two standard errors, and the EUBO."""
        lower = [Estimate(self.elbo, self.elbo_se), *self.multi_draw.values()]
        best = max(lower, key=lambda e: e.elbo - 2.0 * e.se)  # not the luckiest of them
        return bounds_from([best], [Estimate(self.eubo, self.eubo_se)])

    @property
    def contradicts_itself(self) -> bool:
        """Whether the EUBO is below the ELBO by more than chance."""
        if not math.isfinite(self.eubo_se):
            return False
        allowed = _MAX_Z * self.gap.se + _ROUNDING * (1.0 + abs(self.eubo))
        return self.gap.elbo < -allowed


@torch.no_grad()
def evidence_bracket(
    log_joint: LogJoint,
    proposal: Proposal,
    posterior: PosteriorDraws | None = None,
    *,
    num_draws: int = 4096,
    seed: int = 0,
) -> EvidenceBracket:
    r"""Bound and estimate the log evidence by one approximation.

    Cost: one density value per draw. Where it lies:

    * The EUBO bounds from above only if ``posterior`` are draws of all of the posterior: chains
      that miss a mode of mass m put it too low by up to :math:`-\log(1 - m)`.
    * A narrow bracket is a good joint approximation; a wide one may have perfect marginals.
    * The estimate by weights is an underestimate wherever k-hat is bad, and its error says nothing.

    Args:
        log_joint: The model on its full data.
        proposal: The approximation; a lower bound for any, and an upper one where its log density
            at any point is known.
        posterior: Draws of the posterior with their log joint; without them there is no EUBO.
        num_draws: Number of draws of the approximation, at least 64.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are fewer than 64 draws, weights are not finite, or ``posterior`` has
            another number of latents or is given where the approximation's density is unknown.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.diagnostics.proposals import response_proposal
        >>> from pyro_mf.solvers.linear_response import LinearResponse
        >>> def prior():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> exact = response_proposal(LinearResponse(torch.zeros(1), torch.eye(1)))
        >>> found = evidence_bracket(LogJoint(prior), exact)
        >>> abs(found.elbo) < 1e-6, abs(found.log_evidence) < 1e-6
        (True, True)

    References:
        Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders,
        https://arxiv.org/abs/1509.00519
        Ji and Shen (2019), Stochastic Variational Inference via Upper Bound,
        https://arxiv.org/abs/1912.00650
    """
    if num_draws < 2 * _MIN_BATCHES:
        raise ValueError(f"num_draws must be at least {2 * _MIN_BATCHES}; got {num_draws}.")
    _, log_weights = weigh(log_joint, proposal, num_draws, seed)
    smoothed = psis(log_weights)
    elbo = estimate_from(log_weights)
    eubo = Estimate(math.inf, math.nan)
    if posterior is not None:
        eubo = _eubo(log_joint, proposal, posterior)
    relative = max(1.0 / smoothed.ess - 1.0 / num_draws, 0.0)
    found = EvidenceBracket(
        name=proposal.name,
        elbo=elbo.elbo,
        elbo_se=elbo.se,
        multi_draw=multi_draw_elbos(log_weights, seed=seed),
        log_evidence=smoothed.log_mean,
        log_evidence_se=math.sqrt(relative),
        khat=smoothed.khat,
        khat_se=smoothed.khat_se,
        threshold=smoothed.threshold,
        eubo=eubo.elbo,
        eubo_se=eubo.se,
    )
    object.__setattr__(found, "notes", _notes(found, posterior, log_weights))  # not seen before
    return found


def multi_draw_elbos(log_weights: Tensor, *, seed: int = 0) -> dict[int, Estimate]:
    r"""The ELBO of K draws at a time, for K = 2, 4, 8, ... while there are 32 batches.

    Draws are put into batches in 20 random orders, and batches joined two by two, so that estimates
    are unbiased and rise with K, as their expectations do, whatever the draws. The standard error
    is that of one order; the mean over orders has a smaller one.

    Args:
        log_weights: Log weights in nats, shape ``(S,)``, of which a power of two is used.
        seed: Seed of the orders.

    Example:
        >>> found = multi_draw_elbos(torch.tensor([0.0, 1.0]).repeat(64))
        >>> list(found), found[2].elbo < found[4].elbo
        ([2, 4], True)
    """
    used = 2 ** int(math.log2(len(log_weights)))
    generator = torch.Generator().manual_seed(seed + 2)
    orders = torch.stack(
        [torch.randperm(used, generator=generator) for _ in range(_NUM_ORDERS)]
    ).to(log_weights.device)
    sums = log_weights[:used][orders]
    found: dict[int, Estimate] = {}
    size = 2
    while used // size >= _MIN_BATCHES:
        sums = torch.logaddexp(sums[:, 0::2], sums[:, 1::2])
        values = sums - math.log(size)
        se = float(values.std(1).mean()) / math.sqrt(values.shape[1])
        found[size] = Estimate(float(values.mean()), se)
        size *= 2
    return found


def mcse(values: Tensor, posterior: PosteriorDraws) -> float:
    """Monte Carlo standard error of an average over posterior draws.

    Of chains by the effective sample size of these very values; of weighted draws as if they were
    independent, which particles of a filter are not quite.

    Args:
        values: Shape ``(S,)``.
        posterior: The draws, chains iteration by iteration.

    Example:
        >>> z = torch.arange(100.0)[:, None]
        >>> draws = PosteriorDraws("importance", z, torch.zeros(100), z[:, 0], z[0], z[0])
        >>> round(mcse(z[:, 0], draws), 2)
        2.89
    """
    num_chains = int(posterior.diagnostics.get("num_chains", 0))
    if num_chains and len(values) >= 4 * num_chains:
        chains = values.reshape(-1, num_chains, 1)
        return float(values.std()) / math.sqrt(float(chain_ess(chains)))
    weights = posterior.weights
    return float((weights * (values - weights @ values)).square().sum().sqrt())


def _eubo(log_joint: LogJoint, proposal: Proposal, posterior: PosteriorDraws) -> Estimate:
    if proposal.log_prob is None:
        raise ValueError(
            f"the density of {proposal.name} is known at its own draws only, so there is no EUBO. "
            "Leave posterior out, or use a mean-field guide or the Gaussian of linear response."
        )
    if posterior.z.shape[1] != log_joint.size:
        raise ValueError(
            f"the posterior's draws have {posterior.z.shape[1]} latents and the model has "
            f"{log_joint.size}: they are of another model."
        )
    z = posterior.z.to(dtype=log_joint.dtype, device=log_joint.device)
    log_q = proposal.log_prob(z).double().to(posterior.z.device)
    has_weight = posterior.log_weights > -math.inf
    ratio = torch.where(has_weight, posterior.log_density.double() - log_q, 0.0)
    value = float(posterior.weights.double() @ ratio)
    return Estimate(value, mcse(ratio, posterior))


def _notes(
    found: EvidenceBracket, posterior: PosteriorDraws | None, log_weights: Tensor
) -> tuple[str, ...]:
    notes = []
    zero = int((log_weights == -math.inf).sum())
    if zero:
        notes.append(
            f"the model gives density zero to {zero} of {len(log_weights)} draws of {found.name}, "
            "so the ELBO is minus infinity"
        )
    if found.contradicts_itself:
        notes.append(
            f"the EUBO is below the ELBO by {-found.gap.elbo:.2g} \u00b1 {found.gap.se:.2g} nats, "
            "which cannot be: the posterior's draws have not mixed or miss part of it, or are of "
            "another model or other data"
        )
    if not found.khat <= found.threshold:
        notes.append(
            f"k-hat is {found.khat:.2f} \u00b1 {found.khat_se:.2f}, above {found.threshold:.2f}, "
            "so the log evidence by importance weights is not to be depended on; the bounds are"
        )
    if posterior is not None:
        notes += [f"the posterior's draws: {problem}" for problem in posterior.problems]
        scarce = posterior.diagnostics.get("ess", math.inf)
        if scarce < _SCARCE:
            notes.append(f"the posterior's draws are worth {scarce:.0f} independent ones only")
    return tuple(notes)
