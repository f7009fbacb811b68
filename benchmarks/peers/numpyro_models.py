"""The posteriors as NumPyro models, with the sites of ``benchmarks.posteriors``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.scipy.special import logit, logsumexp
from numpyro.distributions import constraints

from benchmarks.logistic import PRIOR_SD


def flat(name: str, *shape: int, support: Any = constraints.real) -> Array:
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


def normal(name: str, loc: float, scale: float, *shape: int) -> Array:
    return numpyro.sample(name, dist.Normal(loc, scale).expand(shape).to_event(len(shape)))


def observe(fn: Any, value: Array) -> None:
    numpyro.sample("observed", fn, obs=value)


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    observe(dist.Normal(theta, sigma), y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(y)):
        z = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
    observe(dist.Normal(mu + tau * z, sigma), y)


def ar_k(y: Array, lags: Array) -> None:
    order = int(lags)
    alpha = normal("alpha", 0, 10)
    beta = normal("beta", 0, 10, order)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    past = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    observe(dist.Normal(alpha + past @ beta, sigma), y[order:])


def arma11(y: Array) -> None:
    mu = normal("mu", 0, 10)
    phi = normal("phi", 0, 2)
    theta = normal("theta", 0, 2)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(error: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        before, now = pair
        error = now - (mu + phi * before + theta * error)
        return error, error

    first = y[0] - (mu + phi * mu)
    _, rest = lax.scan(step, first, (y[:-1], y[1:]))
    errors = jnp.concatenate([first[None], rest])
    numpyro.factor("errors", dist.Normal(0.0, sigma).log_prob(errors).sum())


def kilpisjarvi(
    x: Array, y: Array, pmualpha: Array, psalpha: Array, pmubeta: Array, psbeta: Array
) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = numpyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = flat("sigma", support=constraints.positive)
    observe(dist.Normal(alpha + beta * x, sigma), y)


def kidscore_interaction(score: Array, mom_hs: Array, mom_iq: Array) -> None:
    beta = flat("beta", 4)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    x = jnp.stack([jnp.ones(len(score)), mom_hs, mom_iq, mom_hs * mom_iq], -1)
    observe(dist.Normal(x @ beta, sigma), score)


def nes(
    partyid7: Array,
    real_ideo: Array,
    race_adj: Array,
    age: Array,
    educ1: Array,
    gender: Array,
    income: Array,
) -> None:
    beta = flat("beta", 9)
    sigma = flat("sigma", support=constraints.positive)
    ages = [(age == k).astype(float) for k in (2, 3, 4)]
    columns = [jnp.ones(len(age)), real_ideo, race_adj, *ages, educ1, gender, income]
    observe(dist.Normal(jnp.stack(columns, -1) @ beta, sigma), partyid7)


def low_dim_gauss_mix(y: Array) -> None:
    mu = flat("mu", 2, support=constraints.ordered_vector)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = jnp.stack([theta, 1 - theta])
    observe(dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma)), y)


def hmm_drive(u: Array, v: Array, alpha: Array) -> None:
    rows = [numpyro.sample(f"theta{k + 1}", dist.Dirichlet(alpha[k])) for k in range(2)]
    phi = flat("phi", 2, support=constraints.positive_ordered_vector)
    rate = flat("lambda", 2, support=constraints.positive_ordered_vector)
    centre = jnp.array([0.0, 3.0])
    numpyro.factor("phi_prior", dist.Normal(centre, 1.0).log_prob(phi).sum())
    numpyro.factor("lambda_prior", dist.Normal(centre, 1.0).log_prob(rate).sum())
    emission = dist.Exponential(phi).log_prob(u[:, None])
    emission = emission + dist.Exponential(rate).log_prob(v[:, None])
    transition = jnp.log(jnp.stack(rows))

    def step(state: Array, scores: Array) -> tuple[Array, None]:
        return logsumexp(state[:, None] + transition, 0) + scores, None

    state, _ = lax.scan(step, emission[0] - jnp.log(2.0), emission[1:])
    numpyro.factor("drives", logsumexp(state, 0))


def one_comp_mm_elim_abs(dose: Array, volume: Array, times: Array, observed: Array) -> None:
    k_a, k_m, v_m, sigma = (
        numpyro.sample(n, dist.HalfCauchy(1.0)) for n in ("k_a", "K_m", "V_m", "sigma")
    )

    def slope(t: Array, c: Array) -> Array:
        return dose * k_a * jnp.exp(-k_a * t) / volume - v_m / volume * c / (k_m + c)

    steps = 8  # as in our model

    def step(state: tuple[Array, Array], h: Array) -> tuple[tuple[Array, Array], Array]:
        t, c = state
        k1 = slope(t, c)
        k2 = slope(t + h / 2, c + h * k1 / 2)
        k3 = slope(t + h / 2, c + h * k2 / 2)
        k4 = slope(t + h, c + h * k3)
        c = c + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return (t + h, c), c

    widths = jnp.repeat(jnp.diff(times, prepend=0.0) / steps, steps)
    _, curve = lax.scan(step, (0.0 * k_a, 0.0 * k_a), widths)
    observe(dist.LogNormal(jnp.log(curve[steps - 1 :: steps]), sigma), observed)


def accel_gp(y: Array, x: Array, slambda: Array, x_sigma: Array, slambda_sigma: Array) -> None:
    def process(suffix: str, basis: Array, frequencies: Array) -> Array:
        sd = flat(f"sdgp_{suffix}1", support=constraints.positive)
        numpyro.factor(f"sdgp_{suffix}prior", dist.StudentT(3.0, 0.0, 36.0).log_prob(sd))
        length = numpyro.sample(f"lscale_{suffix}1", dist.InverseGamma(1.124909, 0.0177))
        z = normal(f"zgp_{suffix}1", 0, 1, len(frequencies))
        root = sd * jnp.sqrt(jnp.sqrt(2 * jnp.pi) * length)
        return basis @ (root * jnp.exp(-(length**2) * frequencies[:, 0] ** 2 / 4) * z)

    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, -13.0, 36.0))
    f = intercept + process("", x, slambda)
    intercept_sigma = numpyro.sample("Intercept_sigma", dist.StudentT(3.0, 0.0, 10.0))
    g = intercept_sigma + process("sigma_", x_sigma, slambda_sigma)
    observe(dist.Normal(f, jnp.exp(g)), y)


def radon_hierarchical_noncentered(
    log_radon: Array, floor: Array, log_uppm: Array, county: Array
) -> None:
    mu = normal("mu_alpha", 0, 10)
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    beta = normal("beta", 0, 10, 2)
    with numpyro.plate("county", 85):
        raw = numpyro.sample("alpha_raw", dist.Normal(0.0, 1.0))
    mean = (mu + sigma_alpha * raw)[county - 1] + beta[0] * log_uppm + beta[1] * floor
    observe(dist.Normal(mean, sigma_y), log_radon)


def radon_slope_centered(log_radon: Array, floor: Array, county: Array) -> None:
    mu_alpha = normal("mu_alpha", 0, 10)
    mu_beta = normal("mu_beta", 0, 10)
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1.0))
    sigma_beta = numpyro.sample("sigma_beta", dist.HalfNormal(1.0))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1.0))
    with numpyro.plate("county", 85):
        alpha = numpyro.sample("alpha", dist.Normal(mu_alpha, sigma_alpha))
        beta = numpyro.sample("beta", dist.Normal(mu_beta, sigma_beta))
    observe(dist.Normal(alpha[county - 1] + beta[county - 1] * floor, sigma_y), log_radon)


def surgical(r: Array, n: Array) -> None:
    mu = normal("mu", 0, 1000)
    sigmasq = numpyro.sample("sigmasq", dist.InverseGamma(0.001, 0.001))
    with numpyro.plate("hospital", len(r)):
        b = numpyro.sample("b", dist.Normal(mu, jnp.sqrt(sigmasq)))
    observe(dist.Binomial(n, logits=b), r)


def capture_recapture(y: Array) -> None:
    num_animals, occasions = y.shape
    omega = numpyro.sample("omega", dist.Uniform(0.0, 1.0))
    p = numpyro.sample("mean_p", dist.Uniform(0.0, 1.0).expand([occasions]).to_event(1))
    gamma = normal("gamma", 0, 10)
    sigma = numpyro.sample("sigma", dist.Uniform(0.0, 3.0))
    with numpyro.plate("animal", num_animals):
        eps = numpyro.sample("eps", dist.Normal(0.0, sigma))
    before = jnp.pad(y[:, :-1], ((0, 0), (1, 0)))
    logits = logit(p) + eps[:, None] + gamma * before
    seen = dist.Bernoulli(logits=logits).log_prob(y).sum(-1)
    ghost = jnp.where(y.sum(-1) > 0, -jnp.inf, jnp.log1p(-omega))
    numpyro.factor("captures", jnp.logaddexp(jnp.log(omega) + seen, ghost).sum())


def wells_dae_inter(switched: Array, distance: Array, arsenic: Array, educ: Array) -> None:
    alpha = flat("alpha")
    beta = flat("beta", 6)
    d, a = (distance - distance.mean()) / 100, arsenic - arsenic.mean()
    e = (educ - educ.mean()) / 4
    x = jnp.stack([d, a, e, d * a, d * e, a * e], -1)
    observe(dist.Bernoulli(logits=alpha + x @ beta), switched)


def logistic_regression(x: Array, y: Array) -> None:
    beta = normal("beta", 0, PRIOR_SD, x.shape[-1])
    observe(dist.Bernoulli(logits=x @ beta), y)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        eight_schools_centered,
        eight_schools_noncentered,
        ar_k,
        arma11,
        kilpisjarvi,
        kidscore_interaction,
        nes,
        low_dim_gauss_mix,
        hmm_drive,
        one_comp_mm_elim_abs,
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
