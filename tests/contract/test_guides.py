"""Every guide, on every kind of latent site, through every public method."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.enum import config_enumerate

from pyro_mf.guides import AutoMeanField, FactorisedGuide
from tests.cases import MODELS, ModelCase

GUIDES = {"AutoMeanField": AutoMeanField}

pytestmark = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())
every_model = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
PLAIN = {name: case for name, case in MODELS.items() if case.is_plain}
plain_models = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())


def set_up(make, case: ModelCase):
    """A guide with parameters that are not the defaults, and the model's arguments."""
    args = case.args()
    guide = make(case.model, init_scale=0.3).setup(*args)
    with torch.no_grad():
        guide.loc_unconstrained.add_(torch.linspace(-0.5, 0.7, guide.layout.size))
    return guide, args


def latents_of(trace):
    return {
        name: node
        for name, node in trace.iter_stochastic_nodes()
        if type(node["fn"]).__name__ != "_Subsample"
    }


@every_model
def test_sites_are_those_of_the_model(make, case):
    guide, args = set_up(make, case)
    assert isinstance(guide, FactorisedGuide)
    trace = poutine.trace(guide).get_trace(*args)
    with pyro.validation_enabled(False):
        init = {n: node["value"] for n, node in latents_of(trace).items()}
        model = poutine.trace(poutine.condition(case.model, init)).get_trace(*args)
    sites = latents_of(trace)
    assert list(sites) == [site.name for site in guide.layout.sites]
    for name, node in sites.items():
        prior = model.nodes[name]["fn"]
        assert node["fn"].batch_shape == prior.batch_shape
        assert node["fn"].event_shape == prior.event_shape
        assert node["value"].shape == model.nodes[name]["value"].shape
        assert prior.support.check(node["value"]).all()
        assert node["fn"].has_rsample


@every_model
def test_full_size_draws_and_summaries_lie_in_the_support(make, case):
    guide, args = set_up(make, case)
    draws = guide.sample_posterior(7)
    quantiles = guide.quantiles([0.05, 0.5, 0.95])
    for site in guide.layout.sites:
        assert draws[site.name].shape == (7, *site.shape)
        assert guide.median()[site.name].shape == site.shape
        assert quantiles[site.name].shape == (3, *site.shape)
        for value in (draws, quantiles, guide.median(*args)):
            assert site.support.check(value[site.name]).all()
            assert not value[site.name].requires_grad
        if site.event_dim == 0:
            assert (quantiles[site.name].diff(dim=0) > 0).all()
    torch.testing.assert_close(
        {k: v[1] for k, v in quantiles.items()}, guide.median(), rtol=0, atol=0
    )


@every_model
def test_density_agrees_with_the_transformed_normal(make, case):
    guide, _ = set_up(make, case)
    z = guide.sample_unconstrained(5)
    assert z.shape == (5, guide.layout.size)
    expected = torch.distributions.Normal(guide.loc, guide.scale).log_prob(z).sum(-1)
    torch.testing.assert_close(guide.log_prob_unconstrained(z), expected)
    torch.testing.assert_close(guide.get_posterior().log_prob(z), expected)
    log_det = 0.0
    unconstrained, values = guide.layout.unpack(z), guide.layout.constrain(z)
    for site in guide.layout.sites:
        term = site.log_abs_det(unconstrained[site.name], values[site.name])
        log_det = log_det + term.reshape(5, -1).sum(-1)
    torch.testing.assert_close(guide.log_prob(values), expected - log_det)


@plain_models
def test_traced_log_density_is_log_prob_of_the_values(make, case):
    guide, args = set_up(make, case)
    trace = poutine.trace(guide).get_trace(*args)
    values = {name: node["value"].detach() for name, node in latents_of(trace).items()}
    torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(values))
    # Values that the guide did not draw are scored as well.
    other = guide.sample_posterior(1)
    other = {name: value[0] for name, value in other.items()}
    replayed = poutine.trace(poutine.condition(guide, other)).get_trace(*args)
    torch.testing.assert_close(replayed.log_prob_sum(), guide.log_prob(other))


@plain_models
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_svi_with_vectorised_particles(make, case, loss):
    guide, args = set_up(make, case)
    nesting = max([-p.dim for s in guide.layout.sites for p in s.plates] + [1])
    elbo = loss(num_particles=6, vectorize_particles=True, max_plate_nesting=max(nesting, 2))
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    assert isinstance(svi.step(*args), float)
    for name, p in guide.named_parameters():
        assert torch.isfinite(p).all()
        assert (p != before[name]).all(), f"{name} did not move everywhere"


@pytest.mark.parametrize("name", ["improper prior", "subsampled plate", "subsample given"])
def test_svi_where_particles_are_not_vectorised(make, name):
    case = MODELS[name]
    guide, args = set_up(make, case)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
    losses = [svi.step(*args) for _ in range(3)]
    assert torch.isfinite(torch.tensor(losses)).all()


