"""Posterior draws that the user has already, as flat unconstrained vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf.convert import generations
from pyro_mf.density import Layout, LogJoint

_MIN_DRAWS, _MIN_LENGTH = 100, 4


def read_draws(draws: Any, log_joint: LogJoint) -> Tensor:
    """Read draws of a model's posterior, whatever made them.

    Args:
        draws: What :func:`pyro_mf.run_nuts` returns, a Pyro ``MCMC`` object after its run, an
            ``InferenceData`` or ``DataTree``, or a mapping from every latent site's name to its
            draws in the model's own space, shape ``(S, *shape)`` or ``(chains, S, *shape)``.
        log_joint: The model with its data.

    Returns:
        Flat unconstrained vectors, shape ``(chains, S, D)``, in double precision on the CPU.

    Raises:
        TypeError: If they are none of these.
        ValueError: If a site is missing, has another shape, a value is not finite or outside of its
            support, or there are fewer than 100 draws.
    """
    layout = log_joint.layout
    values = _by_site(draws, layout)
    missing = [site.name for site in layout.sites if site.name not in values]
    if missing:
        raise ValueError(
            f"draws lack the latent sites {missing}; they have {sorted(values)}. Give draws of "
            "every continuous latent of the model."
        )
    arrays = {
        site.name: _as_chains(site.name, values[site.name], site.shape) for site in layout.sites
    }
    counts = {name: tuple(x.shape[:2]) for name, x in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"draws must be as many for every site; (chains, draws) are {counts}.")
    chains, length = next(iter(counts.values()))
    if length < _MIN_LENGTH:
        raise ValueError(
            f"draws are {chains} chains of {length}; at least {_MIN_LENGTH} in a row are needed. "
            "If they are independent, give them as one chain of shape (S, *shape)."
        )
    if chains * length < _MIN_DRAWS:
        raise ValueError(
            f"draws are {chains * length}; at least {_MIN_DRAWS} are needed to know an sd to 10 %."
        )
    for site in layout.sites:
        x = arrays[site.name]
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {x.numel()} values of '{site.name}' in draws are NaN or infinite. Look "
                "at that run first."
            )
        outside = int((~site.support.check(x)).sum())
        if outside:
            raise ValueError(
                f"{outside} values of '{site.name}' in draws are outside of its support "
                f"{site.support}. Give draws in the model's own space."
            )
    z = layout.unconstrain(arrays)
    if not bool(torch.isfinite(z).all()):
        raise ValueError(
            "some draws lie on the edge of their support, which is infinitely far out on the "
            "unconstrained axis. They were rounded: give them in double precision."
        )
    constant = (z == z[0, 0]).all(0).all(0).nonzero().reshape(-1).tolist()
    if constant:
        raise ValueError(
            f"all draws of '{layout.element_names()[constant[0]]}' are the same, so they are no "
            "draws of a posterior. Look at that run first."
        )
    return z


def _by_site(draws: Any, layout: Layout) -> Mapping[str, Any]:
    if generations.is_result(draws):
        posterior = generations.dataset(draws, "posterior")
        if not {"chain", "draw"} <= set(posterior.dims):
            raise ValueError("draws must have the dimensions chain and draw in their posterior.")
        return {
            site.name: posterior[site.name].transpose("chain", "draw", ...).values
            for site in layout.sites
            if site.name in posterior
        }
    if isinstance(draws, Mapping):  # which an InferenceData is, too
        return draws
    samples = getattr(draws, "samples", None)  # of run_nuts
    if isinstance(samples, Mapping):
        return samples
    if hasattr(draws, "get_samples"):  # Pyro's MCMC
        try:
            return dict(draws.get_samples(group_by_chain=True))
        except (TypeError, AttributeError) as error:
            raise ValueError("the MCMC has no draws: it has not run yet. Run it first.") from error
    raise TypeError(
        "draws must be a mapping from site names to tensors, a result of run_nuts, Pyro's MCMC "
        f"after its run, an InferenceData or a DataTree; got {type(draws).__name__}."
    )


def _as_chains(name: str, values: Any, shape: torch.Size) -> Tensor:
    try:
        x = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"draws of '{name}' must be a tensor or an array of numbers; got "
            f"{type(values).__name__}."
        ) from error
    leading = x.dim() - len(shape)
    if leading not in (1, 2) or tuple(x.shape[leading:]) != tuple(shape):
        raise ValueError(
            f"draws of '{name}' must have shape (S, *shape) or (chains, S, *shape) with shape "
            f"{tuple(shape)}, that of one value; got {tuple(x.shape)}."
        )
    return x if leading == 2 else x[None]
