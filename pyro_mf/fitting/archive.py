"""A fit as the content of a file, and back."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils._pytree import tree_flatten

from pyro_mf._errors import (
    CheckpointError,
    DifferentDataWarning,
    GuideMismatchError,
    LinearResponseError,
)
from pyro_mf.density import Layout
from pyro_mf.density.prototype import run_prototype
from pyro_mf.families import FAMILIES
from pyro_mf.fitting.checkpoint import read_file, write_file
from pyro_mf.fitting.problem import Problem, read_problem
from pyro_mf.fitting.restarts import Optimum
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.outcome import Outcome

if TYPE_CHECKING:
    from pyro_mf.fitting.result import FitResult

_OUTCOME = (
    "elbo",
    "elbo_se",
    "stop_reason",
    "message",
    "losses",
    "num_gradients",
    "seconds",
    "notes",
    "state",
)


def save_result(result: FitResult, path: Path) -> None:
    """See :meth:`pyro_mf.FitResult.save`."""
    problem, response = result.problem, result.response
    prototype = run_prototype(problem.model, problem.model_args, problem.model_kwargs)
    content = {
        "guide": _guide_content(problem.guide),
        "data": _digest(problem.model_args, problem.model_kwargs),
        "model_params": dict(prototype.params),
        "solver": result.solver,
        "reason": result.reason,
        "seed": result.seed,
        "best": result.best,
        "seconds": result.seconds,
        "notes": result.notes,
        "restarts": [
            {
                "seed": optimum.seed,
                "params": optimum.params,
                **{name: getattr(optimum.outcome, name) for name in _OUTCOME},
            }
            for optimum in result.restarts
        ],
        "response": None,
    }
    if isinstance(response, LinearResponse):
        content["response"] = {"loc": response.loc, "covariance": response.covariance}
    elif response is not None:
        content["response"] = {"error": str(response)}
    write_file(path, content)


def load_result(
    path: Path,
    model: Any,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    guide: Any | None,
) -> FitResult:
    """See :meth:`pyro_mf.FitResult.load`."""
    from pyro_mf.fitting.result import FitResult

    content = read_file(path)
    try:
        problem = _read_problem(path, content["guide"], model, model_args, model_kwargs, guide)
        restarts = tuple(_optimum(entry, problem.guide) for entry in content["restarts"])
        best = restarts[content["best"]]
        _check_data(path, content["data"], problem)
        _restore_guide(problem, content["guide"], best)
        _restore_model(problem, content["model_params"])
        return FitResult(
            problem=problem,
            solver=content["solver"],
            reason=content["reason"],
            seed=content["seed"],
            restarts=restarts,
            best=content["best"],
            seconds=content["seconds"],
            notes=tuple(content["notes"]),
            response=_response(content["response"]),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, TypeError) and not isinstance(content.get("guide"), dict):
            raise
        raise CheckpointError(
            f"'{path}' is damaged: {type(error).__name__} at {error}. Save the fit again."
        ) from error
