"""NumPyro: ``SVI.run`` with ``AutoNormal`` and ``Trace_ELBO``, compilation included."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import initialize_model

from benchmarks.peers.contract import BySite, Fit, Task
from benchmarks.peers.numpyro_models import MODELS
from benchmarks.problems import load

numpyro.enable_x64()


class NumPyro:
    """As many steps of Adam as the task says, the step size decaying to a hundredth or constant."""

    def __init__(self, task: Task) -> None:
        self.task = task
        posterior = load(task.problem)
        self.model = MODELS[posterior.model.__name__]
        arrays = [x.numpy() for x in posterior.args]
        # Single numbers are static: some are sizes.
        self.args = [jnp.asarray(x) if x.ndim else x.item() for x in arrays]

    def fit(self) -> Fit:  # noqa: D102
        steps = self.task.steps
        begin = time.perf_counter()
        guide = AutoNormal(self.model)
        step_size = (lambda i: 0.01 * 0.01 ** (i / steps)) if self.task.decays else 0.01
        svi = SVI(self.model, guide, numpyro.optim.Adam(step_size), Trace_ELBO())
        key = jax.random.PRNGKey(self.task.seed)
        params = svi.run(key, steps, *self.args, progress_bar=False).params
        found = {name: np.asarray(value) for name, value in params.items()}
        seconds = time.perf_counter() - begin
        loc, sd = (
            {k.removesuffix(end): v for k, v in found.items() if k.endswith(end)}
            for end in ("_auto_loc", "_auto_scale")
        )
        return Fit(seconds, steps, 1, loc, sd, f"{steps:,} steps")

    def log_density(self, points: BySite) -> np.ndarray:  # noqa: D102
        info = initialize_model(jax.random.PRNGKey(0), self.model, model_args=tuple(self.args))
        rows = len(next(iter(points.values())))
        found = []
        for i in range(rows):
            row = {name: jnp.asarray(value[i]) for name, value in points.items()}
            found.append(-float(info.potential_fn(row)))
        return np.array(found)
