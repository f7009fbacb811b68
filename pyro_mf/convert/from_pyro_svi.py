"""``from_pyro_svi``: draws of a trained guide as an ArviZ result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ConversionWarning, ModelError, ScoreGradientWarning
from pyro_mf.convert.datasets import Axes, to_dataset
from pyro_mf.convert.groups import (
    Arrays,
    Draws,
    Options,
    build_result,
    evaluate_draws,
    log_density,
)
from pyro_mf.convert.guide_draws import GuideDraws, check_ready, draw_guide, is_factorised
from pyro_mf.convert.samples import check_arguments, sample_coords
from pyro_mf.density import LogJoint
from pyro_mf.objectives.discrete import make_plan
from pyro_mf.objectives.labelled import LabelledJoint
from pyro_mf.weights import psis

if TYPE_CHECKING:
    import xarray as xr

_MIN_PSIS = 25  # draws below which no tail is fitted


def from_pyro_svi(
    guide: Any,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    model: Callable[..., Any] | None = None,
    num_draws: int = 1000,
    num_chains: int = 1,
    like: Any | None = None,
    losses: Sequence[float] | Tensor | None = None,
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
    """Convert a trained guide for ArviZ, whichever generation is installed.

    Groups as in :func:`~pyro_mf.convert.from_pyro`. ``sample_stats`` has ``lp``, ``log_q`` and
    ``log_weight`` (their difference), all on the unconstrained space; ``vi_fit`` has the ELBO and
    k-hat of these draws, the loss, and location and scale of a guide of ours. Draws are
    independent: chains only give them the shape of a Markov chain's.

    ``log_q`` is exact for a guide of ours. For other guides it is the sum of the log probabilities
    in the guide's trace, where that is the density of the latents: autoguides, and hand-written
    guides that sample nothing but latents. Elsewhere (``AutoDelta``, auxiliary variables) it is
    left out, with what needs it, and a warning says why.

    Args:
        guide: A trained guide (ours, one of Pyro's, or a function), or the ``SVI`` that trained it.
        model_args: The model's positional arguments, with the full data.
        model_kwargs: The model's keyword arguments.
        model: The model; by default the one that the guide was made for. Needed for a hand-written
            guide, and to give a model without subsampling for one trained on minibatches.
        num_draws: Draws per chain.
        num_chains: Number of chains.
        like: Another result, whose chain and draw coordinates are taken in place of ``num_draws``
            and ``num_chains``, as plots of several results in ArviZ 1.x need.
        losses: Losses of the steps taken, for ``vi_fit``.
        coords: Labels of dimensions, such as ``{"school": names}``.
        dims: Names of a variable's axes, where the plates' names are not wanted.
        log_likelihood: Whether to store the pointwise log likelihood: draws times data numbers.
        posterior_predictive: ``True`` to draw the observed sites anew at every draw, or draws of
            one's own, ``(chains * draws, *shape)`` per site.
        prior: Number of draws from the prior (groups ``prior`` and ``prior_predictive``), or draws
            of one's own, ``(num, *shape)`` per site.
        predictions: Draws at other arguments of the model, ``(chains * draws, ...)`` per site.
        constant_data: Arrays that the model was given; name their axes with ``dims``.
        predictions_constant_data: The same for ``predictions``.
        seed: Seed of all draws.
        attrs: More attributes of the posterior, such as ``{"sampling_time": 0.5}`` (seconds).
        name: Name of the result; by default the model's.

    Returns:
        An ``InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x).

    Raises:
        TypeError: If ``guide`` is none, or ``model_args`` no tuple.
        ValueError: If a number, name, label or shape given does not fit.
        GuideNotSetUpError: If the guide has not seen its model run.
        GuideMismatchError: If model and guide have not the same latent sites of the same shapes.
        ModelError: If the model is unknown, subsamples its data, or does not fit the arguments.
        NonFiniteError: If a draw lies on the edge of its support.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.guides import AutoMeanField
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> data = torch.tensor([0.3, 0.7])
        >>> guide = AutoMeanField(model).setup(data)           # and train it
        >>> result = from_pyro_svi(guide, (data,), num_draws=500)
        >>> sorted(result["sample_stats"].data_vars)
        ['log_q', 'log_weight', 'lp']
    """
    check_arguments(model_args)
    if isinstance(guide, SVI):
        guide, model = guide.guide, model or guide.model
    check_ready(guide)
    model = model or _model_of(guide)
    log_joint = LogJoint(model, model_args, model_kwargs)
    chain, draw = _sample(num_chains, num_draws, like)
    num = len(chain) * len(draw)
    drawn = draw_guide(guide, model_args, model_kwargs or {}, log_joint.layout, num, seed)
    draws = Draws(drawn.z.reshape(len(chain), len(draw), -1), chain, draw)
    evaluation = evaluate_draws(log_joint, drawn.z, log_likelihood=log_likelihood)
    if drawn.discrete:
        evaluation = replace(evaluation, latents=evaluation.latents | drawn.discrete)
        lp, why = _with_labels(log_joint, guide, drawn)
        drawn = drawn if not why else replace(drawn, log_q=None, why_no_log_q=why)
    else:
        lp = log_density(log_joint, drawn.z, evaluation)
    stats = {"lp": lp}
    if drawn.log_q is None:
        message = f"log_q, log_weight, the ELBO and k-hat are left out: {drawn.why_no_log_q}."
        warnings.warn(message, ConversionWarning, stacklevel=2)
    else:
        stats |= {"log_q": drawn.log_q, "log_weight": stats["lp"] - drawn.log_q}
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
    steps = None if losses is None else len(losses)
    own = {"inference_method": "variational inference", "guide": _guide_name(guide)}
    return build_result(
        log_joint,
        draws,
        evaluation,
        {n: draws.fold(v) for n, v in stats.items()},
        options,
        attrs={**own, "num_steps": steps, "seed": seed, "is_approximate": 1},
        vi_fit={"vi_fit": _vi_fit(guide, stats.get("log_weight"), losses)},
    )


def _with_labels(log_joint: LogJoint, guide: Any, drawn: GuideDraws) -> tuple[Tensor, str]:
    """Log joint at draws of all sites; or with discrete ones summed out, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScoreGradientWarning)  # nothing is trained here
        args, kwargs = log_joint.model_args, log_joint.model_kwargs
        plan = make_plan(log_joint.model, guide, args, kwargs, math.inf)
    if not plan.drawn:
        return LabelledJoint(log_joint, drawn.discrete).at(drawn.z, drawn.discrete), ""
    name, reason = next(iter(plan.drawn.items()))
    with torch.no_grad():
        return log_joint(drawn.z), f"discrete site '{name}' cannot be summed over ({reason})"


