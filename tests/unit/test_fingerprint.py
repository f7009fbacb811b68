"""The fingerprint changes when what a model sees changes, and not otherwise."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroSample

from pyro_mf.density.fingerprint import fingerprint
from pyro_mf.guides import AutoMeanField
from pyro_mf.objectives import ReverseKL

SETTING = 1.0


def reads_a_global() -> float:
    return SETTING


def calls_another() -> float:
    return reads_a_global()


class Owner:
    def __init__(self) -> None:
        self.data = torch.zeros(2)

    def model(self) -> torch.Tensor:
        return self.data


def test_rebinding_a_global_is_seen_through_functions(monkeypatch) -> None:
    before = fingerprint(calls_another)
    assert fingerprint(calls_another) == before
    monkeypatch.setitem(globals(), "SETTING", 2.0)
    assert fingerprint(calls_another) != before


def test_attributes_of_a_bound_method_are_seen() -> None:
    owner = Owner()
    before = fingerprint(owner.model)
    assert fingerprint(owner.model) == before
    owner.data += 1
    changed = fingerprint(owner.model)
    assert changed != before
    owner.data = torch.zeros(2)
    assert fingerprint(owner.model) != changed


def test_training_mode_and_buffers_of_a_module_are_seen_but_not_its_parameters() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    before = fingerprint(net)
    with torch.no_grad():
        net[0].weight += 1.0  # an optimiser's step; parameters are inputs of the graph
    assert fingerprint(net) == before
    net.gain = 2.0
    assert fingerprint(net) != before
    del net.gain
    net.eval()
    evaluating = fingerprint(net)
    assert evaluating != before
    net[1].running_mean += 1.0
    assert fingerprint(net) != evaluating


def test_wrapped_and_partial_models_are_looked_into(monkeypatch) -> None:
    partial = functools.partial(calls_another)
    scaled = pyro.poutine.scale(calls_another, scale=0.5)
    before = fingerprint(partial), fingerprint(scaled)
    assert (fingerprint(partial), fingerprint(scaled)) == before
    monkeypatch.setitem(globals(), "SETTING", 3.0)
    assert fingerprint(partial) != before[0]
    assert fingerprint(scaled) != before[1]


def test_functions_that_call_each_other_end() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n > 0 and even(n - 1)

    assert fingerprint(even) == fingerprint(even)


# -- globals, wherever they are read --------------------------------------------------------------


class Config:
    off = 0.0


cfg = types.ModuleType("some_settings")
cfg.off = 0.0
cfg.inner = types.ModuleType("some_settings.inner")
cfg.inner.off = 0.0
cfg.inner.parent = cfg


class Network(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 2)
        self.weight = PyroSample(dist.Normal(0.0, 1.0))
        self._gain = 1.0

    def forward(self) -> float:
        return SETTING


class Helped(PyroModule):
    def forward(self) -> float:
        return self.helper()

    def helper(self) -> float:
        return SETTING


class Scaled:
    factor = 1.0

    def __call__(self) -> float:
        return self.factor * SETTING

    def model(self) -> float:
        return self.helper

    @property
    def helper(self) -> float:
        return SETTING


def reads_it_in_a_function() -> Callable[[], float]:
    def inner() -> float:
        return SETTING

    return inner


def reads_it_in_a_lambda() -> Callable[[], float]:
    return lambda: SETTING


def reads_it_in_a_comprehension() -> list[float]:
    return [SETTING for _ in range(2)]


def one() -> float:
    return two()


def two() -> float:
    return three()


def three() -> float:
    return calls_another()


@pytest.mark.parametrize(
    "model",
    [
        Network(),
        Helped(),
        Scaled(),
        Scaled().model,
        reads_it_in_a_function,
        reads_it_in_a_lambda,
        reads_it_in_a_comprehension,
        one,
    ],
)
def test_a_global_is_seen_wherever_it_is_read(model, monkeypatch) -> None:
    before = fingerprint(model)
    assert fingerprint(model) == before
    monkeypatch.setitem(globals(), "SETTING", 2.0)
    assert fingerprint(model) != before


def test_attributes_of_classes_and_of_modules_are_seen(monkeypatch) -> None:
    models = (lambda: Config.off, lambda: cfg.off, lambda: cfg.inner.off, Scaled())
    before = [fingerprint(m) for m in models]
    assert [fingerprint(m) for m in models] == before
    for owner, name in ((Config, "off"), (cfg, "off"), (cfg.inner, "off"), (Scaled, "factor")):
        monkeypatch.setattr(owner, name, 2.0)
    assert all(fingerprint(m) != b for m, b in zip(models, before, strict=True))


# -- what modules and objects hold ----------------------------------------------------------------


def change_gain(net: Network) -> None:
    net._gain = 2.0


def change_prior(net: Network) -> None:
    net.weight = PyroSample(dist.Normal(1.0, 1.0))


def change_submodule(net: Network) -> None:
    net.linear = PyroModule[torch.nn.Linear](2, 2)


def change_parameter(net: Network) -> None:
    net.linear.bias = torch.nn.Parameter(torch.ones(2))


def freeze(net: Network) -> None:
    net.linear.bias.requires_grad_(False)


def add_a_hook(net: Network) -> None:
    net.linear.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [change_gain, change_prior, change_submodule, change_parameter, freeze, add_a_hook],
)
def test_changes_of_a_module_are_seen(change) -> None:
    net = Network()
    before = fingerprint(net)
    assert fingerprint(net) == before
    change(net)
    assert fingerprint(net) != before


def test_a_frozen_parameter_counts_by_version_and_a_learnt_one_does_not() -> None:
    net = Network()
    net.linear.bias.requires_grad_(False)
    before = fingerprint(net)
    with torch.no_grad():
        net.linear.weight.add_(1.0)
    assert fingerprint(net) == before
    net.linear.bias.add_(1.0)
    assert fingerprint(net) != before


def test_what_a_prior_function_closes_over_is_seen() -> None:
    scale = 1.0
    net = Network()
    net.weight = PyroSample(lambda _: dist.Normal(0.0, scale))
    before = fingerprint(net)
    assert fingerprint(net) == before
    scale = 2.0
    assert fingerprint(net) != before


@dataclass(slots=True)
class Slotted:
    size: float = 1.0


DEEP: dict[str, Any] = {"a": {"b": {"c": {"d": 1.0}}}}
LONG = [0.0] * 200
SHORT_ARRAY = np.zeros(4)
SLOTTED = Slotted()


def with_default(scale: list[float] = [1.0]) -> float:  # noqa: B006
    return scale[0]


def test_deep_and_long_structures_are_seen() -> None:
    def model() -> Any:
        return DEEP["a"], LONG[150], SHORT_ARRAY.sum(), SLOTTED.size, with_default()

    changes: list[Callable[[], Any]] = [
        lambda: DEEP["a"]["b"]["c"].update(d=2.0),
        lambda: DEEP["a"]["b"]["c"].update(d=True),
        lambda: LONG.__setitem__(150, 1.0),
        lambda: SHORT_ARRAY.__setitem__(2, 1.0),
        lambda: setattr(SLOTTED, "size", 2.0),
        lambda: with_default.__defaults__[0].__setitem__(0, 2.0),
    ]
    for change in changes:
        before = fingerprint(model)
        assert fingerprint(model) == before
        change()
        assert fingerprint(model) != before


def test_a_new_tensor_in_the_memory_of_an_old_one_is_seen() -> None:
    owner = Owner()
    before = fingerprint(owner.model)
    for _ in range(20):  # an identity is free for another object once its first one has gone
        owner.data = None  # no cycle holds it, so that its memory is free at once
        owner.data = torch.zeros(2)
        assert fingerprint(owner.model) != before


# -- what must not count --------------------------------------------------------------------------

PRIOR = dist.LogNormal(0.0, 1.0)


class Experiment:
    """A model as a method, beside what fits it."""

    def __init__(self) -> None:
        self.data = torch.tensor([0.5, 1.0])
        self.guide = AutoMeanField(self.model)
        self.loss = ReverseKL(backend="graph")
        self.svi = SVI(self.model, self.guide, pyro.optim.Adam({"lr": 0.01}), self.loss)

    def model(self) -> None:
        scale = pyro.sample("scale", PRIOR)
        with pyro.plate("data", len(self.data)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=self.data)


def test_training_beside_the_model_and_caches_of_transforms_do_not_count() -> None:
    experiment = Experiment()
    for _ in range(3):
        experiment.svi.step()
    before = fingerprint(experiment.model)
    captured = experiment.loss._captured[0].num_captures
    for _ in range(5):
        experiment.svi.step()
    assert fingerprint(experiment.model) == before
    assert experiment.loss._captured[0].num_captures == captured
