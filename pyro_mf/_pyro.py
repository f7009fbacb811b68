"""The only file that touches undocumented Pyro.

Every function here wraps one thing that Pyro does not promise to keep, under a name of our own.
Written against pyro-ppl 1.9.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from opt_einsum import shared_intermediates  # type: ignore[import-untyped]
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.enum import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, effectful
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from pyro.util import check_site_shape as _check_site_shape
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Node = Any
"""One site of a trace, a dictionary."""


def is_subsample(node: Node) -> bool:
    """Whether a trace node is the hidden sample statement of a plate."""
    return bool(site_is_subsample(node))


def is_factor(node: Node) -> bool:
    """Whether a trace node is a ``pyro.factor`` statement."""
    return bool(site_is_factor(node))


def is_deterministic(node: Node) -> bool:
    """Whether a trace node is a ``pyro.deterministic`` statement."""
    return node["type"] == "sample" and bool(node["infer"].get("_deterministic"))


def check_site_shape(node: Node) -> None:
    """Raise Pyro's ValueError if the shape of a site's ``log_prob`` is not that of its plates.

    Raises:
        ValueError: If it is not.
    """
    _check_site_shape(node, max_plate_nesting=float("inf"))  # type: ignore[arg-type]


def is_enumerable(node: Node) -> bool:
    """Whether a latent node is discrete with a finite support that Pyro can sum out."""
    return bool(node["fn"].has_enumerate_support)


def param_leaf(node: Node) -> Tensor:
    """The unconstrained leaf tensor behind a ``param`` node."""
    value = node["value"]
    leaf = getattr(value, "_pyro_unconstrained_param", None)
    if leaf is None:
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
    return leaf  # type: ignore[no-any-return]


def is_current_leaf(name: str, leaf: Tensor, model: Any) -> bool:
    """Whether a model that reads parameter ``name`` today still gets this leaf tensor."""
    stored = pyro.get_param_store()._params.get(name)
    if stored is leaf:
        return True
    if isinstance(model, torch.nn.Module):
        return any(p is leaf for p in model.parameters())
    return False


def emit_param(name: str, leaf: Tensor) -> None:
    """Tell the handlers around us that parameter ``name`` was read, as ``pyro.param`` does.

    ``SVI.step`` collects the parameters to optimise this way.
    """
    value = torch.empty(0)
    value.unconstrained = weakref.ref(leaf)  # type: ignore[attr-defined]
    effectful(lambda: value, type="param")(name=name)


def handlers_around() -> list[Messenger]:
    """The effect handlers in force, except those that only collect parameters."""
    return [
        handler
        for handler in _PYRO_STACK
        if not (isinstance(handler, TraceMessenger) and handler.param_only)
    ]


@contextmanager
def substitute(hook: Callable[[Any], None]) -> Iterator[None]:
    """Run ``hook`` on the message of every sample statement, outside all handlers of the model."""

    class _Hook(Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            hook(msg)

    with _Hook():
        yield


def enumerated(
    model: Callable[..., Any], max_plate_nesting: int, *, sampled: frozenset[str] = frozenset()
) -> Callable[..., Any]:
    """The model with every discrete latent site enumerated in parallel.

    Args:
        model: The model.
        max_plate_nesting: Number of batch dimensions that its plates use.
        sampled: Discrete sites to leave as they are.
    """

    def leave(site: Node) -> Any:
        return {"enumerate": None} if site["name"] in sampled else {}

    configured = config_enumerate(poutine.infer_config(model, leave) if sampled else model)
    return poutine.enum(configured, first_available_dim=-1 - max_plate_nesting)  # type: ignore[no-any-return]


class Term(NamedTuple):
    """One summand of an enumerated log density.

    Args:
        value: A packed tensor, without dimensions of size one.
        dims: A symbol for each of its dimensions: of a plate, or of an enumerated site.
        plates: The symbols of the plates around it.
    """

    value: Tensor
    dims: str
    plates: frozenset[str]


def enumerated_terms(
    trace: Any, max_plate_nesting: int, *, kept: frozenset[str] = frozenset()
) -> list[Term]:
    """An enumerated trace's log density as a sum of terms, discrete sites summed out.

    Args:
        trace: The trace.
        max_plate_nesting: Number of batch dimensions that plates use.
        kept: Enumerated sites that are not summed out: terms depend on their values.

    Raises:
        ValueError: If a site's shape is not that of its plates.
        NotImplementedError: If sites in plates that cross cannot be summed out.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    summed = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    summed -= {enumerated_symbol(trace.nodes[name]) for name in kept}
    terms: list[Term] = []
    coupled: list[tuple[Node, frozenset[str]]] = []
    for node in trace.nodes.values():
        if node["type"] != "sample" or is_subsample(node):
            continue
        if is_validation_enabled():
            _check_site_shape(node, max_plate_nesting)
        plates = frozenset(
            trace.plate_to_symbol[frame.name]
            for frame in node["cond_indep_stack"]
            if frame.vectorized
        )
        log_prob = node["packed"]["log_prob"]
        if summed.isdisjoint(log_prob._pyro_dims):
            terms.append(Term(log_prob, log_prob._pyro_dims, plates))
        else:
            coupled.append((node, plates))
    for group in _connected(coupled, summed):
        terms += _summed_out(group, summed)
    return terms


