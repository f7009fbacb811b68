"""The methods of the scoreboard: how each is run, kept in a file, drawn from and judged."""

from __future__ import annotations

import _thread
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_mf as mf
from benchmarks.peers.stock_pyro import flat_params, start_anywhere
from benchmarks.posteriors import Posterior
from benchmarks.scoreboard_truth import Moments
from benchmarks.scoring import elements
from pyro_mf.density import LogJoint
from pyro_mf.families import Family, Normal

STEPS, FIRST_RATE, DECAY = 10_000, 0.01, 0.05  # of stock SVI: what the rate ends at, relative


class Settings(NamedTuple):
    """What does not depend on the method.

    Args:
        seed: Of fits.
        limit: Seconds after which a fit is interrupted.
        stock_limit: Seconds of CPU after which stock SVI is.
        num_samples: Of NUTS, per chain, and as many to warm up.
    """

    seed: int = 0
    limit: float = 900.0
    stock_limit: float = 60.0
    num_samples: int = 1000


class Fit(NamedTuple):
    """What a method left behind.

    Args:
        fitted: A ``FitResult``, a trained guide, or draws ``(chains, draws, D)``.
        seconds: Of CPU that it took.
        ended: How, in a word.
        log_joint: The density.
    """

    fitted: Any
    seconds: float
    ended: str
    log_joint: LogJoint


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C after a while, upon which fits return what they have."""
    timer = Timer(seconds, _thread.interrupt_main)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# -- stock Pyro ----------------------------------------------------------------------------------


def fit_stock(posterior: Posterior, settings: Settings, path: Path) -> Fit:
    """``AutoNormal`` by ``SVI`` with Adam, 10,000 steps, the rate decaying from 0.01 to 0.0005."""
    with torch.random.fork_rng():
        pyro.clear_param_store()
        pyro.set_rng_seed(settings.seed)
        guide = AutoNormal(posterior.model, init_loc_fn=start_anywhere)
        rates = {"lr": FIRST_RATE, "lrd": DECAY ** (1 / STEPS), "clip_norm": float("inf")}
        svi = SVI(posterior.model, guide, pyro.optim.ClippedAdam(rates), loss=Trace_ELBO())
        began, steps = time.process_time(), 0
        while steps < STEPS and time.process_time() - began < settings.stock_limit:
            svi.step(*posterior.args)
            steps += 1
    seconds = time.process_time() - began
    ended = "done" if steps == STEPS else f"{steps:,} steps"
    torch.save({"guide": guide.state_dict(), "seconds": seconds, "ended": ended}, path)
    return Fit(guide, seconds, ended, LogJoint(posterior.model, posterior.args))


def load_stock(posterior: Posterior, path: Path) -> Fit:
    saved = torch.load(path, weights_only=True)
    pyro.clear_param_store()  # or the guide would get those of the last one
    guide = AutoNormal(posterior.model, init_loc_fn=start_anywhere)
    guide(*posterior.args)  # makes its parameters
    guide.load_state_dict(saved["guide"])
    log_joint = LogJoint(posterior.model, posterior.args)
    return Fit(guide, saved["seconds"], saved["ended"], log_joint)


# -- ours and NUTS -------------------------------------------------------------------------------


def fit_ours(**options: Any) -> Callable[[Posterior, Settings, Path], Fit]:
    """``fit`` with options."""

    def run(posterior: Posterior, settings: Settings, path: Path) -> Fit:
        began = time.process_time()
        with warnings.catch_warnings(), interrupted_after(settings.limit):
            warnings.simplefilter("ignore")  # how it ended is in the table
            result = mf.fit(
                posterior.model, posterior.args, seed=settings.seed, progress=False, **options
            )
        seconds = time.process_time() - began
        if "objective" not in options:
            result.known_response()  # is kept in the file
        result.save(path)
        path.with_suffix(".seconds").write_text(str(seconds))
        return Fit(result, seconds, result.stop_reason, result.log_joint)

    return run


def load_ours(posterior: Posterior, path: Path) -> Fit:
    result = mf.FitResult.load(path, posterior.model, posterior.args)
    seconds = float(path.with_suffix(".seconds").read_text())
    return Fit(result, seconds, result.stop_reason, result.log_joint)


def run_nuts(posterior: Posterior, settings: Settings, path: Path) -> Fit:
    """Four chains of 1000 + 1000."""
    began = time.process_time()
    num = settings.num_samples
    result = mf.run_nuts(
        posterior.model,
        posterior.args,
        num_samples=num,
        warmup_steps=num,
        seed=settings.seed,
        progress=False,
    )
    seconds = time.process_time() - began
    divergent = int(result.stats["diverging"].sum())
    ended = f"{divergent} divergent" if divergent else "done"
    torch.save({"z": result.z, "seconds": seconds, "ended": ended}, path)
    return Fit(result.z, seconds, ended, result.log_joint)


def load_nuts(posterior: Posterior, path: Path) -> Fit:
    saved = torch.load(path, weights_only=True)
    log_joint = LogJoint(posterior.model, posterior.args)
    return Fit(saved["z"], saved["seconds"], saved["ended"], log_joint)


# -- draws -----------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Batches ``(B, S, D)`` on the unconstrained axis, and the error that they do not show."""

    z: Tensor
    error: float = 0.0


