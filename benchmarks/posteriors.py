"""The 16 reference posteriors as Pyro models, written from their statistical definitions.

The data and the reference summaries come from a folder that is not part of this repository (set
``POSTERIORDB`` to it). Parameter names of the references, such as ``theta[3]``, are elements of the
sites (or deterministic sites) of the same name here, counted from 1.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import pad

DATA = Path(os.environ.get("POSTERIORDB", Path(__file__).parents[2] / "shared" / "posteriordb"))


class Posterior(NamedTuple):
    """A model, its arguments, and the reference summaries by parameter name."""

    name: str
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    reference: dict[str, dict[str, float]]


def load(name: str) -> Posterior:
    """Load one posterior, data in the default dtype."""
    model, keys = MODELS[name]
    reference = json.loads((DATA / "reference" / f"{name}.json").read_text())
    data = json.loads((DATA / "data" / f"{reference['data']}.json").read_text())
    args = tuple(torch.tensor(data[key]) for key in keys)
    columns = ("mean", "sd", "q05", "q50", "q95", "mcse_mean", "mcse_sd")
    table = {
        parameter: {column: reference[column][i] for column in columns}
        for i, parameter in enumerate(reference["params"])
    }
    return Posterior(name, model, tuple(_real(x) for x in args), table)


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.int64 and x.dim() else x.to(torch.get_default_dtype())


def flat(name: str, *shape: int, support: Any = constraints.real) -> Tensor:
    """An improper constant prior on a support."""
    if not shape:
        return pyro.sample(name, dist.ImproperUniform(support, (), ()))
    is_vector = support in (constraints.ordered_vector, constraints.positive_ordered_vector)
    whole = support if is_vector else constraints.independent(support, len(shape))
    return pyro.sample(name, dist.ImproperUniform(whole, (), shape))


def normal(loc: float, scale: float, *shape: int) -> Any:
    return dist.Normal(torch.full(shape, float(loc)), scale).to_event(len(shape))


def observe(name: str, fn: Any, value: Tensor) -> None:
    with pyro.plate(f"{name}_data", len(value)):
        pyro.sample(name, fn, obs=value)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        z = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def ar_k(y: Tensor, lags: Tensor) -> None:
    order = int(lags)
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", normal(0, 10, order))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    past = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    observe("y", dist.Normal(alpha + past @ beta, sigma), y[order:])


def arma11(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    error = y[0] - (mu + phi * mu)
    errors = [error]
    for t in range(1, len(y)):
        error = y[t] - (mu + phi * y[t - 1] + theta * error)
        errors.append(error)
    pyro.factor("errors", dist.Normal(0.0, sigma).log_prob(torch.stack(errors)).sum())


def kilpisjarvi(
    x: Tensor, y: Tensor, pmualpha: Tensor, psalpha: Tensor, pmubeta: Tensor, psbeta: Tensor
) -> None:
    alpha = pyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = pyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = flat("sigma", support=constraints.positive)
    observe("y", dist.Normal(alpha + beta * x, sigma), y)


def kidscore_interaction(score: Tensor, mom_hs: Tensor, mom_iq: Tensor) -> None:
    beta = flat("beta", 4)
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    x = torch.stack([torch.ones(len(score)), mom_hs, mom_iq, mom_hs * mom_iq], -1).to(beta)
    observe("score", dist.Normal(x @ beta, sigma), score.to(x))


def nes(
    partyid7: Tensor,
    real_ideo: Tensor,
    race_adj: Tensor,
    age: Tensor,
    educ1: Tensor,
    gender: Tensor,
    income: Tensor,
) -> None:
    beta = flat("beta", 9)
    sigma = flat("sigma", support=constraints.positive)
    ages = [(age == k).to(beta) for k in (2, 3, 4)]
    columns = [torch.ones(len(age)), real_ideo, race_adj, *ages, educ1, gender, income]
    x = torch.stack([c.to(beta) for c in columns], -1)
    observe("partyid7", dist.Normal(x @ beta, sigma), partyid7.to(beta))


def low_dim_gauss_mix(y: Tensor) -> None:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1 - theta])
    observe("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma)), y)


def hmm_drive(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    rows = [pyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k].to(u))) for k in range(2)]
    phi = flat("phi", 2, support=constraints.positive_ordered_vector)
    rate = flat("lambda", 2, support=constraints.positive_ordered_vector)
    centre = torch.tensor([0.0, 3.0])
    pyro.factor("phi_prior", dist.Normal(centre, 1.0).log_prob(phi).sum())
    pyro.factor("lambda_prior", dist.Normal(centre, 1.0).log_prob(rate).sum())
    emission = dist.Exponential(phi).log_prob(u[:, None])
    emission = emission + dist.Exponential(rate).log_prob(v[:, None])
    transition = torch.stack(rows).log()
    state = emission[0] - math.log(2.0)
    for t in range(1, len(u)):
        state = torch.logsumexp(state[:, None] + transition, 0) + emission[t]
    pyro.factor("drives", torch.logsumexp(state, 0))


def one_comp_mm_elim_abs(dose: Tensor, volume: Tensor, times: Tensor, observed: Tensor) -> None:
    unit = dist.HalfCauchy(1.0)
    k_a, k_m, v_m, sigma = (pyro.sample(n, unit) for n in ("k_a", "K_m", "V_m", "sigma"))

    def slope(t: Tensor, c: Tensor) -> Tensor:
        return dose * k_a * torch.exp(-k_a * t) / volume - v_m / volume * c / (k_m + c)

    c, t, curve = torch.zeros(()), torch.zeros(()), []
    for k, end in enumerate(times):
        # Steps of the classical Runge-Kutta method: many where the curve leaves zero, at which
        # elimination by a small K_m is fast. The log likelihood is right to 0.02.
        steps = 16 if k == 0 else 1
        h = (end - t) / steps
        for _ in range(steps):
            k1 = slope(t, c)
            k2 = slope(t + h / 2, c + h * k1 / 2)
            k3 = slope(t + h / 2, c + h * k2 / 2)
            k4 = slope(t + h, c + h * k3)
            c, t = c + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6, t + h
        curve.append(c)
    observe("C_hat", dist.LogNormal(torch.stack(curve).log(), sigma), observed)


def accel_gp(y: Tensor, x: Tensor, slambda: Tensor, x_sigma: Tensor, slambda_sigma: Tensor) -> None:
    def process(suffix: str, basis: Tensor, frequencies: Tensor) -> Tensor:
        half_t = dist.ImproperUniform(constraints.positive, (), ())
        sd = pyro.sample(f"sdgp_{suffix}1", half_t)
        pyro.factor(f"sdgp_{suffix}prior", dist.StudentT(3.0, 0.0, 36.0).log_prob(sd))
        length = pyro.sample(f"lscale_{suffix}1", dist.InverseGamma(1.124909, 0.0177))
        z = pyro.sample(f"zgp_{suffix}1", normal(0, 1, len(frequencies)))
        # The root of the spectral density by hand: the root of an underflow has no gradient.
        root = sd * (math.sqrt(2 * math.pi) * length).sqrt()
        root = root * torch.exp(-(length**2) * frequencies[:, 0] ** 2 / 4)
        return basis @ (root * z)

    intercept = pyro.sample("Intercept", dist.StudentT(3.0, -13.0, 36.0))
    f = intercept + process("", x, slambda)
    intercept_sigma = pyro.sample("Intercept_sigma", dist.StudentT(3.0, 0.0, 10.0))
    g = intercept_sigma + process("sigma_", x_sigma, slambda_sigma)
    observe("Y", dist.Normal(f, g.exp()), y)


def radon_hierarchical_noncentered(
    log_radon: Tensor, floor: Tensor, log_uppm: Tensor, county: Tensor
) -> None:
    mu = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", normal(0, 10, 2))
    with pyro.plate("county", 85):
        raw = pyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
        alpha = pyro.deterministic("alpha", mu + sigma_alpha * raw)
    mean = alpha[county - 1] + beta[0] * log_uppm + beta[1] * floor
    observe("log_radon", dist.Normal(mean, sigma_y), log_radon)


def radon_slope_centered(log_radon: Tensor, floor: Tensor, county: Tensor) -> None:
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_beta = pyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(1.0))
    with pyro.plate("county", 85):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    mean = alpha[county - 1] + beta[county - 1] * floor
    observe("log_radon", dist.Normal(mean, sigma_y), log_radon)


def surgical(r: Tensor, n: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    sigmasq = pyro.sample("sigmasq", dist.InverseGamma(0.001, 0.001))
    with pyro.plate("hospital", len(r)):
        b = pyro.sample("b", dist.Normal(mu, sigmasq.sqrt()))
        pyro.sample("r", dist.Binomial(n.to(b), logits=b), obs=r.to(b))


def capture_recapture(y: Tensor) -> None:
    num_animals, occasions = y.shape
    omega = pyro.sample("omega", dist.Uniform(0.0, 1.0))
    p = pyro.sample("mean_p", dist.Uniform(0.0, torch.ones(occasions)).to_event(1))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 3.0))
    with pyro.plate("animal", num_animals):
        eps = pyro.sample("eps", dist.Normal(0.0, sigma))
    y = y.to(eps)
    before = pad(y[:, :-1], (1, 0))
    logits = p.logit() + eps[:, None] + gamma * before
    seen = dist.Bernoulli(logits=logits).log_prob(y).sum(-1)
    real = omega.log() + seen
    ghost = torch.where(y.sum(-1) > 0, -torch.inf, (-omega).log1p())
    pyro.factor("captures", torch.logaddexp(real, ghost).sum())


def wells_dae_inter(switched: Tensor, distance: Tensor, arsenic: Tensor, educ: Tensor) -> None:
    alpha = flat("alpha")
    beta = flat("beta", 6)
    d, a, e = (distance - distance.mean()) / 100, arsenic - arsenic.mean(), educ.to(arsenic)
    e = (e - e.mean()) / 4
    x = torch.stack([d, a, e, d * a, d * e, a * e], -1)
    observe("switched", dist.Bernoulli(logits=alpha + x @ beta), switched.to(x))


MODELS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "eight_schools-eight_schools_centered": (eight_schools_centered, ("y", "sigma")),
    "eight_schools-eight_schools_noncentered": (eight_schools_noncentered, ("y", "sigma")),
    "arK-arK": (ar_k, ("y", "K")),
    "arma-arma11": (arma11, ("y",)),
    "kilpisjarvi_mod-kilpisjarvi": (
        kilpisjarvi,
        ("x", "y", "pmualpha", "psalpha", "pmubeta", "psbeta"),
    ),
    "kidiq-kidscore_interaction": (kidscore_interaction, ("kid_score", "mom_hs", "mom_iq")),
    "nes2000-nes": (
        nes,
        ("partyid7", "real_ideo", "race_adj", "age_discrete", "educ1", "gender", "income"),
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": (low_dim_gauss_mix, ("y",)),
    "bball_drive_event_0-hmm_drive_0": (hmm_drive, ("u", "v", "alpha")),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": (
        one_comp_mm_elim_abs,
        ("D", "V", "times", "C_hat"),
    ),
    "mcycle_gp-accel_gp": (
        accel_gp,
        ("Y", "Xgp_1", "slambda_1", "Xgp_sigma_1", "slambda_sigma_1"),
    ),
    "radon_mn-radon_hierarchical_intercept_noncentered": (
        radon_hierarchical_noncentered,
        ("log_radon", "floor_measure", "log_uppm", "county_idx"),
    ),
    "radon_mn-radon_variable_intercept_slope_centered": (
        radon_slope_centered,
        ("log_radon", "floor_measure", "county_idx"),
    ),
    "surgical_data-surgical_model": (surgical, ("r", "n")),
    "Mtbh_data-Mtbh_model": (capture_recapture, ("y",)),
    "wells_data-wells_dae_inter_model": (
        wells_dae_inter,
        ("switched", "dist", "arsenic", "educ"),
    ),
}
