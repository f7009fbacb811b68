"""Importing the package changes nothing for the rest of the process."""

import json
import subprocess
import sys

PROBE = """
import json, logging, random, sys, warnings
import numpy, pyro, torch

def state():
    return {
        "pyro settings": pyro.settings.get(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "torch generator": hash(bytes(torch.get_rng_state().tolist())),
        "numpy generator": hash(numpy.random.get_state()[1].tobytes()),
        "python generator": hash(random.getstate()),
        "warning filters": [str(f) for f in warnings.filters],
        "root logger": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "torch logger": logging.getLogger("torch").level,
        "parameters": sorted(pyro.get_param_store().keys()),
    }

before = state()
import pyro_mf
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "loaded": [name for name in ("arviz", "xarray", "matplotlib", "nutpie") if name in sys.modules],
}))
"""


def test_import_changes_no_global_state_and_loads_nothing_heavy():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "loaded": []}
