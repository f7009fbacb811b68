"""nutpie's NUTS on the captured density, through nutpie's Python-function interface.

Chains run one after another: a density that is called from Python holds the interpreter's lock
most of the time, and two chains that contend for it are slower than one.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_mf._errors import ModelError
from pyro_mf.baselines.draws import Draws, Settings, largest_block
from pyro_mf.baselines.target import Density, Target

# Our names, nutpie's, and the type without the NaN that pads an interrupted run.
STATS = {
    "lp": ("logp", np.float64),
    "acceptance_rate": ("mean_tree_accept", np.float64),
    "step_size": ("step_size", np.float64),
    "n_steps": ("n_steps", np.int64),
    "tree_depth": ("depth", np.int64),
    "diverging": ("diverging", bool),
    "energy": ("energy", np.float64),
}


def sample_nutpie(density: Density, starts: Tensor, settings: Settings) -> Draws:
    """Run nutpie.

    Args:
        density: The log joint.
        starts: One starting point per chain, unconstrained, shape ``(chains, D)``.
        settings: What to run.

    Raises:
        ModelError: If no chain could be started.
        KeyboardInterrupt: If Ctrl-C came before the first draw.
    """
    bridge = _Bridge(Target(density), starts)
    begin = time.perf_counter()
    try:
        trace = _run(bridge, settings)
    except RuntimeError as error:
        if bridge.failure is None:
            raise ModelError(
                f"nutpie could not start: {str(error).strip().splitlines()[0]}. The density or "
                "its gradient may be zero or infinite at the starting points; try backend='pyro'."
            ) from error
    if bridge.failure is not None:
        raise bridge.failure
    return _collect(trace, settings, time.perf_counter() - begin, starts)


def _run(bridge: _Bridge, settings: Settings) -> Any:
    with warnings.catch_warnings():
        # nutpie goes through ArviZ 0.x, which announces 1.0 at import and wonders at few draws.
        warnings.simplefilter("ignore")
        import nutpie

        # nutpie itself catches Ctrl-C and returns what it has.
        return nutpie.sample(
            bridge.compiled_model(),
            draws=settings.num_samples,
            tune=settings.warmup_steps,
            chains=settings.num_chains,
            cores=1,
            seed=settings.seed,
            target_accept=settings.target_accept_prob,
            maxdepth=settings.max_tree_depth,
            progress_bar=settings.progress,
        )


class _Bridge:
    """The functions nutpie asks for; what they raise is kept, for nutpie dies of an exception."""

    def __init__(self, target: Target, starts: Tensor) -> None:
        self._target = target
        self._starts = starts
        self.failure: BaseException | None = None

    def compiled_model(self) -> Any:
        from nutpie.compiled_pyfunc import from_pyfunc

        size = self._starts.shape[-1]
        starts = itertools.cycle(self._starts.double().cpu().numpy())
        return from_pyfunc(
            size,
            make_logp_fn=lambda: self._log_density,
            make_expand_fn=_make_identity,
            expanded_dtypes=[np.dtype(np.float64)],
            expanded_shapes=[(size,)],
            expanded_names=["z"],
            make_initial_point_fn=lambda _: next(starts),
        )

    def _log_density(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        if self.failure is not None:  # nothing is evaluated any more; let nutpie come to its end
            return np.nan, np.zeros_like(x)
        try:
            value, gradient = self._target(torch.from_numpy(x).to(self._starts))
        except BaseException as error:
            self.failure = error
            return np.nan, np.zeros_like(x)
        return value.item(), gradient.double().cpu().numpy()


def _make_identity(*_: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda x: {"z": np.array(x)}


def _collect(trace: Any, settings: Settings, seconds: float, like: Tensor) -> Draws:
    # An interrupted run comes back with its chains padded with NaN to one length.
    lengths = np.isfinite(trace.sample_stats["logp"].values).sum(1).tolist()
    kept, length = largest_block(lengths)
    if length == 0:
        raise KeyboardInterrupt
    stats = {
        ours: trace.sample_stats[theirs].values[kept, :length].astype(dtype)
        for ours, (theirs, dtype) in STATS.items()
    }
    warmup = 0.0
    if settings.warmup_steps:
        # nutpie does not tell the two phases apart in time; gradients cost the same in both.
        tuning = float(np.nansum(trace.warmup_sample_stats["n_steps"]))
        sampling = float(np.nansum(trace.sample_stats["n_steps"]))
        warmup = seconds * tuning / (tuning + sampling)
    return Draws(
        z=torch.as_tensor(trace.posterior["z"].values[kept, :length]).to(like),
        stats=stats,
        seconds={"warmup": warmup, "sample": seconds - warmup},
        interrupted=min(lengths) < settings.num_samples,
    )
