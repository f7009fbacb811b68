"""The fingerprint changes when what a model sees changes, and not otherwise."""

from __future__ import annotations

import functools

import pyro
import torch

from pyro_mf.density.fingerprint import fingerprint

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
