r"""Adaptive multiple importance sampling with a full-covariance Student-t.

Each round draws from a Student-t whose moments are those of all weighted draws so far, until one is
good; the other rounds then draw from that one, and what came before is forgotten. Where none
becomes good, all draws are weighted against the mixture of all rounds' proposals, so that no draw
of a bad early round weighs more than the rounds together let it. Only values of the density are
needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.kernels.agreement import Reference, find_disagreement
from pyro_mf.kernels.student_t import NET_SIZE, StudentT
from pyro_mf.kernels.weighted import WeightedDraws
from pyro_mf.weights import effective_sample_size, psis

_NETS = 8  # nets of a round
_MIN_ROUNDS = 3
# Effective share of a round's draws at which its proposal is kept; the lower one is enough where
# the share did not grow by a factor from the round before.
_GOOD, _FAIR, _PROGRESS = 0.6, 0.2, 1.1
# What the last round may change about a mean, in sds, or about an sd, and fewest effective draws.
_MAX_SHIFT, _MIN_ESS = 0.05, 400


class Proposal(Protocol):
    """A distribution that can be drawn from, scored, and fitted to draws."""

    def sample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Draws, shape ``(num_draws, D)``, in independent nets of ``NET_SIZE``."""
        ...

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at the rows of ``(S, D)``, shape ``(S,)``."""
        ...

    def matched(self, z: Tensor, log_weights: Tensor) -> Self:
        """One of the same kind that is nearer to what weighted draws represent."""
        ...


def adaptive_importance(
    density_values: Callable[[Tensor], Tensor],
    loc: Tensor,
    covariance: Tensor,
    *,
    generator: torch.Generator,
    tolerance: float = 0.01,
    max_evaluations: int = 50_000,
    min_draws: int = 0,
    degrees_of_freedom: float | None = None,
) -> WeightedDraws:
    r"""Draw from a density of few dimensions, D up to about 25, by importance sampling.

    Rounds of 2048 draws end when the Monte Carlo error of every mean (in sds) and of every sd
    (relative) is at most ``tolerance`` and nothing speaks against the weights, or when the budget
    is spent. A draw without density, or at which it is not finite, has weight zero.

    Args:
        density_values: Log densities, shape ``(S,)``, at the rows of ``(S, D)``; a constant may be
            missing.
        loc: First proposal's location, shape ``(D,)``: an approximate posterior mean.
        covariance: First proposal's scale matrix, shape ``(D, D)``: an approximate posterior
            covariance, such as that of linear response.
        generator: Source of the scrambles.
        tolerance: Largest standard error to stop at, positive.
        max_evaluations: Budget of density evaluations; at least one round is drawn.
        min_draws: Draws to return at least, if the budget allows it, however small their errors.
        degrees_of_freedom: Of the proposals, above 2; by default 7, and D where this is more, as
            heavy tails cost more the more dimensions there are.

    Returns:
        The draws of all rounds since the proposal was good, or of all. Where they cannot be
        trusted ``problems`` says why: k-hat above its threshold, an effective sample size below
        400, a mean or sd that the last round still moved by 0.05, or errors above the tolerance
        when the budget was spent.

    Raises:
        ValueError: If shapes do not fit, the covariance is not positive definite, or a number is
            out of its range.
        NonFiniteError: If the density is zero or not finite at every draw.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = adaptive_importance(
        ...     lambda z: -0.5 * z.square().sum(-1),
        ...     torch.ones(2, dtype=torch.float64),
        ...     4.0 * torch.eye(2, dtype=torch.float64),
        ...     generator=generator,
        ... )
        >>> draws.trusted, bool(draws.mean.abs().max() < 0.03)
        (True, True)

    References:
        Cornuet, Marin, Mira and Robert (2012), Adaptive Multiple Importance Sampling,
        https://arxiv.org/abs/0907.1254
        Aufort, Pudlo and Burzykowski (2022), Tempered, Anti-truncated, Multiple Importance
        Sampling, https://hal.science/hal-03559644
    """
    scale_tril = _check(loc, covariance, degrees_of_freedom)
    df = degrees_of_freedom or max(7.0, float(len(loc)))
    return importance_from(
        density_values,
        StudentT(loc, scale_tril, df),
        generator=generator,
        tolerance=tolerance,
        max_evaluations=max_evaluations,
        min_draws=min_draws,
    )


def importance_from(
    density_values: Callable[[Tensor], Tensor],
    proposal: Proposal,
    *,
    generator: torch.Generator,
    tolerance: float = 0.01,
    max_evaluations: int = 50_000,
    min_draws: int = 0,
    reference: Reference | None = None,
) -> WeightedDraws:
    r"""As :func:`adaptive_importance`, from a proposal of any kind, which is adapted as it can be.

    From a mixture fitted to draws that know all modes it reaches the precision that those lack. A
    mode that they do not know is most likely not found.

    Args:
        density_values: Log densities, shape ``(S,)``, at the rows of ``(S, D)``; a constant may be
            missing.
        proposal: The first proposal: a :class:`StudentT` or :class:`StudentMixture`.
        generator: Source of the scrambles.
        tolerance: Largest standard error to stop at, positive.
        max_evaluations: Budget of density evaluations; at least one round is drawn.
        min_draws: Draws to return at least, if the budget allows it, however small their errors.
        reference: Draws that know all modes, such as those the proposal was fitted to, with which
            the result is compared: a mode that no draw falls into shows in no weight.

    Returns:
        Draws of the same kind, with the same checks and the comparison.

    Raises:
        ValueError: If a number is out of its range.
        NonFiniteError: If the density is zero or not finite at every draw.

    Example:
        >>> from pyro_mf.kernels.mixture import fit_mixture
        >>> generator = torch.Generator().manual_seed(0)
        >>> signs = torch.randn(2000, 1, generator=generator, dtype=torch.float64).sign()
        >>> z = 5.0 * signs + torch.randn(2000, 1, generator=generator, dtype=torch.float64)
        >>> draws = importance_from(
        ...     lambda z: torch.logaddexp(-0.5 * (z - 5.0) ** 2, -0.5 * (z + 5.0) ** 2).sum(1),
        ...     fit_mixture(z, torch.zeros(2000), generator=generator),
        ...     generator=generator,
        ... )
        >>> draws.trusted, bool((draws.covariance - 26.0).abs().max() < 0.5)
        (True, True)

    References:
        Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive Importance Sampling in General
        Mixture Classes, https://arxiv.org/abs/0710.4242
    """
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive; got {tolerance}.")
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations must be at least 1; got {max_evaluations}.")
    rounds = _Rounds(density_values, generator)
    previous: WeightedDraws | None = None
    is_adapting, efficiency = True, 0.0
    while True:
        rounds.draw(proposal)
        if is_adapting:
            before, efficiency = efficiency, rounds.last_efficiency()
            least = _GOOD if efficiency > _PROGRESS * before else _FAIR
            if efficiency >= least:
                rounds.keep_last()
                is_adapting, previous = False, None
        draws = rounds.weighted()
        is_precise = _is_precise(draws, tolerance)
        enough = is_precise and len(rounds.proposals) >= _MIN_ROUNDS
        problems = _problems(draws, previous)
        spent = rounds.num_evaluations + _NETS * NET_SIZE > max_evaluations
        if (enough and not problems and len(draws.z) >= min_draws) or spent:
            break
        previous = draws
        if is_adapting:
            proposal = proposal.matched(draws.z, draws.log_weights)
    if not is_precise:
        problems.append(_describe_errors(draws, tolerance))
    elif not enough:
        problems.append(
            f"the budget was spent after {len(rounds.proposals)} of at least {_MIN_ROUNDS} rounds, "
            "so that it is not known whether another would change the result"
        )
    if reference is not None:
        problems += find_disagreement(draws, rounds.log_prob, reference)
    return rounds.weighted(tuple(problems))


class _Rounds:
    """All draws so far and the mixture that they came from."""

    def __init__(
        self, density_values: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> None:
        self.density_values, self.generator = density_values, generator
        self.proposals: list[Proposal] = []
        self.z = torch.empty(0)
        self.log_density = torch.empty(0)
        self.log_sum = torch.empty(0)  # log of the sum over rounds of the proposals' densities
        self.num_evaluations = 0

    def draw(self, proposal: Proposal) -> None:
        z = proposal.sample(_NETS * NET_SIZE, self.generator)
        self.num_evaluations += len(z)
        values = self.density_values(z).detach().to(z)
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        count = len(self.proposals)
        if count and all(q is proposal for q in self.proposals):
            self.log_sum = self.log_sum + math.log1p(1.0 / count)
        elif count:
            self.log_sum = torch.logaddexp(self.log_sum, proposal.log_prob(self.z))
        self.proposals.append(proposal)
        log_sum_new = self.log_prob(z) + math.log(count + 1)
        self.z, self.log_density, self.log_sum = (
            torch.cat([old.to(new), new])
            for old, new in (
                (self.z.reshape(-1, z.shape[1]), z),
                (self.log_density, values),
                (self.log_sum, log_sum_new),
            )
        )
        if not bool(torch.isfinite(self.log_density).any()):
            raise NonFiniteError(
                f"the density is zero or not finite at all of {len(z)} draws of the first "
                "proposal, so every importance weight is zero. Start at a location and covariance "
                "near the posterior's, or check the model for impossible combinations."
            )

    def last_efficiency(self) -> float:
        """Effective share of the last round's draws, by the proposal that they came from."""
        count = _NETS * NET_SIZE
        z, log_density = self.z[-count:], self.log_density[-count:]
        if not bool(torch.isfinite(log_density).any()):
            return 0.0
        own = log_density - self.proposals[-1].log_prob(z)
        return float(effective_sample_size(own)) / count

    def keep_last(self) -> None:
        """Forget all rounds but the last.

        A proposal is high where the draws that it was matched to happen to be, which biases their
        weights downwards; those drawn from it do not have this bias.
        """
        self.proposals = self.proposals[-1:]
        count = _NETS * NET_SIZE
        self.z, self.log_density = self.z[-count:], self.log_density[-count:]
        self.log_sum = self.proposals[0].log_prob(self.z)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density of the mixture of all rounds' proposals."""
        counts = Counter(self.proposals)  # most rounds may share one
        each = torch.stack([q.log_prob(z) + math.log(count) for q, count in counts.items()])
        return torch.logsumexp(each, 0) - math.log(len(self.proposals))

    def weighted(self, problems: tuple[str, ...] = ()) -> WeightedDraws:
        log_weights = self.log_density - (self.log_sum - math.log(len(self.proposals)))
        return WeightedDraws(
            z=self.z,
            log_weights=log_weights,
            log_density=self.log_density,
            strata=len(self.proposals),
            units=_NETS,
            khat=psis(log_weights).khat,
            num_evaluations=self.num_evaluations,
            problems=problems,
        )


