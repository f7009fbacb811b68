"""PyMC: ``pm.fit(method="advi")``, and ``fit_dadvi`` of pymc-extras; compilation included."""

from __future__ import annotations

import logging
import time

import numpy as np
import pymc as pm
from pymc_extras.inference import fit_dadvi

from benchmarks.peers.contract import BySite, Fit, Task
from benchmarks.peers.pymc_models import MODELS
from benchmarks.problems import load

logging.getLogger("pymc").setLevel(logging.ERROR)


class _PyMC:
    def __init__(self, task: Task) -> None:
        self.task = task
        posterior = load(task.problem)
        if posterior.model.__name__ not in MODELS:
            raise SystemExit("no PyMC model")
        self.build = MODELS[posterior.model.__name__]
        self.args = [x.numpy() for x in posterior.args]

    def make(self) -> pm.Model:
        with pm.Model() as model:
            self.build(*self.args)
        return model

    def log_density(self, points: BySite) -> np.ndarray:
        model = self.make()
        logp = model.compile_logp()
        names = _names(model)
        rows = len(next(iter(points.values())))
        return np.array([logp({v: points[s][i] for v, s in names.items()}) for i in range(rows)])


class ADVI(_PyMC):
    """As many steps as the task says, of PyMC's default optimiser."""

    def fit(self) -> Fit:  # noqa: D102
        steps = self.task.steps
        begin = time.perf_counter()
        model = self.make()
        approximation = pm.fit(
            steps, method="advi", model=model, random_seed=self.task.seed, progressbar=False
        )
        mean, sd = approximation.mean.eval(), approximation.std.eval()
        seconds = time.perf_counter() - begin
        names = _names(model)
        slices = {
            names[name]: (part, shape)
            for name, part, shape, _ in approximation.groups[0].ordering.values()
        }
        loc, scale = (
            {site: flat[part].reshape(shape) for site, (part, shape) in slices.items()}
            for flat in (mean, sd)
        )
        return Fit(seconds, steps, 1, loc, scale, f"{steps:,} steps")


class DADVI(_PyMC):
    """Fixed draws and a trust region: the nearest relative of our deterministic solver."""

    draws = 30  # its default

    def fit(self) -> Fit:  # noqa: D102
        begin = time.perf_counter()
        model = self.make()
        with model:
            data = fit_dadvi(
                n_fixed_draws=self.draws, random_seed=self.task.seed, progressbar=False
            )
        seconds = time.perf_counter() - begin
        result = data.optimizer_result
        loc, log_sd = np.split(result["x"].to_numpy(), 2)
        locs: BySite = {}
        sds: BySite = {}
        point = model.initial_point()
        start = 0
        for name, site in _names(model).items():
            shape = np.shape(point[name])
            stop = start + int(np.prod(shape))
            locs[site] = loc[start:stop].reshape(shape)
            sds[site] = np.exp(log_sd[start:stop]).reshape(shape)
            start = stop
        count = sum(int(result[k]) for k in ("njev", "nhev") if k in result)
        stopped = "converged" if bool(result["success"]) else "not converged"
        return Fit(seconds, count, self.draws, locs, sds, stopped)


def _names(model: pm.Model) -> dict[str, str]:
    """Sites by the names of their unconstrained variables, in PyMC's order."""
    sites = {model.rvs_to_values[rv].name: rv.name for rv in model.free_RVs}
    return {v.name: sites[v.name] for v in model.continuous_value_vars}
