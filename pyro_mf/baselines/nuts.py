"""``run_nuts``: what every approximation is compared with."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Literal

from pyro_mf._errors import ModelError
from pyro_mf.baselines.draws import Settings
from pyro_mf.baselines.nutpie_nuts import sample_nutpie
from pyro_mf.baselines.pyro_nuts import sample_pyro
from pyro_mf.baselines.result import NUTSResult
from pyro_mf.density import LogJoint

NUTSBackend = Literal["auto", "nutpie", "pyro"]
_SAMPLERS = {"nutpie": sample_nutpie, "pyro": sample_pyro}


# A tree of depth three: what an easy posterior takes, and the least that is to be expected.
_GRADIENTS_PER_DRAW = 8


def run_nuts(
    model: Callable[..., Any],
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int = 1000,
    warmup_steps: int = 1000,
    num_chains: int = 4,
    backend: NUTSBackend = "auto",
    target_accept_prob: float = 0.8,
    max_tree_depth: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> NUTSResult:
    """Sample a model's posterior with the No-U-Turn sampler, on the captured density.

    Chains start at different points, uniform in [-2, 2] on the unconstrained space. Discrete
    latents are summed out. Ctrl-C ends the run and returns what has been drawn; the result says so.

    Args:
        model: A Pyro model on its full data (no subsampled plates).
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        num_samples: Draws per chain after warmup.
        warmup_steps: Draws per chain that tune step size and metric, and are dropped.
        num_chains: Number of chains, run one after another.
        backend: ``"nutpie"`` (extra ``nutpie``), ``"pyro"``, or ``"auto"``: nutpie if installed.
        target_accept_prob: Acceptance statistic the step size is tuned to, in (0, 1); raise it
            where transitions diverge.
        max_tree_depth: A trajectory has at most ``2 ** max_tree_depth`` steps.
        seed: Seed of starting points and chains; the same seed gives the same draws.
        progress: Whether to show a progress bar; ``None`` shows one in a terminal.

    Raises:
        ModelError: If the model has no latent site, subsamples a plate, does not depend on some
            latent, or cannot be started.
        ValueError: If a setting is out of its range.
        ImportError: If ``backend="nutpie"`` and nutpie is not installed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> nuts = run_nuts(model, (torch.ones(8),), num_samples=50, warmup_steps=50, num_chains=2)
        >>> nuts.samples["loc"].shape
        torch.Size([2, 50])

    References:
        Hoffman and Gelman (2014), The No-U-Turn Sampler, https://arxiv.org/abs/1111.4246
    """
    settings = Settings(
        num_samples=_at_least("num_samples", num_samples, 1),
        warmup_steps=_at_least("warmup_steps", warmup_steps, 1),
        num_chains=_at_least("num_chains", num_chains, 1),
        target_accept_prob=_fraction("target_accept_prob", target_accept_prob),
        max_tree_depth=_at_least("max_tree_depth", max_tree_depth, 1),
        seed=_at_least("seed", seed, 0),
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    name = _choose(backend)
    begin = time.perf_counter()
    log_joint = LogJoint(model, model_args, model_kwargs)
    starts = log_joint.initial_points(num_chains, seed=seed)
    flat = log_joint.layout.describe_flat(log_joint.value_and_grad(starts)[1])
    if flat is not None:
        raise ModelError(f"{flat}. NUTS cannot sample from an improper posterior.")
    log_joint.plan(_GRADIENTS_PER_DRAW * num_chains * (warmup_steps + num_samples))
    capture = time.perf_counter() - begin
    draws = _SAMPLERS[name](log_joint, starts, settings)
    return NUTSResult(
        z=draws.z,
        stats=draws.stats,
        log_joint=log_joint,
        backend=name,
        seconds={"capture": capture, **draws.seconds},
        seed=seed,
        interrupted=draws.interrupted,
    )


def _choose(backend: str) -> str:
    if backend not in ("auto", *_SAMPLERS):
        raise ValueError(f"backend must be 'auto', 'nutpie' or 'pyro'; got {backend!r}.")
    installed = find_spec("nutpie") is not None
    if backend == "nutpie" and not installed:
        raise ImportError(
            "backend='nutpie' needs the package nutpie, which is not installed. Run "
            "`pip install 'pyro_mf[nutpie]'`, or use backend='pyro'."
        )
    if backend == "auto":
        return "nutpie" if installed else "pyro"
    return backend


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
    return value


def _fraction(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1; got {value!r}.")
    return value
