"""How a guide's factors of discrete sites are integrated: summed over, or drawn where that fails.

Whether a model can be run with its discrete sites enumerated is tried, not assumed: a run with
them enumerated must give, at several settings of the sites, what plain runs give.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_mf import _pyro
from pyro_mf._errors import NonFiniteError, ScoreGradientWarning
from pyro_mf.density.checks import headline
from pyro_mf.density.dispatch import DispatchMode
from pyro_mf.objectives.enumeration import Fn, NotEnumerableError, enumerate_joint

# An enumerated tensor may have so many elements, or so many times those of the largest tensor of
# a plain run.
_MAX_ELEMENTS, _MAX_GROWTH = 2**20, 64
# Settings at which runs are compared: all sites at their first value, all at the last, and random.
_NUM_RANDOM_SETTINGS = 2
_ROUNDINGS = 100.0  # by which two sums of the same numbers may differ
_FAILURES = (ValueError, RuntimeError, IndexError, TypeError, KeyError)


@dataclass(frozen=True)
class Plan:
    """Which discrete sites of a guide are summed over.

    Args:
        enumerated: Sites that are summed over, exactly.
        drawn: Why each of the others is drawn, by name.
        nesting: Number of batch dimensions that plates of model and guide use; infinite where it
            is not known.
    """

    enumerated: frozenset[str] = frozenset()
    drawn: Mapping[str, str] = field(default_factory=dict)
    nesting: float = math.inf

    @property
    def sites(self) -> frozenset[str]:
        """All discrete sites that have factors."""
        return self.enumerated.union(self.drawn)


def make_plan(
    model: Fn, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], nesting: float
) -> Plan:
    """Find the discrete sites of a guide that can be summed over, as many as can be together.

    Args:
        model: The model.
        guide: A guide with ``discrete_sites``, set up.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        nesting: Number of batch dimensions that plates use, infinite where it is not known.

    Warns:
        ScoreGradientWarning: If some have to be drawn; says why.
    """
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        if math.isinf(nesting):
            nesting = _pyro.plate_nesting(model, trace, args, kwargs)
        trial = _Trial(model, guide, trace, args, kwargs, int(nesting))
        names = [site.name for site in guide.discrete_sites if site.name in trace]
        reason = trial.reason_against(frozenset(names))
        if reason is None:
            return Plan(frozenset(names), nesting=nesting)
        kept: frozenset[str] = frozenset()
        drawn = {}
        for name in names:
            if len(names) > 1:
                reason = trial.reason_against(kept | {name})
            if reason is None:
                kept |= {name}
            else:
                drawn[name] = reason
    _warn(drawn)
    return Plan(kept, drawn, nesting)


def _warn(drawn: Mapping[str, str]) -> None:
    first, reason = next(iter(drawn.items()))
    others = f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
    warnings.warn(
        f"discrete site '{first}'{others} cannot be summed over: {reason}. It is drawn instead, "
        "with score gradients (leave-one-out baseline over particles), which are right but noisy: "
        "use many particles, as in ReverseKL(num_particles=16).",
        ScoreGradientWarning,
        stacklevel=2,
    )


class _Trial:
    """Plain runs of a model at several settings of its discrete sites, and runs to compare."""

    def __init__(
        self,
        model: Fn,
        guide: Any,
        trace: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        nesting: int,
    ) -> None:
        self._model, self._args, self._kwargs, self._nesting = model, args, kwargs, nesting
        self._sites = [site for site in guide.discrete_sites if site.name in trace]
        self._settings = self._make_settings(trace)
        self._plain: list[float] = []
        with _Sizes(None) as sizes:
            for setting in self._settings:
                try:
                    joint = enumerate_joint(model, setting, args, kwargs, nesting)
                    self._plain.append(float(sum(term.value.sum() for term in joint.terms)))
                except NonFiniteError:
                    self._plain.append(math.nan)  # values that are impossible together
        self._limit = max(_MAX_ELEMENTS, _MAX_GROWTH * sizes.largest)

    def reason_against(self, kept: frozenset[str]) -> str | None:
        """Why some sites cannot be summed over together; ``None`` if they can."""
        if not kept:
            return None
        if not any(map(math.isfinite, self._plain)):
            return "the model has no finite log density at any of the values that were tried"
        try:
            with _Sizes(self._limit):
                for setting, plain in zip(self._settings, self._plain, strict=True):
                    if math.isfinite(plain) and not self._agrees(setting, plain, kept):
                        return (
                            "run with all values at once, the model gives another log density than "
                            "with one (a sum over a plate, or a shape that is taken for granted?)"
                        )
        except (NotEnumerableError, NonFiniteError) as error:
            return str(error)
        except _FAILURES as error:
            return f"run with all values at once, the model fails ({headline(error).strip(':')})"
        return None

    def _agrees(self, setting: Any, plain: float, kept: frozenset[str]) -> bool:
        joint = enumerate_joint(
            self._model, setting, self._args, self._kwargs, self._nesting, kept=kept
        )
        at_setting = {}
        for symbol, node in joint.nodes.items():
            value = setting.nodes[node["name"]]["value"]
            hit = node["value"] == value
            hit = hit.all(-1) if node["fn"].event_shape else hit
            at_setting[symbol] = _pyro.pack_like(hit.to(torch.get_default_dtype()), node)
        try:
            total = float(joint.expectation(at_setting))
        except NonFiniteError:
            return False
        rounding = max(torch.finfo(term.value.dtype).eps for term in joint.terms)
        finite = [term.value[torch.isfinite(term.value)].abs().sum() for term in joint.terms]
        return abs(total - plain) <= _ROUNDINGS * rounding * (1.0 + float(sum(finite)))

    def _make_settings(self, trace: Any) -> list[Any]:
        """Traces of the guide with chosen values of its discrete sites, and fixed minibatches."""
        generator = torch.Generator().manual_seed(0)
        hidden = poutine.trace(poutine.replay(self._model, trace=trace))
        for name, node in hidden.get_trace(*self._args, **self._kwargs).nodes.items():
            if node["type"] == "sample" and _pyro.is_subsample(node) and name not in trace:
                trace.add_node(name, **node)
        settings = []
        for number in range(2 + _NUM_RANDOM_SETTINGS):
            setting = trace.copy()
            for site in self._sites:
                changed: Any = dict(trace.nodes[site.name])
                shape, k = changed["fn"].batch_shape, site.num_values
                if number < 2:
                    index = torch.full(shape, (0, k - 1)[number])
                else:
                    index = torch.randint(k, shape, generator=generator)
                changed["value"] = site.value_of(index).to(changed["value"])
                setting.remove_node(site.name)
                setting.add_node(site.name, **changed)
            settings.append(setting)
        return settings


class _Sizes(DispatchMode):
    """Notes the largest tensor that is made, and refuses, before it is made, one over a limit."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = limit
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.pointwise in func.tags:
            shapes = [x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self._check(torch.broadcast_shapes(*shapes).numel())
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self._check(x.numel())
        return out

    def _check(self, size: int) -> None:
        """Take note of a size.

        Raises:
            NotEnumerableError: If it is over the limit.
        """
        self.largest = max(self.largest, size)
        if self.limit is not None and size > self.limit:
            raise NotEnumerableError(
                f"a tensor over all values at once would have {size} elements, more than the "
                f"{self.limit} that are allowed (2^20, or 64 times the largest of a plain run)"
            )


def score_surrogate(signals: list[Tensor], log_probs: list[Tensor]) -> Tensor:
    r"""A zero whose gradient is the score estimate of that of a mean of expectations.

    With draws :math:`k_s` and signals :math:`f_s`: the gradient of
    :math:`\tfrac1S \sum_s (f_s - \bar f_{-s}) \log q(k_s)`, in which the mean of all others is
    the baseline of each.

    Args:
        signals: What was averaged, one per draw, at least 2.
        log_probs: Log probability of each draw.

    References:
        Kool, van Hoof and Welling (2019), Buy 4 REINFORCE Samples, Get a Baseline for Free!,
        https://openreview.net/forum?id=r1lgTGL5DE
        Richter et al. (2020), VarGrad: A Low-Variance Gradient Estimator for Variational Inference,
        https://arxiv.org/abs/2010.10436
    """
    signal = torch.stack(signals).detach()
    log_prob = torch.stack(log_probs)
    count = len(signal)
    advantage = (signal - signal.mean()) * (count / (count - 1))
    return (advantage * (log_prob - log_prob.detach())).mean()
