"""Every family with every objective, solver and converter that its mathematics allows."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_mf as mf
from pyro_mf.families import FAMILIES, FullRank, LowRank
from pyro_mf.families.protocol import home_of

DATA = torch.tensor([0.4, 1.3, 0.9, 2.2, 0.7], dtype=torch.float64)


def real(x=DATA):
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[..., 0] + z[..., 1] * x + z[..., 2], 1.0), obs=x)


def positive(x=DATA):
    z = pyro.sample("z", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Gamma(z[..., 0], z[..., 1]), obs=x)


def unit_interval(x=DATA):
    z = pyro.sample("z", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(z), obs=(x > 0.8).to(x))


def simplex(x=DATA):
    z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Categorical(z), obs=torch.tensor([0, 1, 0, 2, 0, 1]))


def circular(x=DATA):
    z = pyro.sample("z", dist.VonMises(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.VonMises(z, 2.0), obs=x)


MODELS = {
    None: real,
    "positive": positive,
    "unit_interval": unit_interval,
    "simplex": simplex,
    "circular": circular,
}
CASES = [
    (name, FAMILIES[name]())
    for name in FAMILIES
    if home_of(FAMILIES[name]()) in MODELS  # discrete ones have tests of their own
]
CASES += [("slices", FullRank(over="slice")), ("rank 1", LowRank(rank=1))]
every_family = pytest.mark.parametrize("family", [f for _, f in CASES], ids=[n for n, _ in CASES])


def model_of(family):
    return MODELS[home_of(family)]


@pytest.fixture(scope="module")
def draws():
    """Posterior draws of every model, by the forward KL with the family that is at home there."""
    found = {}
    for home, model in MODELS.items():
        if home != "circular":
            pyro.clear_param_store()
            objective = mf.ForwardKL(backend="graph")
            found[home] = mf.fit(model, objective=objective).sample(4000, draws=True)
    return found


@every_family
@pytest.mark.parametrize("loss", [mf.ReverseKL, Trace_ELBO, TraceMeanField_ELBO, "stl", "snis"])
def test_objectives_of_svi(family, loss):
    objective = {
        "stl": lambda: mf.ReverseKL(num_particles=2, entropy="stl"),
        "snis": lambda: mf.ForwardKL(num_particles=8, estimator="snis", backend="graph"),
    }.get(loss, loss)()
    model = model_of(family)
    svi = SVI(model, mf.AutoMeanField(model, family=family), Adam({"lr": 0.01}), loss=objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mf.EstimatorWarning)  # few particles on a plain guide
        losses = [svi.step() for _ in range(2)]
    assert torch.isfinite(torch.tensor(losses)).all()
    for leaf in svi.guide.parameters():
        assert torch.isfinite(leaf).all()


@every_family
def test_fit_of_the_reverse_kl_and_what_its_result_offers(family, tmp_path):
    model = model_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mf.ConvergenceWarning)  # a histogram's density has jumps
        result = mf.fit(model, family=family)
    assert result.stop_reason == "converged" or family.name == "histogram"
    assert result.solver == "deterministic"
    assert result.elbo == result.elbo
    table = result.summary()
    assert (table["sd"] > 0).all()
    assert (table["5%"] <= table["95%"]).all()
    assert "posterior" in result.to_arviz(num_draws=50)
    result.save(tmp_path / "fit.pt")
    again = mf.FitResult.load(tmp_path / "fit.pt", model)
    for a, b in zip(again.guide.flat_params(), result.guide.flat_params(), strict=True):
        torch.testing.assert_close(a, b)
    assert again.guide.families == result.guide.families
    assert repr(result)


@every_family
def test_fit_of_the_forward_kl(family, draws):
    if home_of(family) == "circular":
        pytest.skip("angles have no moments to match; the next test is theirs")
    model, known = model_of(family), draws[home_of(family)]
    objective = mf.ForwardKL(backend="graph")
    result = mf.fit(model, family=family, objective=objective, draws=known)
    assert result.solver == "moment_matching"
    # The factors' medians are the draws'; what a family cannot follow is its shape.
    median = result.guide.median()["z"]
    sd = known["z"].std(0)
    assert ((median - known["z"].median(0).values).abs() < 0.35 * sd).all()
    assert (result.summary()["sd_draws"] > 0).all()


def test_angles_by_the_forward_kl_in_svi():
    guide = mf.AutoMeanField(circular, family="von_mises").setup()
    svi = SVI(
        circular,
        guide,
        Adam({"lr": 0.05}),
        loss=mf.ForwardKL(num_particles=64, estimator="snis", backend="graph"),
    )
    for _ in range(300):
        svi.step()
    cosine, sine = 1.0 + (2.0 * DATA.cos()).sum(), (2.0 * DATA.sin()).sum()
    loc, concentration = guide.flat_params()
    exact = torch.atan2(sine, cosine), torch.hypot(sine, cosine)
    assert float(loc.detach()) == pytest.approx(float(exact[0]), abs=0.05)
    assert float(concentration.detach()) == pytest.approx(float(exact[1]), rel=0.15)
