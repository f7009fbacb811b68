"""The Python blocks of the README and the manual run, page by page, in order."""

import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import pyro_mf

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[str]:
    """Each block, moved down to its lines in the page, where a traceback then points."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match.group(1)


PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if any(blocks(p))]


@pytest.fixture
def float32():
    """The default dtype that a reader has."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def short_chains(monkeypatch):
    """Enough draws to be compared with; what the pages say about the numbers is not tested here."""
    whole = pyro_mf.run_nuts

    def run_nuts(*args, num_samples=60, warmup_steps=60, **settings):
        few, warmup = min(num_samples, 60), min(warmup_steps, 60)
        return whole(*args, num_samples=few, warmup_steps=warmup, **settings)

    monkeypatch.setattr(pyro_mf, "run_nuts", run_nuts)


@pytest.fixture
def few_simulations(monkeypatch):
    """As few data sets to calibrate on, for the same reason: how many changes no road taken."""
    whole = pyro_mf.calibrate

    def calibrate(model, simulate=None, num_simulations=20, **settings):
        return whole(model, simulate, min(num_simulations, 20), **settings)

    monkeypatch.setattr(pyro_mf, "calibrate", calibrate)


@pytest.mark.usefixtures("float32", "short_chains", "few_simulations")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)
    plt.close("all")