def _model_of(guide: Any) -> Callable[..., Any]:
    try:
        model = _pyro.without_init(getattr(guide, "model", None))
    except TypeError:  # one of Pyro's, unpickled
        model = None
    if model is None:
        raise ModelError(
            f"the guide ({type(guide).__name__}) does not know its model. Give from_pyro_svi the "
            "model as `model`."
        )
    return model  # type: ignore[no-any-return]


def _sample(num_chains: int, num_draws: int, like: Any | None) -> tuple[Any, Any]:
    if like is not None:
        return sample_coords(like)
    for argument, value in (("num_chains", num_chains), ("num_draws", num_draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be an integer of at least 1; got {value!r}.")
    return range(num_chains), range(num_draws)


def _vi_fit(
    guide: Any, log_weight: Tensor | None, losses: Sequence[float] | Tensor | None
) -> xr.Dataset:
    """What is known of the fit itself."""
    arrays: dict[str, Tensor] = {}
    dims: dict[str, list[str]] = {}
    coords: dict[str, Sequence[Any]] = {}
    if losses is not None:
        arrays["loss"] = torch.as_tensor(losses, dtype=torch.get_default_dtype()).detach()
        dims["loss"] = ["step"]
    if log_weight is not None:
        arrays["elbo"] = log_weight.mean()
        arrays["elbo_mcse"] = log_weight.std() / math.sqrt(len(log_weight))
        usable = bool((log_weight < math.inf).all() and (log_weight > -math.inf).any())
        if usable and len(log_weight) >= _MIN_PSIS:
            smoothed = psis(log_weight)
            arrays["pareto_k"] = torch.tensor(smoothed.khat)
            arrays["pareto_k_se"] = torch.tensor(smoothed.khat_se)
            arrays["pareto_k_threshold"] = torch.tensor(smoothed.threshold)
    if is_factorised(guide):
        coords["latent"] = guide.layout.element_names()
        for param, value in zip(guide.family.param_names, guide.flat_params(), strict=True):
            arrays[param] = value
            if value.shape == (guide.layout.size,):  # not those of some sites' own families
                dims[param] = ["latent"]
    return to_dataset(arrays, Axes(dims=dims, coords=coords))


def _guide_name(guide: Any) -> str:
    if is_factorised(guide):
        return f"{type(guide).__name__}({guide.family.name})"
    return str(getattr(guide, "__name__", type(guide).__name__))
