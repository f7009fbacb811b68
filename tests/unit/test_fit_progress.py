"""The progress bar: when it shows, what it says, and Ctrl-C while it does."""

import importlib
import io
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_mf.fitting import fit
from pyro_mf.fitting.progress import ProgressBar, describe, with_error
from pyro_mf.solvers.outcome import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


X = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)


def test_off_where_standard_error_is_no_terminal(capsys):
    fit(model, (X,))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("progress", "is_shown"), [(None, True), (False, False), (True, True)])
def test_on_in_a_terminal_unless_asked_not_to(monkeypatch, progress, is_shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fit(model, (X,), progress=progress)
    assert bool(terminal.getvalue()) is is_shown
    if is_shown:
        assert "fit: reading the model" in terminal.getvalue()


def test_on_in_a_notebook(monkeypatch):
    class Shell:
        kernel = "a kernel"

    class IPython:
        @staticmethod
        def get_ipython():
            return Shell()

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressBar() as bar:
        bar(Progress("before", 0, 0.0, 0.0))
    assert not stream.getvalue()
    monkeypatch.setitem(sys.modules, "IPython", IPython)
    assert ProgressBar()._shown


def test_says_which_start(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar() as bar:
        bar.labelled("start 2 of 4")(Progress("32 draws", 7, -3.0, 0.1))
    assert "start 2 of 4: 32 draws | ELBO -3.00 ± 0.10 | 7 gradients" in terminal.getvalue()


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("start", 0, float("nan"), float("nan")), "start"),
        (Progress("start", 3, float("nan"), float("nan")), "start | 3 gradients"),
        (Progress("64 draws", 30, -2.5, float("nan")), "64 draws | ELBO -2.50 | 30 gradients"),
        (Progress("64 draws", 30, float("inf"), 1.0), "64 draws | 30 gradients"),
    ],
)
def test_line(progress, text):
    assert describe(progress) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-34.5678, 0.5, "-34.57 ± 0.50"),
        (-34.5678, 0.0, "-34.57 ± 0.00"),
        (-34.5678, 5.0, "-34.6 ± 5.0"),
        (-1e6, 300.0, "-1000000 ± 300"),
        (1.0, 1e-12, "1.0000 ± 0.0000"),
        (float("nan"), float("nan"), "nan"),
    ],
)
def test_number_with_its_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize("solver", ["deterministic", "stochastic"])
def test_ctrl_c_returns_the_best_so_far(monkeypatch, solver):
    def interrupt(self, progress):
        if progress.gradients > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "__call__", interrupt)
    result = fit(model, (X,), solver=solver)
    assert result.stop_reason == "interrupted"
    assert torch.isfinite(result.guide.loc).all()
    assert "INTERRUPTED" in str(result)


def test_ctrl_c_during_linear_response_keeps_the_fit(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("pyro_mf.fitting.fit"), "respond", interrupt)
        result = fit(model, (X,))
    assert result.converged
    assert "call result.linear_response()" in str(result)
    assert torch.isfinite(result.linear_response().sd).all()