def test_discrete_latents_are_left_to_the_objective(make):
    case = MODELS["discrete summed out"]
    guide, args = set_up(make, case)
    assert [site.name for site in guide.layout.sites] == ["weights", "locs"]
    svi = SVI(
        config_enumerate(case.model),
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    losses = torch.tensor([svi.step(*args) for _ in range(60)])
    assert losses[-10:].mean() < losses[:10].mean()


@plain_models
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(make, case, parallel):
    guide, args = set_up(make, case)
    if case is MODELS["sequential plate"] and parallel:
        pytest.skip("Pyro's parallel Predictive cannot add a plate outside a sequential one")
    draws = Predictive(case.model, guide=guide, num_samples=4, parallel=parallel)(*args)
    for site in guide.layout.sites:
        assert draws[site.name].reshape(4, -1).shape == (4, site.shape.numel())
        assert site.support.check(draws[site.name]).all()


@every_model
def test_call_returns_values_by_name(make, case):
    guide, args = set_up(make, case)
    assert list(guide(*args)) == [site.name for site in guide.layout.sites]


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_sites(make, case, dtype):
    torch.set_default_dtype(dtype)
    try:
        guide, args = set_up(make, case)
        everything = [
            *guide.parameters(),
            *guide(*args).values(),
            *guide.median().values(),
            *guide.quantiles([0.1, 0.9]).values(),
            *guide.sample_posterior(2).values(),
            guide.log_prob_unconstrained(guide.sample_unconstrained(3)),
        ]
        assert {value.dtype for value in everything} == {dtype}
    finally:
        torch.set_default_dtype(torch.float64)


def copies(guide):
    stream = io.BytesIO()
    torch.save(guide, stream)
    stream.seek(0)
    return {
        "deepcopy": copy.deepcopy(guide),
        "pickle": pickle.loads(pickle.dumps(guide)),
        "torch.save": torch.load(stream, weights_only=False),
    }


@every_model
def test_copies_work_and_leave_the_live_guide_alone(make, case):
    guide, args = set_up(make, case)
    guide(*args)
    before = guide.median()
    made = copies(guide)
    assert guide.model is case.model
    for name, clone in made.items():
        torch.testing.assert_close(clone.median(), before, rtol=0, atol=0, msg=name)
        assert list(clone(*args)) == list(before)
        with torch.no_grad():
            clone.loc_unconstrained.add_(1.0)
        clone(*args)
        torch.testing.assert_close(guide.median(), before, rtol=0, atol=0, msg=name)
    guide(*args)
    torch.testing.assert_close(guide.median(), before, rtol=0, atol=0)


@every_model
def test_state_dict_into_a_fresh_guide(make, case):
    guide, args = set_up(make, case)
    stream = io.BytesIO()
    torch.save(guide.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    early, late = make(case.model), make(case.model).setup(*args)
    early.load_state_dict(state)
    assert len(list(early.parameters())) == len(list(guide.parameters()))
    early.setup(*args)
    late.load_state_dict(state)
    for other in (early, late):
        for name, value in guide.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        other(*args)
        torch.testing.assert_close(other.median(), guide.median(), rtol=0, atol=0)


@every_model
def test_views_read_and_write_one_site(make, case):
    guide, _ = set_up(make, case)
    assert list(guide.locs) == list(guide.scales) == [site.name for site in guide.layout.sites]
    for number, site in enumerate(guide.layout.sites):
        assert guide.locs[site.name].shape == site.unconstrained_shape
        before = guide.loc.detach().clone()
        guide.locs[site.name] = torch.full(site.unconstrained_shape, float(number))
        guide.scales[site.name] = 0.7
        assert (guide.locs[site.name] == number).all()
        torch.testing.assert_close(
            guide.scales[site.name], torch.full(site.unconstrained_shape, 0.7)
        )
        outside = [i for i in range(guide.layout.size) if not site.start <= i < site.stop]
        assert torch.equal(guide.loc[outside], before[outside])


@plain_models
def test_module_local_params(make, case):
    with pyro.settings.context(module_local_params=True):
        guide, args = set_up(make, case)
        before = guide.loc.detach().clone()
        optim = torch.optim.Adam(guide.parameters(), lr=0.1)
        elbo = Trace_ELBO()(case.model, guide)
        for _ in range(2):
            optim.zero_grad()
            elbo(*args).backward()
            optim.step()
        assert (guide.loc != before).all()
        assert not list(pyro.get_param_store().keys())


def test_same_seed_same_bits(make):
    case = MODELS["real in a plate"]

    def run():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide = make(case.model)
        svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step(*case.args()) for _ in range(5)]
        return losses, guide.state_dict()

    (losses, state), (again, state_again) = run(), run()
    assert losses == again
    assert all(torch.equal(state[k], state_again[k]) for k in state)


def test_nested_names_are_reached_by_attributes(make):
    guide, _ = set_up(make, MODELS["dotted names"])
    guide.locs.layer.weight = torch.arange(3.0)
    assert torch.equal(guide.locs.layer.weight, torch.arange(3.0))
    assert torch.equal(guide.locs["layer.weight"], torch.arange(3.0))
    assert "weight" in dir(guide.locs.layer)
    with pytest.raises(AttributeError, match="no latent site 'layer.bias'"):
        guide.locs.layer.bias  # noqa: B018


def test_improper_priors_need_no_draw(make):
    def model():
        pyro.sample("z", dist.ImproperUniform(dist.constraints.simplex, (2,), (3,)))

    state = torch.get_rng_state()
    guide = make(model).setup()
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(guide.median()["z"], torch.full((2, 3), 1 / 3))