def _connected(
    nodes: list[tuple[Node, frozenset[str]]], summed: set[str]
) -> list[list[tuple[Node, frozenset[str]]]]:
    """Groups of sites that share dimensions which are summed out, directly or by others."""
    groups: list[tuple[set[str], list[tuple[Node, frozenset[str]]]]] = []
    for node, plates in nodes:
        dims, members = summed.intersection(node["packed"]["log_prob"]._pyro_dims), [(node, plates)]
        apart = []
        for group in groups:
            if dims.isdisjoint(group[0]):
                apart.append(group)
            else:
                dims, members = dims | group[0], group[1] + members
        groups = [*apart, (dims, members)]
    return [members for _, members in groups]


def _summed_out(nodes: list[tuple[Node, frozenset[str]]], summed: set[str]) -> list[Term]:
    """Contract sites that share enumerated dimensions.

    A minibatch's scale belongs outside of the logarithm of a sum; masks belong inside. Where sites
    have different scales (tempering by hand), each has its own, inside.
    """
    scales = [node["scale"] for node, _ in nodes]
    is_common = all(s is scales[0] or (type(s) is float and s == scales[0]) for s in scales)
    scale = scales[0] if is_common else 1.0
    tree: OrderedDict[Any, list[Tensor]] = OrderedDict()
    for node, plates in nodes:
        factor = node["packed"]["unscaled_log_prob" if is_common else "log_prob"]
        if is_common and enumerated_dim(node) is None:
            factor = packed.scale_and_mask(factor, mask=node["packed"]["mask"])
        tree.setdefault(plates, []).append(factor)
    with shared_intermediates() as cache:
        contracted = contract_tensor_tree(tree, summed, cache=cache)
    return [
        Term(packed.scale_and_mask(value, scale=scale), value._pyro_dims, plates)
        for plates, values in contracted.items()
        for value in values
    ]


def enumerated_log_prob(trace: Any, max_plate_nesting: int) -> Tensor:
    """Log density of an enumerated trace, discrete sites summed out."""
    terms = enumerated_terms(trace, max_plate_nesting)
    return torch.stack([term.value.sum() for term in terms]).sum()


class Packed(NamedTuple):
    """A tensor without dimensions of size one, and a symbol for each that it has."""

    value: Tensor
    dims: str


def pack_like(value: Tensor, node: Node) -> Packed:
    """A tensor with a site's batch dimensions, packed as the site's own log density is.

    Args:
        value: The tensor.
        node: A site of a trace whose tensors are packed.
    """
    value = packed.pack(value[...], node["infer"]["_dim_to_symbol"])
    return Packed(value, value._pyro_dims)  # type: ignore[attr-defined]


def unpack_like(packed_value: Packed, node: Node) -> Tensor:
    """The inverse of :func:`pack_like`, up to leading dimensions of size one.

    Args:
        packed_value: The packed tensor.
        node: The site.
    """
    value = packed_value.value[...]
    value._pyro_dims = packed_value.dims  # type: ignore[attr-defined]
    dims = {symbol: dim for dim, symbol in node["infer"]["_dim_to_symbol"].items()}
    return packed.unpack(value, dims)  # type: ignore[no-any-return]


def enumerated_symbol(node: Node) -> str | None:
    """The symbol of the dimension along which a site is enumerated; ``None`` if it is not."""
    return node["infer"].get("_enumerate_symbol")  # type: ignore[no-any-return]


def enumerated_dim(node: Node) -> int | None:
    """The dimension of the log density along which a site is enumerated, from the right."""
    return node["infer"].get("_enumerate_dim")  # type: ignore[no-any-return]


def has_enumerated_dims(node: Node) -> bool:
    """Whether a site's log density may depend on enumerated values."""
    return node["type"] == "sample" and bool(node["infer"].get("_dim_to_id"))


def enumerated_log_likelihood(
    trace: Any, observed: tuple[str, ...], discrete: tuple[str, ...], max_plate_nesting: int
) -> dict[str, Tensor]:
    """Pointwise log likelihood of an enumerated trace, discrete latents summed out.

    Empty unless there is one observed site whose plates hold every discrete latent.
    """
    evaluator = TraceEinsumEvaluator(trace, True, max_plate_nesting)
    if len(observed) != 1:
        return {}
    target = evaluator.ordering[observed[0]]
    if any(evaluator.ordering[name] != target for name in discrete):
        return {}
    factors: OrderedDict[Any, list[Tensor]] = OrderedDict()
    for name in (*discrete, *observed):
        node = trace.nodes[name]
        factors.setdefault(evaluator.ordering[name], []).append(node["packed"]["log_prob"])
    with shared_intermediates() as cache:
        total = contract_to_tensor(
            factors, evaluator._enum_dims, target_ordinal=target, cache=cache
        )
    return {observed[0]: packed.unpack(total, trace.symbol_to_dim)}


