"""Data that a model simulates by itself: what it draws in place of what it observes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density import LogJoint
from pyro_mf.density.checks import is_data
from pyro_mf.density.data_sets import Arguments
from pyro_mf.density.prior import Prior
from pyro_mf.diagnostics.joint_draws import (
    Simulations,
    bind,
    check_observes,
    draw_jointly,
    draw_sites,
    signature_of,
    trace_once,
)


def simulate_from_model(
    model: Callable[..., Any],
    targets: Mapping[str, str] | None,
    num: int,
    arguments: Arguments,
    seed: int,
) -> Simulations:
    """Draw truths and data from the model, jointly.

    Args:
        model: A Pyro model.
        targets: By observed site the name of the argument that holds its data; ``None`` to look for
            them.
        num: Number of simulations R.
        arguments: The template.
        seed: Seed of all draws.

    Raises:
        ModelError: If the model cannot simulate its data by itself; the message says why.
    """
    if targets is not None:
        _check_names(model, targets, arguments)
        arguments = _complete(model, targets, arguments, seed)
    log_joint = LogJoint(model, *arguments)
    check_observes(log_joint)
    Prior(log_joint)
    if targets is None:
        put = _find_data(model, arguments, seed)
    else:
        names = targets

        def put(values: Mapping[str, Tensor]) -> Arguments:
            return bind(model, arguments, {names[site]: x for site, x in values.items()})

    observed = log_joint.program.prototype.observed
    if targets is not None and set(targets) != set(observed):
        raise ModelError(
            f"simulate names the sites {sorted(targets)}; the model observes {sorted(observed)}. "
            "Name all of them, with the argument that holds the data of each."
        )
    _check_density_is_drawn(model, arguments, seed)
    latents = [site.name for site in log_joint.layout.sites]
    draws, truths = draw_jointly(model, arguments, log_joint, num, [*latents, *observed], seed)
    found = [put({name: draws[name][k] for name in observed}) for k in range(num)]
    _check_data_are_only_observed(model, arguments, found[0], [*latents, *observed], seed)
    return Simulations(LogJoint(model, *found[0]), truths, found)


def _find_data(
    model: Callable[..., Any], arguments: Arguments, seed: int
) -> Callable[[Mapping[str, Tensor]], Arguments]:
    """Which tensors of the arguments are the observed sites' values.

    Raises:
        ModelError: If some site's are not there as they are.
    """
    trace = trace_once(model, arguments, seed)
    leaves, tree = tree_flatten((tuple(arguments[0]), dict(arguments[1])))
    places: dict[str, int] = {}
    for name, node in trace.nodes.items():
        if not is_data(node):
            continue
        matching = [k for k, leaf in enumerate(leaves) if _is_same(leaf, node["value"])]
        if len(matching) != 1:
            raise ModelError(
                f"the data of observed site '{name}' are not one of the model's arguments as they "
                "are, so that simulated data cannot be put in their place. Give simulate= a "
                "function from a dict of latent values to the model's arguments."
            )
        places[name] = matching[0]

    def put(values: Mapping[str, Tensor]) -> Arguments:
        new = list(leaves)
        for name, value in values.items():
            new[places[name]] = value.to(leaves[places[name]].dtype)
        args, kwargs = tree_unflatten(new, tree)
        return args, kwargs

    return put


def _is_same(leaf: Any, value: Any) -> bool:
    if leaf is value:
        return True
    both = isinstance(leaf, Tensor) and isinstance(value, Tensor) and value.numel() > 0
    return both and leaf.shape == value.shape and leaf.data_ptr() == value.data_ptr()


def _complete(
    model: Callable[..., Any], targets: Mapping[str, str], arguments: Arguments, seed: int
) -> Arguments:
    """Put data where there are none yet: a model with ``obs=None`` draws them.

    Raises:
        ModelError: If there is no such site.
    """
    bound = signature_of(model).bind(*arguments[0], **arguments[1])
    bound.apply_defaults()
    empty = {site: name for site, name in targets.items() if bound.arguments[name] is None}
    if not empty:
        return arguments
    drawn = draw_sites(model, arguments, 1, list(empty), seed)
    return bind(model, arguments, {name: drawn[site][0] for site, name in empty.items()})


def _check_names(
    model: Callable[..., Any], targets: Mapping[str, str], arguments: Arguments
) -> None:
    known = list(signature_of(model).parameters)
    unknown = [name for name in targets.values() if name not in known]
    if unknown:
        raise ModelError(
            f"simulate names the argument {unknown[0]!r}; the model's arguments are {known}. Write "
            "it as {'site': 'argument'}."
        )
    try:
        signature_of(model).bind(*arguments[0], **arguments[1])
    except TypeError as error:
        raise ModelError(f"model_args do not fit the model: {error}.") from error


def _check_density_is_drawn(model: Callable[..., Any], arguments: Arguments, seed: int) -> None:
    """Refuse a likelihood that is not the density of what the model draws.

    Raises:
        ModelError: If there is a factor, or an observed site is scaled.
    """
    trace = trace_once(model, arguments, seed)
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if _pyro.is_factor(node):
            raise ModelError(
                f"pyro.factor '{name}' has a density and draws nothing, so the model cannot "
                "simulate its data. Give simulate= a function that can."
            )
        if is_data(node) and bool((torch.as_tensor(node["scale"]) != 1.0).any()):
            raise ModelError(
                f"observed site '{name}' is under poutine.scale, so its density is not that of the "
                "data it draws, and no posterior would be calibrated. Calibrate the model without "
                "the scale."
            )


def _check_data_are_only_observed(
    model: Callable[..., Any],
    template: Arguments,
    simulated: Arguments,
    names: list[str],
    seed: int,
) -> None:
    """Refuse a model that draws other things where it is given other data.

    Raises:
        ModelError: If it does: then draws given the template are no joint draws.
    """
    one = draw_sites(model, template, 1, names, seed)
    other = draw_sites(model, simulated, 1, names, seed)
    differ = [n for n in names if not torch.equal(one[n].nan_to_num(), other[n].nan_to_num())]
    if differ:
        raise ModelError(
            f"what the model draws at '{differ[0]}' depends on the data it is given, as with "
            "lagged values or a prior scaled by the data, so it cannot simulate them by itself. "
            "Give simulate= a function from a dict of latent values to the model's arguments."
        )