def strata(batches: int, num_draws: int, size: int, seed: int) -> Tensor:
    """Latin hypercubes, ``(B, S, D)``: one uniform draw per stratum, each in an order of its own.

    Averages of functions of one element are nearly exact, even in far tails.
    """
    rng = np.random.default_rng(seed)
    at = np.arange(num_draws)[None, :, None] + rng.random((batches, num_draws, size))
    return torch.from_numpy(rng.permuted(at, axis=1) / num_draws)


def draw_product(family: Family, params: tuple[Tensor, ...], shares: Tensor) -> Drawn:
    params = tuple(p.detach().double() for p in params)
    return Drawn(torch.stack([family.quantile(params, batch) for batch in shares]))


def draw_guide(fit: Fit, shares: Tensor) -> Drawn:
    guide = fit.fitted.guide
    return draw_product(guide.family, guide.flat_params(), shares)


def draw_stock(fit: Fit, shares: Tensor) -> Drawn:
    return draw_product(Normal(), flat_params(fit.fitted, fit.log_joint.layout), shares)


def draw_response(fit: Fit, shares: Tensor) -> Drawn | None:
    """``None`` where there is no linear response."""
    found = fit.fitted.known_response().found
    if found is None:
        return None
    noise = torch.special.ndtri(shares)
    return Drawn(found.loc.double() + noise @ found.scale_tril.double().T)


def draw_behind(fit: Fit, shares: Tensor) -> Drawn | None:
    """The draws that a forward fit is fitted to; resampled, they do not show their own error."""
    draws = fit.fitted.draws
    if draws is None:
        return None
    batches, num, _ = shares.shape
    return Drawn(draws.sample(batches * num).unflatten(0, (batches, num)), draws.largest_error)


def draw_chains(fit: Fit, shares: Tensor) -> Drawn:
    """Tenths of NUTS's chains."""
    chains, num, size = fit.fitted.shape
    tenth = num // 10
    return Drawn(fit.fitted[:, : 10 * tenth].reshape(10 * chains, tenth, size))


def moments(log_joint: LogJoint, drawn: Drawn, wanted: set[str]) -> dict[str, Moments]:
    """Of the parameters wanted, on their own scale."""
    values: dict[str, list[np.ndarray]] = {}
    for batch in drawn.z:
        for name, element in elements(log_joint, batch.to(log_joint.dtype)):
            if name in wanted:
                values.setdefault(name, []).append(element.double().numpy())
    return {name: Moments.of(np.stack(parts), drawn.error) for name, parts in values.items()}


# -- verdicts --------------------------------------------------------------------------------------


def diagnose_result(**options: bool) -> Callable[[Posterior, Fit], Any]:
    return lambda _, fit: fit.fitted.diagnose(progress=False, **options)


def diagnose_stock(posterior: Posterior, fit: Fit) -> Any:
    return mf.diagnose(fit.fitted, posterior.model, posterior.args, progress=False)


class Method(NamedTuple):
    """A column of the scoreboard.

    Args:
        kept_as: The fit that it reads, which methods share.
        run: Fits and keeps.
        load: Reads what was kept.
        draw: Batches of draws, or ``None`` where it has none.
        diagnose: Asks for the verdict; ``None`` where there is none to ask for.
    """

    kept_as: str
    run: Callable[[Posterior, Settings, Path], Fit]
    load: Callable[[Posterior, Path], Fit]
    draw: Callable[[Fit, Tensor], Drawn | None]
    diagnose: Callable[[Posterior, Fit], Any] | None


_REVERSE = fit_ours()
_FORWARD = fit_ours(objective=mf.ForwardKL())
_SPLINE = fit_ours(objective=mf.ForwardKL(), family="spline")

METHODS = {
    "stock AutoNormal": Method("stock", fit_stock, load_stock, draw_stock, diagnose_stock),
    "reverse": Method("reverse", _REVERSE, load_ours, draw_guide, diagnose_result()),
    "linear response": Method(
        "reverse", _REVERSE, load_ours, draw_response, diagnose_result(linear_response=True)
    ),
    "forward": Method("forward", _FORWARD, load_ours, draw_guide, diagnose_result()),
    "forward spline": Method("spline", _SPLINE, load_ours, draw_guide, diagnose_result()),
    "forward draws": Method(
        "forward", _FORWARD, load_ours, draw_behind, diagnose_result(draws=True)
    ),
    "NUTS": Method("nuts", run_nuts, load_nuts, draw_chains, None),
}
