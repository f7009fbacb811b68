r"""The deterministic solver for guides with factors of both continuous and discrete sites.

Given draws of the continuous latents, the factors of the discrete ones (labels) have an optimum
that coordinate ascent finds without steps. So they are profiled out: the ELBO over fixed noise,

.. math:: F(\lambda) = \max_{q(k)} \frac1S \sum_s \mathbb{E}_{q(k)} \log p(x, z_s(\lambda), k) +
    H(q(k)) + H(q_\lambda(z)),

is a function of the continuous factors' parameters alone. By the envelope theorem its gradient is
that at the labels' optimum held fixed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf._pyro import Packed
from pyro_mf.density import LogJoint
from pyro_mf.density.blocks import Blocks
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.objectives.labelled import LabelledJoint
from pyro_mf.solvers.coordinate_ascent import (
    LEAST_LOG_PROB,
    entropy_of,
    update_all,
    write_factors,
)
from pyro_mf.solvers.family_elbo import FamilyELBO
from pyro_mf.solvers.fixed_draw_elbo import estimate_from
from pyro_mf.solvers.meter import Meter
from pyro_mf.solvers.outcome import Outcome, Report, silent
from pyro_mf.solvers.pathwise import solve_pathwise

_MAX_SWEEPS, _CHANGE = 1000, 1e-10  # of the labels' factors at each point, and of a probability
_DRAWS, _COSTLY_DRAWS = 1024, 256
_REFUSAL = "it is not known for continuous latents beside factors of discrete ones"


def solve_with_labels(
    log_joint: LogJoint,
    guide: DiscreteGuide,
    *,
    seed: int = 0,
    report: Report = silent,
    **options: Any,
) -> Outcome:
    """Maximise the ELBO over factors of continuous sites and of labels together.

    The start is the optimum of Normal factors with the labels summed out.

    Args:
        log_joint: The density, of the full data, in which all discrete sites are summed out.
        guide: A guide with factors of both, set up; it gets the optimum. Its labels' factors are
            where coordinate ascent starts.
        seed: Seed of all draws; the same seed gives the same bits.
        report: Called with the progress.
        options: More for :func:`~pyro_mf.solvers.pathwise.solve_pathwise`.

    Returns:
        The outcome; the ELBO is at draws that nothing was fitted to.

    Raises:
        ModelError: If no finite starting point was found.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(loc + 4 * k, 1.0), obs=x)
        >>> data = (torch.tensor([0.0, 4.0, 0.0, 4.0]),)
        >>> guide = AutoMeanField(model, {"k": "bernoulli"}).setup(*data)
        >>> outcome = solve_with_labels(LogJoint(model, data), guide)
        >>> outcome.stop_reason, guide.probs("k").argmax(-1).tolist()
        ('converged', [0, 1, 0, 1])
    """
    labels = Labels(log_joint, guide)
    outcome = solve_pathwise(
        log_joint,
        guide,
        seed=seed,
        report=report,
        evaluate=labels.value_and_grad,
        make_elbo=partial(ProfiledELBO, labels),
        **options,
    )
    blocks = Blocks(log_joint, labels.value_and_grad)
    count = _COSTLY_DRAWS if blocks.is_costly else _DRAWS
    # Labels are set at other draws than those that the continuous factors were fitted to, and the
    # ELBO is that at yet others.
    draws = [
        FamilyELBO(blocks, guide, count, seed=seed + more, meter=Meter(1, silent))
        for more in (2_000_003, 3_000_017)
    ]
    x = draws[0].flatten(guide.flat_params())
    labels.settle(draws[0].draws(x))
    labels.write(guide)
    elbo = estimate_from(draws[1].pair_elbos(x))
    return replace(outcome, elbo=elbo.elbo, elbo_se=elbo.se, response=None, refusal=_REFUSAL)


class Labels:
    """Factors of discrete sites at their optimum given draws of the continuous latents.

    Args:
        log_joint: The density.
        guide: The guide, whose factors are the start.
    """

    def __init__(self, log_joint: LogJoint, guide: DiscreteGuide) -> None:
        self._log_joint = log_joint
        sites = guide.discrete_sites
        self._joint = LabelledJoint(log_joint, [site.name for site in sites])
        logits = (p.detach() for p in guide.discrete_params())
        factors = {s.name: s.distribution(p) for s, p in zip(sites, logits, strict=True)}
        self._probs = self._joint.probs(factors)
        self._log_probs = {
            symbol: Packed(p.value.log().clamp_min(LEAST_LOG_PROB), p.dims)
            for symbol, p in self._probs.items()
        }
        self._entropy = entropy_of(self._probs, self._log_probs)

    @torch.no_grad()
    def settle(self, z: Tensor) -> None:
        """Go to the optimum at draws ``(S, D)``; stay where there is none."""
        mean = self._joint.mean(z.to(self._log_joint.device, self._log_joint.dtype))
        if any(bool((t.value.isnan() | (t.value == math.inf)).any()) for t in mean.terms):
            return
        try:
            for _ in range(_MAX_SWEEPS):
                if update_all(mean, self._probs, self._log_probs) <= _CHANGE:
                    break
        except NonFiniteError:
            return
        self._entropy = entropy_of(self._probs, self._log_probs)

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Expected log joint plus the labels' entropy at draws ``(S, D)``, and its gradient."""
        value, gradient = self._joint.value_and_grad(z, self._probs)
        return value + self._entropy, gradient

    def write(self, guide: DiscreteGuide) -> None:
        """Write the factors into a guide."""
        write_factors(guide, self._joint.nodes, self._log_probs)


class ProfiledELBO(FamilyELBO):
    """An ELBO over fixed noise at the labels' optimum.

    Args:
        labels: The labels' factors.
        blocks: The expected log joint under them, with their entropy.
        args: More for :class:`FamilyELBO`.
        kwargs: More for :class:`FamilyELBO`.
    """

    def __init__(self, labels: Labels, blocks: Blocks, *args: Any, **kwargs: Any) -> None:
        super().__init__(blocks, *args, **kwargs)
        self._labels = labels

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """As in :class:`FamilyELBO`."""
        self._labels.settle(self.draws(x))
        return super().value_and_gradient(x)

    def pair_elbos(self, x: Tensor) -> Tensor:
        """As in :class:`FamilyELBO`."""
        self._labels.settle(self.draws(x))
        return super().pair_elbos(x)
