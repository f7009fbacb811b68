"""Pyro's own NUTS kernel on the captured density, one chain after another in this process.

``pyro.infer.MCMC`` sends its kernel to worker processes, and a captured graph does not pickle; it
also loses everything on Ctrl-C. So the kernel is driven here through its public methods.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS
from torch import Tensor
from tqdm.auto import tqdm

from pyro_mf import _pyro
from pyro_mf.baselines.draws import Draws, Settings, largest_block
from pyro_mf.baselines.target import Density, Target

STATS = {
    "lp": np.float64,
    "acceptance_rate": np.float64,
    "step_size": np.float64,
    "n_steps": np.int64,
    "tree_depth": np.int64,
}


def sample_pyro(density: Density, starts: Tensor, settings: Settings) -> Draws:
    """Run Pyro's NUTS.

    Args:
        density: The log joint.
        starts: One starting point per chain, unconstrained, shape ``(chains, D)``.
        settings: What to run.

    Raises:
        KeyboardInterrupt: If Ctrl-C came before the first draw.
    """
    chains = [_Chain(settings.num_samples, start) for start in starts]
    seeds = np.random.SeedSequence(settings.seed).generate_state(settings.num_chains)
    total = settings.num_chains * (settings.warmup_steps + settings.num_samples)
    interrupted = False
    with (
        tqdm(total=total, disable=not settings.progress, desc="NUTS (pyro)") as bar,
        # Divergent steps leave the support on purpose; the sampler's own draws are nobody's sites.
        pyro.validation_enabled(False),
        poutine.block(),
        torch.random.fork_rng(devices=[starts.device] if starts.is_cuda else []),
    ):
        try:
            for chain, seed in zip(chains, seeds, strict=True):
                torch.manual_seed(int(seed))
                chain.run(Target(density), settings, bar)
        except KeyboardInterrupt:
            interrupted = True
    return _collect(chains, interrupted=interrupted)


class _Potential(torch.autograd.Function):
    """The potential energy, ``-log p``, with the captured gradient in place of autograd's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Target) -> Tensor:
        value, gradient = target(z.detach())
        ctx.save_for_backward(gradient)
        return -value

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return -outputs[0] * gradient, None


@dataclass
class _Chain:
    """One chain: where it starts, and the draws it has made so far."""

    num_samples: int
    start: Tensor
    length: int = 0
    z: Tensor = field(init=False)
    stats: dict[str, np.ndarray] = field(init=False)
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.z = self.start.new_empty(self.num_samples, len(self.start))
        self.stats = {name: np.zeros(self.num_samples, dtype) for name, dtype in STATS.items()}
        self.stats["diverging"] = np.zeros(self.num_samples, bool)
        self.seconds = {"warmup": 0.0, "sample": 0.0}

    def run(self, target: Target, settings: Settings, bar: Any) -> None:
        kernel = NUTS(
            potential_fn=lambda sites: _Potential.apply(sites["z"], target),  # type: ignore[no-untyped-call]
            target_accept_prob=settings.target_accept_prob,
            max_tree_depth=settings.max_tree_depth,
        )
        kernel.initial_params = {"z": self.start.clone()}
        begin = time.perf_counter()
        kernel.setup(settings.warmup_steps)
        sites = kernel.initial_params
        for _ in range(settings.warmup_steps):
            sites = kernel.sample(sites)
            bar.update()
        middle = time.perf_counter()
        self.seconds["warmup"] = middle - begin
        try:
            for _ in range(self.num_samples):
                before = target.evaluations
                sites = kernel.sample(sites)
                self._record(kernel, sites["z"], target.evaluations - before)
                bar.update()
        finally:
            if self.length:
                self.stats["diverging"][kernel.diagnostics()["divergences"]] = True
            self.seconds["sample"] = time.perf_counter() - middle

    def _record(self, kernel: NUTS, z: Tensor, n_steps: int) -> None:
        i = self.length
        log_joint, mean_accept_prob = _pyro.nuts_state(kernel)
        self.z[i] = z.detach()
        self.stats["lp"][i] = log_joint
        self.stats["step_size"][i] = kernel.step_size
        self.stats["n_steps"][i] = n_steps
        self.stats["tree_depth"][i] = n_steps.bit_length()  # 2^d - 1 steps complete a tree
        self.stats["acceptance_rate"][i] = mean_accept_prob  # the running mean, resolved below
        self.length += 1


def _collect(chains: list[_Chain], *, interrupted: bool) -> Draws:
    kept, length = largest_block([chain.length for chain in chains])
    if length == 0:
        raise KeyboardInterrupt
    stats = {
        name: np.stack([chains[i].stats[name][:length] for i in kept]) for name in chains[0].stats
    }
    stats["acceptance_rate"] = _resolve_means(stats["acceptance_rate"])
    return Draws(
        z=torch.stack([chains[i].z[:length] for i in kept]),
        stats=stats,
        seconds={k: sum(chain.seconds[k] for chain in chains) for k in ("warmup", "sample")},
        interrupted=interrupted,
    )


def _resolve_means(means: np.ndarray) -> np.ndarray:
    """The probabilities whose running means along the last axis are given."""
    sums = means * np.arange(1, means.shape[-1] + 1)
    return np.diff(sums, axis=-1, prepend=0.0).clip(0.0, 1.0)  # rounding leaves it by 1e-13
