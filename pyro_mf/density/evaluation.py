"""Everything a model computes at given latents: deterministics, prior and pointwise likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf.density.capture import capture_graph
from pyro_mf.density.checks import is_data
from pyro_mf.density.model_function import Inputs
from pyro_mf.density.program import Mode, Program
from pyro_mf.density.prototype import Prototype
from pyro_mf.density.sites import Plate

# Elements of all values of one chunk of draws: bounds memory at about 100 MB in float64.
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Evaluation:
    """A model run at ``S`` draws; all tensors but ``observed`` lead with ``S``.

    For full data without ``poutine.scale``, log joint = ``log_prior`` + the sum of all
    ``log_likelihood`` + ``log_abs_det``.

    Args:
        latents: Continuous latents in the model's own space, shape ``(S, *shape)``.
        deterministics: Values of ``pyro.deterministic`` sites. Those that depend on summed-out
            discrete latents are left out.
        log_prior: Log density of the latents in their own space plus ``pyro.factor`` terms, nats,
            shape ``(S,)``.
        log_likelihood: Per observed site, pointwise (one entry per element of its batch shape),
            unscaled, masked elements zero; discrete latents are summed out. Empty where several
            observed elements share a discrete latent, since then no pointwise value exists.
        log_abs_det: Log Jacobian from the unconstrained to the model's space, shape ``(S,)``.
        plates: Vectorised plates around each site.
        event_dims: Event dimensions of each site.
        observed: Values of the observed sites.
    """

    latents: dict[str, Tensor]
    deterministics: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: dict[str, Tensor]
    log_abs_det: Tensor
    plates: dict[str, tuple[Plate, ...]]
    event_dims: dict[str, int]
    observed: dict[str, Tensor]


def evaluate(program: Program, z: Tensor, inputs: Inputs) -> Evaluation:
    """Run a program's model at each row of ``z``, shape ``(S, D)``, without gradients."""
    prototype, function = program.prototype, program.function
    observed: dict[str, Tensor] = {}

    def one(row: Tensor) -> dict[str, dict[str, Tensor]]:
        trace, log_det = function.trace(row, inputs)
        return _collect(trace, log_det, prototype)

    with torch.no_grad():
        trace, _ = function.trace(z[0], inputs)
        for name in prototype.observed:
            observed[name] = trace.nodes[name]["value"].detach()
        parts = [_batched(one, chunk, program.mode) for chunk in z.split(_chunk_size(trace))]
    joined: dict[str, dict[str, Tensor]] = {
        group: {name: torch.cat([p[group][name] for p in parts]) for name in parts[0][group]}
        for group in parts[0]
    }
    return Evaluation(
        latents=joined["latents"],
        deterministics=joined["deterministics"],
        log_prior=joined["totals"]["log_prior"],
        log_likelihood=joined["log_likelihood"],
        log_abs_det=joined["totals"]["log_abs_det"],
        plates=prototype.plates,
        event_dims=prototype.event_dims,
        observed=observed,
    )


def collect(
    program: Program, z: Tensor, inputs: Inputs, read: Callable[[Any], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Read tensors off the model's trace at each row of ``z``, without gradients.

    Args:
        program: The program.
        z: Shape ``(S, D)``.
        inputs: What else the model depends on.
        read: From a trace to tensors by name.

    Returns:
        The tensors of all rows, which they lead with.
    """

    def one(row: Tensor) -> dict[str, dict[str, Tensor]]:
        return {"": read(program.function.trace(row, inputs)[0])}

    with torch.no_grad():
        trace, _ = program.function.trace(z[0], inputs)
        parts = [_batched(one, chunk, program.mode)[""] for chunk in z.split(_chunk_size(trace))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _collect(trace: Any, log_det: Tensor, prototype: Prototype) -> dict[str, dict[str, Tensor]]:
    nodes = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
    prior = log_det.new_zeros(())
    for name, node in nodes.items():
        if name in prototype.discrete or _pyro.is_subsample(node) or is_data(node):
            continue
        if not _pyro.is_deterministic(node):
            prior = prior + node["log_prob_sum"]
    return {
        "latents": {s.name: nodes[s.name]["value"] for s in prototype.layout.sites},
        "deterministics": {
            name: node["value"]
            for name, node in nodes.items()
            if _pyro.is_deterministic(node)
            and node["value"].dim() <= prototype.event_dims[name] + prototype.max_plate_nesting
        },
        "totals": {"log_prior": prior, "log_abs_det": log_det},
        "log_likelihood": _log_likelihood(trace, nodes, prototype),
    }


def _log_likelihood(trace: Any, nodes: dict[str, Any], prototype: Prototype) -> dict[str, Tensor]:
    if prototype.discrete:
        return _pyro.enumerated_log_likelihood(
            trace, prototype.observed, prototype.discrete, prototype.max_plate_nesting
        )
    return {n: nodes[n]["unscaled_log_prob"] * _mask(nodes[n]) for n in prototype.observed}


def _mask(node: Any) -> Any:
    return 1.0 if node["mask"] is None else torch.as_tensor(node["mask"]).to(node["value"].device)


def _batched(
    one: Callable[[Tensor], dict[str, dict[str, Tensor]]], rows: Tensor, mode: Mode
) -> dict[str, dict[str, Tensor]]:
    first = one(rows[0])
    names = [(group, name) for group in first for name in first[group]]

    def flat(row: Tensor) -> tuple[Tensor, ...]:
        out = one(row)
        return tuple(out[group][name] for group, name in names)

    if mode == "vmap":
        columns = torch.func.vmap(flat)(rows)
    elif mode == "graph":
        columns = torch.func.vmap(capture_graph(flat, (rows[0],)))(rows)
    else:
        columns = tuple(map(torch.stack, zip(*map(flat, rows), strict=True)))
    joined: dict[str, dict[str, Tensor]] = {group: {} for group in first}
    for (group, name), column in zip(names, columns, strict=True):
        joined[group][name] = column
    return joined


def _chunk_size(trace: Any) -> int:
    elements: int = sum(
        node["value"].numel() for node in trace.nodes.values() if node["type"] == "sample"
    )
    return max(1, _CHUNK_ELEMENTS // max(1, elements))
