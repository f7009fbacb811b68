"""One contender's fit in a process of its own: a task as JSON on stdin, the answer on stdout."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from benchmarks.peers.contract import Contender, Task

CONTENDERS = {
    "ours": ("ours", "Ours"),
    "stock Pyro": ("stock_pyro", "StockPyro"),
    "NumPyro": ("numpyro_svi", "NumPyro"),
    "PyMC ADVI": ("pymc_vi", "ADVI"),
    "DADVI": ("pymc_vi", "DADVI"),
}


def main() -> None:
    task = Task(**json.load(sys.stdin))
    warnings.filterwarnings("ignore")
    torch.set_default_dtype(torch.float64)
    module, name = CONTENDERS[task.contender]
    contender: Contender = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)(
        task
    )
    fits = [contender.fit()]
    for _ in range(task.repeats - 1):
        fits.append(contender.fit())
    points = {site: np.array(rows) for site, rows in task.points.items()}
    density = contender.log_density(points) if points else None
    answer = {"fits": [asdict(fit) for fit in fits], "log_density": density}
    print(json.dumps(answer, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist()


if __name__ == "__main__":
    main()
