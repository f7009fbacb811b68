"""The posteriors as PyMC models, with the sites of ``benchmarks.posteriors``.

Three are left out because they need a loop over time or an ordered vector of positive numbers: the
ARMA process, the hidden Markov model and the differential equation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.distributions.transforms import ordered

from benchmarks.logistic import PRIOR_SD

Array = np.ndarray


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    theta = pm.Normal("theta", mu, tau, shape=len(y))
    pm.Normal("y", theta, sigma, observed=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = pm.Normal("mu", 0, 5)
    tau = pm.HalfCauchy("tau", 5)
    z = pm.Normal("theta_trans", 0, 1, shape=len(y))
    pm.Normal("y", mu + tau * z, sigma, observed=y)


def ar_k(y: Array, lags: Array) -> None:
    order = int(lags)
    alpha = pm.Normal("alpha", 0, 10)
    beta = pm.Normal("beta", 0, 10, shape=order)
    sigma = pm.HalfCauchy("sigma", 2.5)
    past = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    pm.Normal("y", alpha + past @ beta, sigma, observed=y[order:])


def kilpisjarvi(
    x: Array, y: Array, pmualpha: Array, psalpha: Array, pmubeta: Array, psbeta: Array
) -> None:
    alpha = pm.Normal("alpha", pmualpha, psalpha)
    beta = pm.Normal("beta", pmubeta, psbeta)
    sigma = pm.HalfFlat("sigma")
    pm.Normal("y", alpha + beta * x, sigma, observed=y)


def kidscore_interaction(score: Array, mom_hs: Array, mom_iq: Array) -> None:
    beta = pm.Flat("beta", shape=4)
    sigma = pm.HalfCauchy("sigma", 2.5)
    x = np.stack([np.ones(len(score)), mom_hs, mom_iq, mom_hs * mom_iq], -1)
    pm.Normal("score", x @ beta, sigma, observed=score)


def nes(
    partyid7: Array,
    real_ideo: Array,
    race_adj: Array,
    age: Array,
    educ1: Array,
    gender: Array,
    income: Array,
) -> None:
    beta = pm.Flat("beta", shape=9)
    sigma = pm.HalfFlat("sigma")
    ages = [(age == k).astype(float) for k in (2, 3, 4)]
    columns = [np.ones(len(age)), real_ideo, race_adj, *ages, educ1, gender, income]
    pm.Normal("partyid7", np.stack(columns, -1) @ beta, sigma, observed=partyid7)


def low_dim_gauss_mix(y: Array) -> None:
    mu = pm.Normal("mu", 0, 2, shape=2, transform=ordered, initval=[-1.0, 1.0])
    sigma = pm.HalfNormal("sigma", 2, shape=2)
    theta = pm.Beta("theta", 5, 5)
    parts = pm.Normal.dist(mu, sigma, shape=2)
    pm.Mixture("y", w=pt.stack([theta, 1 - theta]), comp_dists=parts, observed=y)


def accel_gp(y: Array, x: Array, slambda: Array, x_sigma: Array, slambda_sigma: Array) -> None:
    def process(suffix: str, basis: Array, frequencies: Array) -> Any:
        sd = pm.HalfStudentT(f"sdgp_{suffix}1", nu=3.0, sigma=36.0)
        length = pm.InverseGamma(f"lscale_{suffix}1", 1.124909, 0.0177)
        z = pm.Normal(f"zgp_{suffix}1", 0, 1, shape=len(frequencies))
        root = sd * pt.sqrt(np.sqrt(2 * np.pi) * length)
        return basis @ (root * pt.exp(-(length**2) * frequencies[:, 0] ** 2 / 4) * z)

    intercept = pm.StudentT("Intercept", nu=3.0, mu=-13.0, sigma=36.0)
    f = intercept + process("", x, slambda)
    intercept_sigma = pm.StudentT("Intercept_sigma", nu=3.0, mu=0.0, sigma=10.0)
    g = intercept_sigma + process("sigma_", x_sigma, slambda_sigma)
    pm.Normal("Y", f, pt.exp(g), observed=y)


def radon_hierarchical_noncentered(
    log_radon: Array, floor: Array, log_uppm: Array, county: Array
) -> None:
    mu = pm.Normal("mu_alpha", 0, 10)
    sigma_alpha = pm.HalfNormal("sigma_alpha", 1)
    sigma_y = pm.HalfNormal("sigma_y", 1)
    beta = pm.Normal("beta", 0, 10, shape=2)
    raw = pm.Normal("alpha_raw", 0, 1, shape=85)
    mean = (mu + sigma_alpha * raw)[county - 1] + beta[0] * log_uppm + beta[1] * floor
    pm.Normal("log_radon", mean, sigma_y, observed=log_radon)


def radon_slope_centered(log_radon: Array, floor: Array, county: Array) -> None:
    mu_alpha = pm.Normal("mu_alpha", 0, 10)
    mu_beta = pm.Normal("mu_beta", 0, 10)
    sigma_alpha = pm.HalfNormal("sigma_alpha", 1)
    sigma_beta = pm.HalfNormal("sigma_beta", 1)
    sigma_y = pm.HalfNormal("sigma_y", 1)
    alpha = pm.Normal("alpha", mu_alpha, sigma_alpha, shape=85)
    beta = pm.Normal("beta", mu_beta, sigma_beta, shape=85)
    mean = alpha[county - 1] + beta[county - 1] * floor
    pm.Normal("log_radon", mean, sigma_y, observed=log_radon)


def surgical(r: Array, n: Array) -> None:
    mu = pm.Normal("mu", 0, 1000)
    sigmasq = pm.InverseGamma("sigmasq", 0.001, 0.001)
    b = pm.Normal("b", mu, pt.sqrt(sigmasq), shape=len(r))
    pm.Binomial("r", n=n, logit_p=b, observed=r)


def capture_recapture(y: Array) -> None:
    num_animals, occasions = y.shape
    omega = pm.Uniform("omega", 0, 1)
    p = pm.Uniform("mean_p", 0, 1, shape=occasions)
    gamma = pm.Normal("gamma", 0, 10)
    sigma = pm.Uniform("sigma", 0, 3)
    eps = pm.Normal("eps", 0, sigma, shape=num_animals)
    before = np.pad(y[:, :-1], ((0, 0), (1, 0)))
    logits = pm.math.logit(p) + eps[:, None] + gamma * before
    seen = pm.logp(pm.Bernoulli.dist(logit_p=logits), y).sum(-1)
    real = pt.log(omega) + seen
    both = pt.logaddexp(real, pt.log1p(-omega))
    pm.Potential("captures", pt.where(y.sum(-1) > 0, real, both).sum())


def wells_dae_inter(switched: Array, distance: Array, arsenic: Array, educ: Array) -> None:
    alpha = pm.Flat("alpha")
    beta = pm.Flat("beta", shape=6)
    d, a = (distance - distance.mean()) / 100, arsenic - arsenic.mean()
    e = (educ - educ.mean()) / 4
    x = np.stack([d, a, e, d * a, d * e, a * e], -1)
    pm.Bernoulli("switched", logit_p=alpha + x @ beta, observed=switched)


def logistic_regression(x: Array, y: Array) -> None:
    beta = pm.Normal("beta", 0, PRIOR_SD, shape=x.shape[-1])
    pm.Bernoulli("y", logit_p=x @ beta, observed=y)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        eight_schools_centered,
        eight_schools_noncentered,
        ar_k,
        kilpisjarvi,
        kidscore_interaction,
        nes,
        low_dim_gauss_mix,
        accel_gp,
        radon_hierarchical_noncentered,
        radon_slope_centered,
        surgical,
        capture_recapture,
        wells_dae_inter,
        logistic_regression,
    )
}
"""By the name of our model's function."""