def _is_precise(draws: WeightedDraws, tolerance: float) -> bool:
    return float(torch.maximum(draws.mean_error, draws.sd_error).max()) <= tolerance


def _problems(draws: WeightedDraws, previous: WeightedDraws | None) -> list[str]:
    """What speaks against the weights, in words."""
    found = []
    threshold = min(1.0 - 1.0 / math.log10(len(draws.z)), 0.7)
    if not draws.khat <= threshold:
        found.append(
            f"the weights' tail is too heavy (k-hat {draws.khat:.2f}, above {threshold:.2f}): the "
            "posterior has a shape, or tails, that the proposal does not cover"
        )
    if draws.ess < _MIN_ESS:
        found.append(
            f"the {len(draws.z)} draws are worth only {draws.ess:.0f} independent ones, of "
            f"{_MIN_ESS} needed"
        )
    if previous is not None:
        moved = float(((draws.mean - previous.mean) / draws.sd).abs().max())
        stretched = float((draws.sd / previous.sd).log().abs().max())
        if not max(moved, stretched) <= _MAX_SHIFT:
            found.append(
                f"the last round still moved a mean by {moved:.2f} sds and an sd by "
                f"{100 * stretched:.0f} %"
            )
    return found


def _describe_errors(draws: WeightedDraws, tolerance: float) -> str:
    return (
        f"after {draws.num_evaluations} evaluations the largest standard error of a mean is "
        f"{float(draws.mean_error.max()):.3f} sds and of an sd "
        f"{100 * float(draws.sd_error.max()):.1f} %, where {tolerance:g} was asked for"
    )


def _check(loc: Tensor, covariance: Tensor, degrees_of_freedom: float | None) -> Tensor:
    """Cholesky factor of a covariance that fits.

    Raises:
        ValueError: If anything does not.
    """
    if loc.dim() != 1 or covariance.shape != (len(loc), len(loc)):
        raise ValueError(
            f"expected loc of shape (D,) and covariance of shape (D, D); got {tuple(loc.shape)} "
            f"and {tuple(covariance.shape)}."
        )
    if degrees_of_freedom is not None and not degrees_of_freedom > 2.0:
        raise ValueError(f"degrees_of_freedom must be above 2; got {degrees_of_freedom}.")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed) or not bool(torch.isfinite(factor).all() & torch.isfinite(loc).all()):
        raise ValueError(
            "the covariance of the first proposal must be positive definite, and loc finite. "
            "Use linear response's, or the diagonal of the reverse fit's variances."
        )
    return factor
