"""The approximation's draws, reweighted to be the posterior's, where that can be done."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import KhatWarning
from pyro_mf.convert.from_pyro import from_pyro
from pyro_mf.density.log_joint import LogJoint
from pyro_mf.diagnostics.proposals import Draw, weigh
from pyro_mf.weights import MIN_DRAWS, psis

_PROPOSALS_PER_DRAW = 10
_MIN_PROPOSALS = 4000
_FEW = 0.5  # share of distinct draws below which it is worth a word


@dataclass(frozen=True, eq=False)
class ImportanceResample:
    """Draws of the posterior by resampling; see :func:`importance_resample`.

    Args:
        log_joint: The model on its full data.
        z: The draws on the unconstrained space, in random order, shape ``(S, D)``.
        khat: k-hat of the weights.
        khat_se: Its standard error.
        threshold: Largest k-hat at which averages over the draws can be depended on.
        ess: Effective number of proposals under the smoothed weights.
        num_proposals: Number of proposals.
        num_distinct: Number of different draws among the S.
        notes: What speaks against using them, in sentences.
    """

    log_joint: LogJoint = field(repr=False)
    z: Tensor = field(repr=False)
    khat: float
    khat_se: float
    threshold: float
    ess: float
    num_proposals: int
    num_distinct: int
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether ``khat`` is at most ``threshold``."""
        return self.khat <= self.threshold

    @property
    def samples(self) -> dict[str, Tensor]:
        """Draws of every continuous latent site in the model's space, ``(S, *shape)``."""
        return self.log_joint.constrain(self.z)

    def to_arviz(self, *, num_chains: int = 4, **kwargs: Any) -> Any:
        """Convert for ArviZ; attributes of the posterior say that it is resampled.

        Args:
            num_chains: Number of chains that the draws are cut into. They are not Markov chains:
                R-hat and effective sample sizes of them say nothing.
            **kwargs: As for :func:`pyro_mf.from_pyro`.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x), whose posterior has the
            attributes ``is_resampled`` (1), ``khat``, ``khat_threshold`` and
            ``importance_sampling_ess``.

        Raises:
            ValueError: If the draws cannot be cut into so many chains of one length.
        """
        if num_chains < 1 or len(self.z) % num_chains:
            raise ValueError(
                f"{len(self.z)} draws cannot be cut into {num_chains} chains of one length. Choose "
                "a num_chains that divides them."
            )
        own = {
            "inference_method": "importance_resampling",
            "is_resampled": 1,
            "is_approximate": 1,
            "khat": self.khat,
            "khat_threshold": self.threshold,
            "importance_sampling_ess": self.ess,
        }
        return from_pyro(
            self.log_joint.constrain(self.z.unflatten(0, (num_chains, -1))),
            model=self.log_joint.model,
            model_args=self.log_joint.model_args,
            model_kwargs=self.log_joint.model_kwargs,
            **kwargs | {"attrs": own | dict(kwargs.get("attrs") or {})},
        )


@torch.no_grad()
def importance_resample(
    log_joint: LogJoint,
    draw: Draw,
    *,
    num_draws: int = 1000,
    num_proposals: int | None = None,
    seed: int = 0,
) -> ImportanceResample:
    r"""Draws of the posterior: proposals resampled by their Pareto-smoothed importance weights.

    Resampling is systematic: a proposal of weight w is taken :math:`\lfloor S w \rfloor` or
    :math:`\lceil S w \rceil` times, so none is repeated more than its weight asks for.

    Cost: one density value per proposal. Where it lies: k-hat sees only what the proposals reach. A
    mode far from all of them is missed, with a good k-hat.

    Args:
        log_joint: The model on its full data.
        draw: Makes proposals; see :func:`~pyro_mf.diagnostics.proposals.guide_proposal` and
            :func:`~pyro_mf.diagnostics.proposals.response_proposal`.
        num_draws: Number of draws S, at least 1.
        num_proposals: Number of proposals, at least 25; by default ten per draw and at least 4000.
        seed: Seed of proposals and resampling.

    Raises:
        ValueError: If a number is too small, a log weight is NaN or ``+inf``, or all weights are
            zero.

    Warns:
        KhatWarning: If k-hat is above its threshold: averages over the draws are then not those of
            the posterior.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.diagnostics.proposals import response_proposal
        >>> from pyro_mf.solvers.linear_response import LinearResponse
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> wide = response_proposal(LinearResponse(torch.zeros(1), 2.0 * torch.eye(1)))
        >>> found = importance_resample(LogJoint(model), wide, num_draws=400)
        >>> found.good, found.samples["z"].shape
        (True, torch.Size([400]))

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto Smoothed Importance Sampling,
        https://arxiv.org/abs/1507.02646
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
    if num_proposals is None:
        num_proposals = max(_PROPOSALS_PER_DRAW * num_draws, _MIN_PROPOSALS)
    if num_proposals < MIN_DRAWS:
        raise ValueError(
            f"num_proposals must be at least {MIN_DRAWS}, to see a tail of weights; got "
            f"{num_proposals}."
        )
    z, log_weights = weigh(log_joint, draw, num_proposals, seed)
    smoothed = psis(log_weights)
    generator = torch.Generator().manual_seed(seed + 1)  # not the stream of the proposals
    rows = systematic(smoothed.log_weights.exp().cpu(), num_draws, generator)
    rows = rows[torch.randperm(num_draws, generator=generator)]
    found = ImportanceResample(
        log_joint=log_joint,
        z=z[rows.to(z.device)],
        khat=smoothed.khat,
        khat_se=smoothed.khat_se,
        threshold=smoothed.threshold,
        ess=smoothed.ess,
        num_proposals=num_proposals,
        num_distinct=len(rows.unique()),
    )
    notes = _notes(found)
    if not found.good:
        warnings.warn(notes[0], KhatWarning, stacklevel=3)  # past no_grad's wrapper
    object.__setattr__(found, "notes", notes)  # before anyone else sees it
    return found


def systematic(weights: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Choose rows by weight, each as often as its weight says, up to one more or less.

    Args:
        weights: Weights that sum to one, shape ``(S,)``.
        num: Number of rows to choose.
        generator: Source of randomness.

    Returns:
        Row numbers in ascending order, shape ``(num,)``.

    Example:
        >>> systematic(torch.tensor([0.5, 0.0, 0.5]), 4, torch.Generator().manual_seed(0))
        tensor([0, 0, 2, 2])
    """
    start = torch.rand((), generator=generator, dtype=weights.dtype)
    points = (torch.arange(num, dtype=weights.dtype) + start) / num
    edges = weights.cumsum(0)
    last = int(weights.nonzero()[-1])  # rounding leaves the sum below one
    return torch.searchsorted(edges / edges[-1], points, right=True).clamp(max=last)


def _notes(found: ImportanceResample) -> tuple[str, ...]:
    notes = []
    if not found.good:
        notes.append(
            f"k-hat of the importance weights is {found.khat:.2f} \u00b1 {found.khat_se:.2f}, "
            f"above {found.threshold:.2f}: the {len(found.z)} resampled draws cannot be taken for "
            "draws of the posterior. Try a proposal that is nearer to it (linear response in place "
            "of the mean-field guide, or fit(..., objective=ForwardKL())), and more proposals "
            "where k-hat is only just above. Marginals may be good all the same: see site_khats."
        )
    if found.num_distinct < _FEW * len(found.z):
        notes.append(
            f"only {found.num_distinct} of the {len(found.z)} draws are different. Raise "
            "num_proposals."
        )
    return tuple(notes)
