r"""Adaptive multiple importance sampling with a full-covariance Student-t.

Each round draws from a Student-t whose moments are those of all weighted draws so far, until one is
good; the other rounds then draw from that one, and what came before is forgotten. Where none
becomes good, all draws are weighted against the mixture of all rounds' proposals, so that no draw
of a bad early round weighs more than the rounds together let it. Only values of the density are
needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.kernels.student_t import StudentT
from pyro_mf.kernels.weighted import WeightedDraws, temper, weighted_moments
from pyro_mf.weights import effective_sample_size, psis

_NETS = 8  # nets of a round
_MIN_ROUNDS = 3
# A proposal is matched to weights that are worth so many draws per dimension, flattened if need be.
_DRAWS_PER_DIMENSION = 10
# Effective share of a round's draws at which its proposal is kept; the lower one is enough where
# the share did not grow by a factor from the round before.
_GOOD, _FAIR, _PROGRESS = 0.6, 0.2, 1.1
# What the last round may change about a mean, in sds, or about an sd, and fewest effective draws.
_MAX_SHIFT, _MIN_ESS = 0.05, 400


def adaptive_importance(
    density_values: Callable[[Tensor], Tensor],
    loc: Tensor,
    covariance: Tensor,
    *,
    generator: torch.Generator,
    tolerance: float = 0.01,
    max_evaluations: int = 50_000,
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
    scale_tril = _check(loc, covariance, tolerance, max_evaluations, degrees_of_freedom)
    size = len(loc)
    df = degrees_of_freedom or max(7.0, float(size))
    proposal = StudentT(loc, scale_tril, df)
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
        enough = _is_precise(draws, tolerance) and len(rounds.proposals) >= _MIN_ROUNDS
        problems = _problems(draws, previous)
        spent = rounds.num_evaluations + _NETS * StudentT.net_size > max_evaluations
        if (enough and not problems) or spent:
            break
        previous = draws
        if is_adapting:
            proposal = _matched(draws, proposal)
    if not enough:
        problems.append(_describe_errors(draws, tolerance))
    return rounds.weighted(tuple(problems))


class _Rounds:
    """All draws so far and the mixture that they came from."""

    def __init__(
        self, density_values: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> None:
        self.density_values, self.generator = density_values, generator
        self.proposals: list[StudentT] = []
        self.z = torch.empty(0)
        self.log_density = torch.empty(0)
        self.log_sum = torch.empty(0)  # log of the sum over rounds of the proposals' densities
        self.num_evaluations = 0

    def draw(self, proposal: StudentT) -> None:
        z = proposal.sample(_NETS * StudentT.net_size, self.generator)
        self.num_evaluations += len(z)
        values = self.density_values(z).detach().to(z)
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        log_sum = [q.log_prob(z) for q in (*self.proposals, proposal)]
        log_sum_new = torch.logsumexp(torch.stack(log_sum), 0)
        if self.proposals:
            self.log_sum = torch.logaddexp(self.log_sum, proposal.log_prob(self.z))
        self.proposals.append(proposal)
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
        count = _NETS * StudentT.net_size
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
        count = _NETS * StudentT.net_size
        self.z, self.log_density = self.z[-count:], self.log_density[-count:]
        self.log_sum = self.proposals[0].log_prob(self.z)

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


def _matched(draws: WeightedDraws, previous: StudentT) -> StudentT:
    """The next proposal: the moments of all draws, never narrower than the weights can tell."""
    size = draws.z.shape[1]
    power = temper(draws.log_weights, _DRAWS_PER_DIMENSION * size)
    flattened = power * draws.log_weights
    ess = float(effective_sample_size(flattened))
    mean, covariance = weighted_moments(draws.z, torch.softmax(flattened, 0))
    shrinkage = size / (size + ess)
    before = previous.scale_tril @ previous.scale_tril.T
    covariance = (1.0 - shrinkage) * covariance + shrinkage * before
    return StudentT(mean, torch.linalg.cholesky(covariance), previous.degrees_of_freedom)


def _is_precise(draws: WeightedDraws, tolerance: float) -> bool:
    return float(torch.maximum(draws.mean_error, draws.sd_error).max()) <= tolerance


def _problems(draws: WeightedDraws, previous: WeightedDraws | None) -> list[str]:
    """What speaks against the weights, in words."""
    found = []
    threshold = min(1.0 - 1.0 / math.log10(len(draws.z)), 0.7)
    if not draws.khat <= threshold:
        found.append(
            f"the weights' tail is too heavy (k-hat {draws.khat:.2f}, above {threshold:.2f}): the "
            "posterior has a shape, or tails, that no Student-t covers"
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


def _check(
    loc: Tensor,
    covariance: Tensor,
    tolerance: float,
    max_evaluations: int,
    degrees_of_freedom: float | None,
) -> Tensor:
    """Cholesky factor of a covariance that fits.

    Raises:
        ValueError: If anything does not.
    """
    if loc.dim() != 1 or covariance.shape != (len(loc), len(loc)):
        raise ValueError(
            f"expected loc of shape (D,) and covariance of shape (D, D); got {tuple(loc.shape)} "
            f"and {tuple(covariance.shape)}."
        )
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive; got {tolerance}.")
    if max_evaluations < 1:
        raise ValueError(f"max_evaluations must be at least 1; got {max_evaluations}.")
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
