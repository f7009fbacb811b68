"""What do other factors than Normal ones gain? Against 16 reference posteriors.

Forward KL: the draws of one fit, and every family fitted to them. Errors are of the 5, 50 and 95 %
quantiles on the model's own scale, in reference sds, averaged over the latents that a reference
has (not over functions of several latents, which no product gets right). *draws* are the posterior
draws themselves, which no product can beat where it is right; *auto* was given 8000 of them.
Reverse KL: nats of ELBO above the optimal Normal factors, each at 4000 draws of its own, and the
seconds of CPU that the fit took in all. Rows are printed as they come. Set POSTERIORDB to the
folder of the references.
Run from the repository's root: python -m benchmarks.families
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import pyro_mf as mf
from benchmarks.forward import show
from benchmarks.posteriors import MODELS, Posterior, load
from benchmarks.problems import short_name
from benchmarks.scoring import quantile_errors
from pyro_mf.families import Family
from pyro_mf.solvers.posterior_draws import PosteriorDraws

FAMILIES = ("normal", "sinh_arcsinh", "spline", "normal_mixture", "auto")
_FRESH = 4000  # draws of an ELBO
REVERSE = ("normal", "sinh_arcsinh", "spline", "auto")


def factor_draws(family: Family, params: Any, size: int, num_draws: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(40_000)
        return family.transform(params, family.noise((num_draws, size), dtype=torch.float64))


def forward(posterior: Posterior, num_draws: int, seed: int) -> Iterator[tuple[str, Any, str]]:
    """Quantile errors of the draws, then of every family that is fitted to them."""
    result = fit(posterior, "normal", seed, objective=mf.ForwardKL())
    draws: PosteriorDraws | None = result.draws
    if draws is None:
        yield "none", (float("nan"),) * 3, result.stop_reason
        return
    log_joint = result.log_joint
    z = draws.sample(num_draws, seed=seed)
    yield "draws", quantile_errors(log_joint, z, posterior.reference), result.stop_reason
    for name in FAMILIES:
        guide = mf.AutoMeanField(posterior.model, family=name).setup(*posterior.args)
        if name == "auto":
            again = fit(posterior, "auto", seed, objective=mf.ForwardKL(), draws=as_given(result))
            guide = again.guide
            ended = ", ".join(dict.fromkeys(f.name for f in guide.families.values()))
        else:
            guide.set_flat_params(guide.family.fit_weighted(draws.z, draws.log_weights))
            ended = ""
        params = tuple(p.detach() for p in guide.flat_params())
        z = factor_draws(guide.family, params, guide.layout.size, num_draws)
        yield name, quantile_errors(log_joint, z, posterior.reference), ended


def as_given(result: Any) -> dict[str, torch.Tensor]:
    """The posterior draws of a fit as a user would hand over those of a sampler."""
    z = result.draws.sample(8000, seed=1)
    return dict(result.layout.constrain(z))


def reverse(posterior: Posterior, seed: int) -> Iterator[tuple[str, Any, str]]:
    """ELBO above that of Normal factors, over 4000 draws of each."""
    base = None
    for name in REVERSE:
        began = time.process_time()
        result = fit(posterior, name, seed)
        seconds = time.process_time() - began
        z = result.sample_unconstrained(_FRESH, seed=1)
        with torch.no_grad():
            log_q = result.guide.log_prob_unconstrained(z)
            log_weights = torch.cat([result.log_joint(part) for part in z.split(100)]) - log_q
        elbo = float(log_weights.mean())
        se = float(log_weights.std()) / _FRESH**0.5
        base = elbo if base is None else base
        chosen = ", ".join(dict.fromkeys(f.name for f in result.guide.families.values()))
        yield name, (elbo - base, se, seconds), f"{result.stop_reason}, {chosen}"


def fit(posterior: Posterior, family: str, seed: int, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the end of the fit is in the table
        return mf.fit(
            posterior.model, posterior.args, family=family, seed=seed, progress=False, **settings
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="parts of names, in the order wanted")
    parser.add_argument("--objective", choices=["forward", "reverse"], default="forward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=20_000, help="draws per quantile")
    parser.add_argument("--smoke", action="store_true", help="little work, to see that it runs")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    chosen = [name for part in args.only or [""] for name in MODELS if part in name]
    names = list(dict.fromkeys(chosen))[: 1 if args.smoke else None]

    columns = ("5 %", "50 %", "95 %") if args.objective == "forward" else ("gain", "se", "seconds")
    show("posterior", "family", *columns, "ended")
    show("---", "---", "--:", "--:", "--:", "---")
    found: dict[str, list[tuple[float, ...]]] = {}
    for name in names:
        posterior = load(name)
        rows = (
            forward(posterior, args.draws, args.seed)
            if args.objective == "forward"
            else reverse(posterior, args.seed)
        )
        for family, numbers, ended in rows:
            show(short_name(name), family, *(f"{x:.3f}" for x in numbers), ended)
            found.setdefault(family, []).append(tuple(numbers))
    for family, numbers in found.items():
        for name, average in {"median": np.nanmedian, "mean": np.nanmean}.items():
            values = average(np.array(numbers), 0)
            show(name, family, *(f"{x:.3f}" for x in values), f"of {len(numbers)}")


if __name__ == "__main__":
    main()
