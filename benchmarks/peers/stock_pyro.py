"""Stock Pyro: ``AutoNormal`` with ``Trace_ELBO``, until its ELBO is within 0.1 nat of ours."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.peers.contract import BySite, Fit, Task
from benchmarks.problems import load
from benchmarks.scoring import elbo
from pyro_mf.density import Layout, LogJoint

WITHIN = 0.1  # nats
DECAY = 0.1 ** (1 / 10_000)  # tenfold in 10,000 steps
CHECK_DRAWS = 1000


class StockPyro:
    """``SVI.step`` in a loop; what it takes to look at the ELBO is not counted."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.posterior = load(task.problem)
        self.log_joint = LogJoint(self.posterior.model, self.posterior.args)
        self.target = -np.inf
        if task.target is not None:
            self.target = self._elbo(*(self._pack(part) for part in task.target.values()))

    def fit(self) -> Fit:  # noqa: D102
        pyro.clear_param_store()
        pyro.set_rng_seed(self.task.seed)
        seconds, steps, stopped = 0.0, 0, "limit"
        layout = self.log_joint.layout
        begin = time.perf_counter()
        guide = AutoNormal(self.posterior.model, init_loc_fn=start_anywhere)
        optim = (
            pyro.optim.ClippedAdam({"lr": 0.01, "lrd": DECAY, "clip_norm": float("inf")})
            if self.task.decays
            else pyro.optim.Adam({"lr": 0.01})
        )
        svi = SVI(self.posterior.model, guide, optim, loss=Trace_ELBO())
        seconds += time.perf_counter() - begin
        while seconds < self.task.limit:
            begin = time.perf_counter()
            for _ in range(max(200, steps // 20)):
                svi.step(*self.posterior.args)
                steps += 1
                if seconds + time.perf_counter() - begin > self.task.limit:
                    break
            seconds += time.perf_counter() - begin
            if self._elbo(*flat_params(guide, layout)) >= self.target - WITHIN:
                stopped = "as good"
                break
        loc, sd = (
            self.log_joint.layout.unpack(x) for x in flat_params(guide, self.log_joint.layout)
        )
        return Fit(seconds, steps, 1, _numpy(loc), _numpy(sd), stopped)

    def log_density(self, points: BySite) -> None:
        """The model is ours."""

    def _elbo(self, loc: Tensor, sd: Tensor) -> float:
        """On the same draws for them and for us, so that their noise cancels in the difference."""
        return elbo(self.log_joint, loc, sd, num_draws=CHECK_DRAWS, seed=1).value

    def _pack(self, by_site: dict[str, list]) -> Tensor:
        layout = self.log_joint.layout
        tensors = {s.name: torch.tensor(by_site[s.name]) for s in layout.sites}
        return layout.pack(tensors)


def start_anywhere(site: dict[str, Any]) -> Tensor:
    """Pyro's default, but for improper priors, from which it cannot draw."""
    fn = site["fn"]
    if isinstance(fn, dist.ImproperUniform):
        transform = biject_to(fn.support)
        return transform(torch.zeros(transform.inverse_shape(fn.shape())))
    return init_to_feasible(site)


def flat_params(guide: AutoNormal, layout: Layout) -> tuple[Tensor, Tensor]:
    """Location and scale of a stock guide, in the order of a layout."""
    loc, sd = (
        layout.pack({s.name: _attribute(owner, s.name) for s in layout.sites})
        for owner in (guide.locs, guide.scales)
    )
    return loc.detach().clone(), sd.detach().clone()


def _attribute(owner: object, name: str) -> Tensor:
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner  # type: ignore[return-value]


def _numpy(values: dict[str, Tensor]) -> BySite:
    return {name: value.numpy() for name, value in values.items()}
