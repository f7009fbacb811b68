"""Every example runs, with little work, as its reader would run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs_and_saves_its_picture(script, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::pyro_mf.KhatWarning",
            str(script),
            "--smoke",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip(), "an example ends in a table or a picture"
