"""``from_pyro``: draws of NUTS and other Markov chains as an ArviZ result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.infer import MCMC
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.convert.groups import Arrays, Options, build_result, evaluate_draws, log_density
from pyro_mf.convert.samples import check_arguments, take_like
from pyro_mf.density import LogJoint

if TYPE_CHECKING:
    from pyro_mf.density.sites import Layout


def from_pyro(
    posterior: Any,
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    like: Any | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool | Arrays = False,
    prior: int | Arrays | None = None,
    predictions: Arrays | None = None,
    constant_data: Arrays | None = None,
    predictions_constant_data: Arrays | None = None,
    seed: int = 0,
    attrs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Any:
    """Convert draws of Markov chains for ArviZ, whichever generation is installed.

    Groups: ``posterior`` (latents and ``pyro.deterministic`` sites), ``unconstrained_posterior``
    (sites with a constrained support, on the unconstrained axis), ``sample_stats`` (``lp``, the log
    joint density on the unconstrained space, and what the sampler recorded), ``log_prior``,
    ``log_likelihood`` (pointwise, observed sites only), ``observed_data``, and those asked for.

    Args:
        posterior: A :class:`pyro.infer.MCMC` that has run, the result of ``run_nuts``, or a mapping
            from every continuous latent site to draws of shape ``(chains, draws, *shape)``.
        model: The model; by default the one that the chains were run on.
        model_args: Its positional arguments; by default those of the run.
        model_kwargs: Its keyword arguments; by default those of the run.
        like: Another result, whose chain and draw coordinates are taken: its number of chains, and
            as many draws, evenly spaced.
        coords: Labels of dimensions, such as ``{"school": names}``.
        dims: Names of a variable's axes, where the plates' names are not wanted.
        log_likelihood: Whether to store the pointwise log likelihood: draws times data numbers.
        posterior_predictive: ``True`` to draw the observed sites anew at every posterior draw, or
            draws of one's own, ``(chains * draws, *shape)`` per site.
        prior: Number of draws from the prior (groups ``prior`` and ``prior_predictive``), or draws
            of one's own, ``(num, *shape)`` per site.
        predictions: Draws at other arguments of the model, ``(chains * draws, ...)`` per site.
        constant_data: Arrays that the model was given; name their axes with ``dims``.
        predictions_constant_data: The same for ``predictions``.
        seed: Seed of the predictive and prior draws.
        attrs: More attributes of the posterior, such as ``{"sampling_time": 12.5}`` (seconds).
        name: Name of the result; by default the model's.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x).

    Raises:
        TypeError: If ``posterior`` is none of the three, or ``model_args`` no tuple.
        ValueError: If the chains have not run, the draws do not fit the model, or names, labels or
            shapes given do not fit.
        ModelError: If the model is unknown, subsamples its data, or does not fit the arguments.
        NonFiniteError: If a draw lies on the edge of its support.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> draws = {"loc": torch.zeros(2, 100)}
        >>> result = from_pyro(draws, model=model, model_args=(torch.tensor([0.3, 0.7]),))
        >>> result["log_likelihood"]["x"].dims
        ('chain', 'draw', 'data')
    """
    check_arguments(model_args)
    run = _read(posterior, model, model_args, model_kwargs)
    draws, index = take_like(run.z, like)
    evaluation = evaluate_draws(run.log_joint, draws.flat, log_likelihood=log_likelihood)
    stats: dict[str, Any] = {n: v[index[0]][:, index[1]] for n, v in run.stats.items()}
    if "lp" not in stats:
        stats["lp"] = draws.fold(log_density(run.log_joint, draws.flat, evaluation))
    options = Options(
        coords=coords or {},
        dims=dims or {},
        posterior_predictive=posterior_predictive,
        prior=prior,
        predictions=predictions,
        constant_data=constant_data,
        predictions_constant_data=predictions_constant_data,
        seed=seed,
        attrs=attrs or {},
        name=name,
    )
    return build_result(
        run.log_joint,
        draws,
        evaluation,
        stats,
        options,
        attrs={**run.attrs, "is_approximate": 0},
    )


@dataclass(frozen=True)
class _Run:
    log_joint: LogJoint
    z: Tensor  # shape: (C, T, D)
    stats: Mapping[str, np.ndarray]
    attrs: Mapping[str, Any]


def _read(
    posterior: Any,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> _Run:
    if isinstance(posterior, MCMC):
        return _read_mcmc(posterior, model, args, kwargs)
    if hasattr(posterior, "log_joint") and hasattr(posterior, "z"):
        if model is not None or args is not None or kwargs is not None:
            raise ValueError(
                "the result of run_nuts knows its model and arguments; leave out model, model_args "
                "and model_kwargs."
            )
        attrs = {
            "inference_method": "nuts",
            "backend": posterior.backend,
            "seed": posterior.seed,
            "sampling_time": sum(posterior.seconds.values()),
        }
        return _Run(posterior.log_joint, posterior.z, posterior.stats, attrs)
    if isinstance(posterior, Mapping):
        if model is None:
            raise ModelError(
                "draws in a mapping do not know their model. Give model and model_args."
            )
        log_joint = LogJoint(model, args or (), kwargs)
        sites = sorted(log_joint.program.prototype.event_dims)
        if unknown := sorted(set(posterior) - set(sites)):
            raise ValueError(f"draws of {unknown} are no sites of the model, which has {sites}.")
        return _Run(log_joint, _unconstrain(posterior, log_joint.layout), {}, {})
    raise TypeError(
        "from_pyro takes a pyro.infer.MCMC, a result of run_nuts or a mapping of draws; got "
        f"{type(posterior).__name__}. For a guide, use from_pyro_svi."
    )


def _read_mcmc(
    mcmc: Any,
    model: Callable[..., Any] | None,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
) -> _Run:
    call = _pyro.mcmc_call(mcmc)
    if call is None:
        raise ValueError("the MCMC has no draws: it has not run yet. Call mcmc.run(...) first.")
    model = model or getattr(mcmc.kernel, "model", None)
    if model is None:
        raise ModelError(
            f"the kernel ({type(mcmc.kernel).__name__}) has no model, only a potential. Give "
            "from_pyro the model and its arguments, and the MCMC `transforms`, so that its draws "
            "are in the model's own space."
        )
    if args is None and kwargs is None:
        args, kwargs = call
    log_joint = LogJoint(model, args or (), kwargs)
    z = _unconstrain(mcmc.get_samples(group_by_chain=True), log_joint.layout)
    stats = {}
    divergences = _pyro.mcmc_divergences(mcmc)
    if divergences is not None:
        diverging = np.zeros(z.shape[:2], dtype=bool)
        for chain, indices in enumerate(divergences):
            diverging[chain, indices] = True
        stats["diverging"] = diverging
    return _Run(log_joint, z, stats, {"inference_method": type(mcmc.kernel).__name__.lower()})


def _unconstrain(samples: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Draws ``(C, T, D)`` of the flat vector from those of every latent site.

    Raises:
        ValueError: If a site is missing or has another shape.
    """
    expected = {site.name: site.shape for site in layout.sites}
    if missing := sorted(set(expected) - set(samples)):
        raise ValueError(
            f"draws of the latent sites {missing} are missing; got {sorted(samples)}. Give the "
            "model and the arguments that the chains were run with."
        )
    values = {name: torch.as_tensor(samples[name]) for name in expected}
    sizes = {tuple(value.shape[:2]) for value in values.values()}
    for name, shape in expected.items():
        if values[name].shape[2:] != shape or len(sizes) > 1:
            raise ValueError(
                f"draws of '{name}' have shape {tuple(values[name].shape)}; expected (chains, "
                f"draws, *{tuple(shape)}), with the same chains and draws for every site."
            )
    return layout.unconstrain(values)
