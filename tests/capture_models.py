"""Models that are hard to capture, each with the mode in which it is expected to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from pyro.ops.special import safe_log
from torch import Tensor


class CaptureCase(NamedTuple):
    """A model, its arguments, how its draws are expected to be vectorised."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    mode: str
    is_frozen: bool = False


def cases() -> dict[str, Callable[[], CaptureCase]]:
    """Constructors, so that data take the dtype and seed of the test."""
    return dict(_CASES)


_CASES: dict[str, Callable[[], CaptureCase]] = {}
N = 20


def _case(mode: str, *, is_frozen: bool = False, **data: Callable[[], Tensor]) -> Any:
    def register(model: Callable[..., Any]) -> Callable[..., Any]:
        _CASES[model.__name__] = lambda: CaptureCase(
            model, tuple(make() for make in data.values()), mode, is_frozen
        )
        return model

    return register


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _codes(high: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, high, (N,))


@_case("vmap", x=_normal(N, 3))
def lkj_and_multivariate_normal(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    with pyro.plate("n", N):
        tril = scale.unsqueeze(-1) * corr
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=x)


@_case("vmap", y=_normal(N))
def dirichlet_mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("k", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("n", N):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
        pyro.sample("y", mixture, obs=y)


@_case("vmap", x=_normal(N), y=_normal(N))
def gaussian_process(x: Tensor, y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    cov = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + (noise**2 + 1e-6) * torch.eye(N)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(N), cov), obs=y)


@_case("vmap", y=_normal(N))
def autoregression_in_a_loop(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    for t in range(1, 8):
        pyro.sample(f"y{t}", dist.Normal(phi * y[t - 1], scale), obs=y[t])


class BayesianNetwork(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = PyroModule[torch.nn.Linear](2, 5)
        self.hidden.weight = PyroSample(dist.Normal(0.0, 1.0).expand([5, 2]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        self.out = PyroModule[torch.nn.Linear](5, 1)  # learnable, not a latent

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


_CASES["bayesian_network"] = lambda: CaptureCase(
    BayesianNetwork(), (torch.randn(N, 2), torch.randn(N)), "vmap"
)


@_case("vmap", y=_normal(N))
def von_mises(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.VonMises(0.0, 1.0))
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", N):
        pyro.sample("y", dist.VonMises(loc, concentration), obs=y)


@_case("vmap", y=_normal(N))
def masked_plate(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@_case("vmap", y=_normal(N))
def missing_values_masked(y: Tensor) -> None:
    y = torch.where(y > 1.0, torch.nan, y)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y.nan_to_num())


@_case("vmap", x=_normal(N, 2), counts=_codes(3))
def horseshoe_negative_binomial(x: Tensor, counts: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("p", 2):
        local = pyro.sample("local", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, local * tau))
    total = pyro.sample("total", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", N):
        pyro.sample("y", dist.NegativeBinomial(total, logits=x @ beta), obs=counts.to(x))


@_case("graph", y=_normal(N))
def enumerated_mixture(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("k", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("n", N):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


@_case("graph", y=_normal(N))
def enumerated_chain(y: Tensor) -> None:
    with pyro.plate("state", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    z: Any = 0
    for t in pyro.markov(range(5)):
        z = pyro.sample(f"z{t}", dist.Categorical(rows[z]))
        pyro.sample(f"y{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@_case("graph", x=_normal(N, 2), c=_codes(3))
def ordered_logistic(x: Tensor, c: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    ordered = dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
    cuts = pyro.sample("cuts", ordered)
    with pyro.plate("n", N):
        pyro.sample("y", dist.OrderedLogistic(x @ beta, cuts), obs=c)


@_case("vmap", y=_normal(N))
def improper_priors(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("n", N):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


@_case("graph", c=_codes(3))
def discrete_hmm(c: Tensor) -> None:
    with pyro.plate("state", 2):
        rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2)))
        emission = pyro.sample("emission", dist.Dirichlet(torch.ones(3)))
    start = torch.zeros(2) - torch.tensor(2.0).log()
    pyro.sample("y", dist.DiscreteHMM(start, rows.log(), dist.Categorical(emission)), obs=c)


@_case("vmap", y=_normal(N))
def gaussian_hmm(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    decay = pyro.sample("decay", dist.Uniform(0.0, 1.0))
    unit = dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1)
    step = dist.Normal(torch.zeros(1), scale.expand(1)).to_event(1)
    hmm = dist.GaussianHMM(unit, decay * torch.eye(1), step, torch.eye(1), unit, duration=8)
    pyro.sample("y", hmm, obs=y[:8].unsqueeze(-1))


@_case("vmap", y=_normal(N))
def reparametrised_with_deterministic_and_factor(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    config = {"theta": LocScaleReparam(0.0), "u": TransformReparam()}
    with poutine.reparam(config=config), pyro.plate("n", N):
        theta = pyro.sample("theta", dist.Normal(loc, scale))
        u = pyro.sample("u", dist.LogNormal(loc, 1.0))
        pyro.deterministic("total", theta + u)
        pyro.factor("penalty", -(theta**2))
        pyro.sample("y", dist.Normal(theta + u, 1.0), obs=y)


@_case("loop", c=_codes(3))
def discrete_hmm_with_impossible_steps(c: Tensor) -> None:
    # Exact zeros: only Pyro's own backward of its logarithm is finite there, which vmap cannot run.
    leave = pyro.sample("leave", dist.Beta(1.0, 1.0))
    stay, zero, one = 1 - leave, torch.zeros(()), torch.ones(())
    rows = torch.stack([stay, leave, zero, zero, stay, leave, zero, zero, one]).reshape(3, 3)
    emission = pyro.sample("emission", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    state = torch.tensor([1.0, 0.0, 0.0])
    total = torch.zeros(())
    for symbol in c[:4]:
        state = (state @ rows) * emission.index_select(1, symbol.reshape(1)).squeeze(1)
        total = total + safe_log(state).logsumexp(0)
    pyro.factor("y", total)


@_case("vmap", y=_normal(N))
def scaled_likelihood(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N), poutine.scale(scale=0.25):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def registered_module_and_params() -> CaptureCase:
    net = torch.nn.Linear(2, 1)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        width = pyro.param("width", torch.tensor(0.5), constraint=dist.constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, width))
        with pyro.plate("n", N):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1) + loc, 1.0), obs=y)

    return CaptureCase(model, (torch.randn(N, 2), torch.randn(N)), "vmap")


_CASES["registered_module_and_params"] = registered_module_and_params


@_case("vmap", is_frozen=True, y=_normal(N))
def control_flow_on_data(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    if y.mean() > 0:
        loc = loc + 1
    with pyro.plate("n", N):
        pyro.sample("y", dist.Normal(loc, float(y.std())), obs=y)


@_case("vmap", is_frozen=True, y=_normal(N))
def numpy_on_data(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = torch.as_tensor(y.detach().numpy().std())
    with pyro.plate("n", N):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


@_case("eager", y=_normal(N))
def control_flow_on_latents(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    if loc > 0:
        loc = 2 * loc
    with pyro.plate("n", N):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@_case("eager", y=_normal(N))
def random_numbers_inside(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("n", N):
        pyro.sample("y", dist.Normal(loc + torch.randn(()), 1.0), obs=y)
