"""Every example and benchmark runs, with little work, as its reader would run it."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def as_main(script, options, printed):
    """Run a script in this process, which is then of no further use."""
    with open(printed, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported, once for all, what takes examples seconds.

    It is no fork of this process: whatever tests have left here is not there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["arviz", "matplotlib.pyplot", "pyro_mf", "rich.table", "statsmodels.api"]
    )
    return context


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs_and_says_where_its_picture_is(script, tmp_path, processes):
    pictures, log = tmp_path / "pictures", tmp_path / "printed"
    options = ("--smoke", "--out", str(pictures))
    process = processes.Process(target=as_main, args=(script, options, log))
    process.start()
    process.join()
    printed = log.read_text()
    assert process.exitcode == 0, printed
    for picture in pictures.iterdir():
        assert str(picture) in printed
    assert list(pictures.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["svi_step", "nuts", "forward_oracles"])
def test_benchmark_runs(benchmark):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{benchmark}", "--smoke"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eight schools" in done.stdout
