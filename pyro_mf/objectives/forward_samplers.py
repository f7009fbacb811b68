"""Estimators of forward KL whose draws do not come from the fitted family: HMC and tempered SMC.

They are what works where latents are correlated and many: no mean-field family is a usable
proposal there, not even the best one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf._errors import EstimatorWarning, ModelError
from pyro_mf.density.prior import Prior
from pyro_mf.kernels import HMCState, Metric, ParallelHMC, initialise
from pyro_mf.kernels.tempering import tempered_smc
from pyro_mf.objectives.forward_estimators import Draws, Setting, seeded

# Up to this many latents the metric knows correlations.
_MAX_DENSE = 300
_WARM_UP = 200
# Step sizes are found anew where the acceptance of so many transitions is below this.
_WATCHED, _MIN_ACCEPTANCE = 25, 0.5
_RENEWAL, _MAX_RENEWALS = 60, 4


class HamiltonianChains:
    """Parallel HMC chains, one transition per step, however far the guide is from the posterior.

    The chains warm up at the first step, from draws of the guide and with its widths as metric.
    """

    is_chain = True

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.draws: Draws | None = None
        self._is_warm = False
        self._accepted: list[float] = []
        self._num_renewals = 0
        density, scorer, _, count, generator = setting
        with seeded(generator):
            start = scorer.sample(max(count, 16))
        loc, scale = start.mean(0), start.std(0)
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
        metric = Metric(scale.diag() if len(loc) <= _MAX_DENSE else scale)
        value_and_grad = density.value_and_grad
        z = initialise(value_and_grad, loc, metric, count, generator=generator)
        self.chains = ParallelHMC(value_and_grad, z, metric, generator=generator)

    def advance(self, *, target_changed: bool) -> Draws:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        chains = self.chains
        if target_changed:
            chains.state = HMCState.at(chains.density, chains.state.z)
            chains.num_gradients += 1
        if not self._is_warm:
            chains.warm_up(_WARM_UP)
            self._is_warm = True
        chains.sample(1)
        self._accepted = [*self._accepted[1 - _WATCHED :], float(chains.acceptance.mean())]
        is_known = len(self._accepted) == _WATCHED
        if is_known and self.acceptance < _MIN_ACCEPTANCE and self._num_renewals < _MAX_RENEWALS:
            chains.warm_up(_RENEWAL)
            self._num_renewals += 1
            self._accepted = []
        return self._read()

    def _read(self) -> Draws:
        z = self.chains.state.z
        self.draws = Draws(z, z.new_full((len(z),), 1.0 / len(z)))
        return self.draws

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability of the last transitions."""
        return sum(self._accepted) / len(self._accepted) if self._accepted else float("nan")

    @property
    def num_evaluations(self) -> int:
        """Rows at which the density was evaluated, which is with its gradient."""
        return self.num_gradients

    @property
    def num_gradients(self) -> int:
        """Rows at which the gradient was evaluated."""
        return self.chains.num_gradients * self._setting.num_particles

    def recent_log_weights(self) -> Tensor | None:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        return {
            "chains": self.chains.state_dict(),
            "is_warm": self._is_warm,
            "accepted": list(self._accepted),
            "num_renewals": self._num_renewals,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        generator = self.chains.generator.get_state()  # all pairs share one, which is loaded apart
        self.chains.load_state_dict(dict(state["chains"]))
        self.chains.generator.set_state(generator)
        self._is_warm = bool(state["is_warm"])
        self._accepted = list(state["accepted"])
        self._num_renewals = int(state["num_renewals"])
        if self._is_warm:
            self._read()


class TemperedParticles:
    """Particles of a tempered SMC run at the first step, a weighted choice of which is each step's.

    The particles stay: what they miss, or have too much of by chance, the fit has too.
    """

    is_chain = True
    acceptance = float("nan")

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.draws: Draws | None = None
        self._pool: Draws | None = None
        self.num_gradients = 0

    def advance(self, *, target_changed: bool) -> Draws:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`.

        Raises:
            ModelError: If the model has learnable parameters.
        """
        if target_changed:
            raise ModelError(
                "estimator='smc' draws from the posterior once, and the model has learnable "
                "parameters, with which the posterior changes at every step. Use "
                "estimator='hmc', or hold them fixed."
            )
        if self._pool is None:
            self._pool = self._fill()
        count, generator = self._setting.num_particles, self._setting.generator
        weights = self._pool.weights
        picked = torch.multinomial(weights, count, replacement=True, generator=generator)
        self.draws = Draws(self._pool.z[picked], torch.full((count,), 1.0 / count).to(weights))
        return self.draws

    def _fill(self) -> Draws:
        density, generator = self._setting.density, self._setting.generator
        found = tempered_smc(density.value_and_grad, Prior(density.log_joint), generator=generator)
        self.num_gradients = found.num_evaluations
        if not found.trusted:
            warnings.warn(
                f"the particles of estimator='smc' should not be trusted: "
                f"{'; '.join(found.problems)}.",
                EstimatorWarning,
                stacklevel=2,
            )
        return Draws(found.z, found.weights)

    @property
    def num_evaluations(self) -> int:
        """Rows at which the density was evaluated, which is with its gradient."""
        return self.num_gradients

    def recent_log_weights(self) -> Tensor | None:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        state: dict[str, Any] = {"num_gradients": self.num_gradients}
        for name, draws in (("pool", self._pool), ("draws", self.draws)):
            if draws is not None:
                state[name] = {"z": draws.z.clone(), "weights": draws.weights.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`~pyro_mf.objectives.forward_estimators.Estimator`."""
        self.num_gradients = int(state["num_gradients"])
        pool, draws = state.get("pool"), state.get("draws")
        self._pool = None if pool is None else Draws(**pool)
        self.draws = None if draws is None else Draws(**draws)
