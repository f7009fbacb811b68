"""What every test and doctest starts from, and a guard on what it leaves behind."""

import gc
import os
import signal

os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each, or they fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

# A job that a shell starts in the background ignores Ctrl-C, and tests that press it would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _global_state() -> dict[str, object]:
    """Everything in the process that a well-behaved library leaves as it was."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "open Pyro handlers": len(_PYRO_STACK),
        **{f"pyro setting {name}": value for name, value in pyro.settings.get().items()},
    }


def _restore(state: dict[str, object]) -> None:
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["gradient mode"])
    if torch.get_num_threads() != state["torch threads"]:
        torch.set_num_threads(state["torch threads"])
    if torch.are_deterministic_algorithms_enabled() != state["deterministic algorithms"]:
        torch.use_deterministic_algorithms(state["deterministic algorithms"])  # loads inductor
    del _PYRO_STACK[state["open Pyro handlers"] :]
    pyro.settings.set(**{name: state[f"pyro setting {name}"] for name in pyro.settings.get()})


def pytest_collection_finish():
    """Half a million objects of what was imported never become garbage; do not search them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_state(request):
    """Seed, an empty parameter store, validation on; tests run in float64, doctests as users do.

    A test that leaves global state changed fails here, and the state is put back.
    """
    outside = _global_state()
    if not isinstance(request.node, pytest.DoctestItem):
        torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    given = _global_state()
    yield
    left = _global_state()
    _restore(outside)
    changed = [
        f"{name}: {given[name]} -> {left[name]}" for name in given if given[name] != left[name]
    ]
    assert not changed, f"the test left global state changed: {'; '.join(changed)}"


@pytest.fixture
def few_evaluations(monkeypatch):
    """The ELBO at the end of a stochastic fit is not what the test is about: 64 draws at most."""
    monkeypatch.setattr("pyro_mf.solvers.stochastic._MAX_EVALUATIONS", 64)
