"""What the draws behind a forward KL say about themselves, and when to warn of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf.kernels.mixing import measure_mixing
from pyro_mf.objectives.forward_estimators import Draws
from pyro_mf.weights import effective_sample_size, psis

# Steps after which the draws are looked at; each look is at what came since the one before.
_LOOKS = frozenset({200, 1000, 5000, 25_000, 125_000})
# States of so many steps are kept for R-hat, fewer where they are large.
_MAX_STEPS, _MIN_STEPS, _MAX_ELEMENTS = 200, 8, 2**22
_MIN_ACCEPTANCE, _MAX_RHAT, _MAX_KHAT, _MIN_ESS = 0.1, 1.2, 0.7, 2.0
_MIN_WEIGHTS = 25


@dataclass(frozen=True)
class ForwardDiagnostics:
    """How the last draws of a :class:`~pyro_mf.ForwardKL` were made, and how good they are.

    Args:
        estimator: The estimator in use.
        reason: Why it is in use.
        num_steps: Steps taken with this model, guide and data.
        num_evaluations: Draws at which the model's density was evaluated.
        num_gradients: Draws at which its gradient was, too.
        acceptance: Share of proposals taken lately; NaN where there are none.
        ess: Effective sample size of the last draws' weights.
        khat: Pareto index of the latest importance weights; NaN where there are none.
        rhat: Largest split R-hat of latents and their squares over the latest steps; NaN where
            there are no parallel chains, or they are too young.
        num_stuck: Chains that hardly move, or stay away from the others.
    """

    estimator: str
    reason: str
    num_steps: int
    num_evaluations: int
    num_gradients: int
    acceptance: float
    ess: float
    khat: float
    rhat: float
    num_stuck: int


class Watch:
    """Remembers the latest draws of an estimator.

    Args:
        name: The estimator's name.
        reason: Why it is in use.

    Attributes:
        has_warned: Whether somebody was warned of a fault already.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        self.num_steps = 0
        self._states: deque[Tensor] = deque(maxlen=_MAX_STEPS)
        self._ess = float("nan")
        self._mean_ess = float("nan")
        self.has_warned = False

    def see(self, draws: Draws, *, is_chain: bool) -> None:
        """Take note of one step's draws.

        Args:
            draws: The draws.
            is_chain: Whether their rows are the states of parallel chains.
        """
        self.num_steps += 1
        self.see_weights(draws.weights)
        if is_chain:
            if not self._states:
                most = max(_MIN_STEPS, min(_MAX_STEPS, _MAX_ELEMENTS // draws.z.numel()))
                self._states = deque(maxlen=most)
            self._states.append(draws.z)

    def see_weights(self, weights: Tensor) -> None:
        """Take note of weights alone, shape ``(S, ...)``."""
        self._ess = float(effective_sample_size(weights.log()).min())
        rate = 1.0 / min(max(self.num_steps, 1), 100)
        old = self._ess if self.num_steps <= 1 else self._mean_ess
        self._mean_ess = old + rate * (self._ess - old)

    def report(
        self, *, acceptance: float, log_weights: Tensor | None, counts: tuple[int, int]
    ) -> ForwardDiagnostics:
        """All that is known.

        Args:
            acceptance: Share of proposals taken.
            log_weights: Log importance weights of recent draws.
            counts: Evaluations of the density, and of its gradient.
        """
        rhat, num_stuck = float("nan"), 0
        if len(self._states) >= _MIN_STEPS:
            found = measure_mixing(torch.stack(tuple(self._states)))
            rhat, num_stuck = found.worst_rhat, len(found.stuck)
        khat = float("nan")
        if log_weights is not None and len(log_weights) >= _MIN_WEIGHTS:
            khat = psis(log_weights.nan_to_num(nan=-torch.inf)).khat
        return ForwardDiagnostics(
            estimator=self.name,
            reason=self.reason,
            num_steps=self.num_steps,
            num_evaluations=counts[0],
            num_gradients=counts[1],
            acceptance=acceptance,
            ess=self._ess,
            khat=khat,
            rhat=rhat,
            num_stuck=num_stuck,
        )

    @property
    def is_time_to_look(self) -> bool:
        """Whether this step's draws are to be judged: seldom, and until a warning was given."""
        return self.num_steps in _LOOKS and not self.has_warned

    def fault(self, found: ForwardDiagnostics) -> str | None:
        """What is wrong with the draws, in words; ``None`` where nothing is."""
        text = None
        if found.acceptance < _MIN_ACCEPTANCE:
            text = (
                f"only {found.acceptance:.1%} of the proposals of estimator='{self.name}' were "
                f"accepted lately (below {_MIN_ACCEPTANCE:.0%}), so its chains hardly move"
            )
        elif found.rhat > _MAX_RHAT or found.num_stuck:
            text = (
                f"the chains of estimator='{self.name}' do not agree: R-hat is {found.rhat:.2f} "
                f"over the last {len(self._states)} steps (above {_MAX_RHAT}), and "
                f"{found.num_stuck} of {len(self._states[0])} hardly move or stay in another mode"
            )
        elif uneven := self._unevenness(found):
            text = (
                f"the importance weights of estimator='{self.name}' are too uneven: {uneven}, so "
                "the fit is narrower than forward KL's optimum"
            )
        return text

    def _unevenness(self, found: ForwardDiagnostics) -> str:
        parts = []
        # At first proposals are poor because the guide is still on its way.
        is_early = self.name != "snis" and self.num_steps <= min(_LOOKS)
        if found.khat > _MAX_KHAT and not is_early:
            parts.append(f"k-hat is {found.khat:.2f} (above {_MAX_KHAT})")
        if self.name == "snis" and self._mean_ess < _MIN_ESS:
            parts.append(
                f"the draws of a step are worth {self._mean_ess:.1f} (below {_MIN_ESS:.0f})"
            )
        return " and ".join(parts)