# The parameters that a module of ours has registered in the global store.
_OWNED = WeakIdKeyDictionary()


def holds_parameters(module: Any, params: tuple[str, ...]) -> bool:
    """Whether a ``PyroModule``'s own parameters are those that the store has under its names."""
    if pyro.settings.get("module_local_params"):
        return True
    stored = pyro.get_param_store()._params
    for param in params:
        mine = module._parameters.get(f"{param}_unconstrained")
        if stored.get(f"{module._pyro_name}.{param}") is not mine or mine not in _OWNED:
            return False
    return True


def own_parameters(module: Any, params: tuple[str, ...]) -> None:
    """Make sure that a ``PyroModule`` and the global store agree on whose its parameters are.

    Pyro keys parameters by name, so a second module of the same name silently continues from the
    first one's values. Here a module whose names hold *another* module's parameters is renamed
    (``AutoMeanField_1``); entries that no module of this process made, as after
    ``param_store.load``, are taken over, which is what loading is for.

    Args:
        module: A ``PyroModule`` of which ``params`` are direct ``PyroParam`` attributes.
        params: Their names.
    """
    if holds_parameters(module, params):
        return  # the common case, at every step of an optimiser
    stored = pyro.get_param_store()._params
    own = [module._parameters.get(f"{p}_unconstrained") for p in params]

    def entries(name: str) -> list[tuple[Any, Any]]:
        return [(stored.get(f"{name}.{p}"), mine) for p, mine in zip(params, own, strict=True)]

    def is_free(name: str) -> bool:
        return all(e is None or e is mine or e not in _OWNED for e, mine in entries(name))

    base = re.sub(r"_\d+$", "", module._pyro_name)
    numbered = (f"{base}_{i}" for i in itertools.count(1))
    module._pyro_name = next(filter(is_free, itertools.chain([module._pyro_name, base], numbered)))
    _OWNED.update({mine: True for mine in own if mine is not None})


def name_anew(module: Any, base: str) -> None:
    """Give a ``PyroModule`` that has no parameters yet a name under which the store has none.

    Args:
        module: The module.
        base: The name, to which a number is added where it is taken.
    """
    taken = {name.split(".")[0] for name in pyro.get_param_store()}
    numbered = (f"{base}_{i}" for i in itertools.count(1))
    module._pyro_name = next(n for n in itertools.chain([base], numbered) if n not in taken)


def nuts_state(kernel: Any) -> tuple[float, float]:
    """Log joint at a NUTS kernel's current draw, and the phase's mean acceptance so far."""
    return -float(kernel._potential_energy_last), float(kernel._mean_accept_prob)


def plate_nesting(
    model: Callable[..., Any], guide_trace: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int:
    """Batch dimensions that plates of model and guide use, from one run without enumeration."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return max(
        (
            -(frame.dim or 0)
            for nodes in (trace.nodes, guide_trace.nodes)
            for node in nodes.values()
            if node["type"] == "sample"
            for frame in node["cond_indep_stack"]
            if frame.vectorized
        ),
        default=0,
    )


def scaled_and_masked(value: Tensor, node: Node) -> Tensor:
    """A per-batch-element quantity with the scale and mask of its site applied."""
    return scale_and_mask(value, node["scale"], node["mask"])  # type: ignore[no-any-return]


def without_init(model: Any) -> Any:
    """The model inside the one that a stock autoguide keeps, which draws initial values.

    They are overwritten by whoever runs it, but cannot be drawn under vmap or in a graph.
    """
    while isinstance(model, partial) and model.args and isinstance(model.args[0], InitMessenger):
        model = model.args[1]
    return model


def mcmc_call(mcmc: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of the last ``mcmc.run(...)``; ``None`` where it has not run."""
    if getattr(mcmc, "_samples", None) is None:
        return None
    return tuple(mcmc._args), dict(mcmc._kwargs)


def mcmc_divergences(mcmc: Any) -> list[list[int]] | None:
    """Per chain the draws that ended a divergent transition; ``None`` if the kernel keeps none."""
    if not all(d and "divergences" in d for d in mcmc._diagnostics):
        return None
    return [list(d["divergences"]) for d in mcmc._diagnostics]


@contextmanager
def full_plates() -> Iterator[None]:
    """Make every plate that is created inside visit all of its elements, in order.

    Whether the plate draws its indices or is given them. The size of a subsample is an argument of
    the plate that no message carries, so the function that reads it is replaced meanwhile; where
    such blocks nest, each puts back what it found.
    """
    own = SubsampleMessenger.__dict__["_subsample"]

    def full(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any = None,
        *device: Any,
    ) -> Any:
        return own.__func__(name, size, None, None, *device)

    SubsampleMessenger._subsample = staticmethod(full)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = own  # type: ignore[method-assign]


def subsampled_plates(trace: Any) -> dict[str, Tensor]:
    """Indices of the plates of which a trace visits only part, sequential ones included."""
    nodes = {n: node for n, node in trace.nodes.items() if is_subsample(node)}
    return {
        name: torch.as_tensor(node["value"])
        for name, node in nodes.items()
        if len(node["value"]) != node["fn"].size
    }
