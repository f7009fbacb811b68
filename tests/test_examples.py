"""Every example and benchmark runs, with little work, as its reader would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs_and_says_where_its_picture_is(script, tmp_path):
    printed = run(str(script), "--smoke", "--out", str(tmp_path))
    for picture in tmp_path.iterdir():
        assert str(picture) in printed
    assert list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["svi_step", "nuts", "forward_oracles"])
def test_benchmark_runs(benchmark):
    assert "eight schools" in run("-m", f"benchmarks.{benchmark}", "--smoke")
