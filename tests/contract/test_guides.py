"""Every guide, on every kind of latent site, through every public method."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGuideList,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.enum import config_enumerate
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import biject_to

from pyro_mf._errors import GuideMismatchError, ModelError
from pyro_mf.density.prototype import run_prototype
from pyro_mf.guides import AutoMeanField, FactorisedGuide, check_same_sites, log_importance_weights
from tests.cases import MODELS, ModelCase

GUIDES = {"AutoMeanField": AutoMeanField}

pytestmark = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES.keys())


def models(keep=lambda case: True):
    """Run a test on every model of the registry, or on those that a condition keeps."""
    chosen = {name: case for name, case in MODELS.items() if keep(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


every_model = models()
plain_models = models(lambda case: case.is_plain)


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
        for value in (draws, guide.median(*args)):
            assert site.support.check(value[site.name]).all()
            assert not value[site.name].requires_grad
        # Of a simplex and the like they are those of the elements, which need not sum to one.
        varies = draws[site.name].std(0) > 1e-9
        assert (quantiles[site.name].diff(dim=0) > 0)[:, varies].all()
        assert not quantiles[site.name].requires_grad
        if site.is_elementwise:
            assert site.support.check(quantiles[site.name]).all()
            middle = guide.median()[site.name]
            torch.testing.assert_close(quantiles[site.name][1], middle, rtol=0, atol=0)


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


@models(lambda case: not case.is_subsampled)
def test_particles_are_scored_one_by_one(make, case):
    guide, args = set_up(make, case)
    nesting = max([-p.dim for s in guide.layout.sites for p in s.plates], default=0)
    with pyro.plate("particles", 4, dim=-nesting - 1):
        trace = poutine.trace(guide).get_trace(*args)
    trace.compute_log_prob()
    total, values = 0.0, {}
    for name, node in latents_of(trace).items():
        total = total + node["log_prob"].reshape(4, -1).sum(-1)
        values[name] = node["value"].detach().reshape(4, *guide.layout[name].shape)
    torch.testing.assert_close(total, guide.log_prob(values))


@models(lambda case: not case.has_discrete)
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("vectorize", [False, True], ids=["one by one", "vectorised"])
def test_svi(make, case, loss, vectorize):
    guide, args = set_up(make, case)
    elbo = loss(num_particles=6, vectorize_particles=vectorize, max_plate_nesting=2)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    assert isinstance(svi.step(*args), float)
    for name, p in guide.named_parameters():
        assert torch.isfinite(p).all()
        if not case.is_subsampled:
            assert (p != before[name]).all(), f"{name} did not move everywhere"


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
        # Without its model a guide cannot ask for the indices that the caller gave.
        runs = name == "deepcopy" or case is not MODELS["subsample given"]
        if runs:
            assert list(clone(*args)) == list(before)
        with torch.no_grad():
            clone.loc_unconstrained.add_(1.0)
        if runs:
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
        with pyro.plate("pair", 2):
            pyro.sample("z", dist.ImproperUniform(constraints.simplex, (2,), (3,)))

    state = torch.get_rng_state()
    guide = make(model).setup()
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(guide.median()["z"], torch.full((2, 3), 1 / 3))


# -- identities


SUPPORTS = {
    "real": (constraints.real, 0),
    "positive": (constraints.positive, 0),
    "unit interval": (constraints.unit_interval, 0),
    "interval": (constraints.interval(-2.0, 3.0), 0),
    "greater than": (constraints.greater_than(1.5), 0),
    "less than": (constraints.less_than(-1.0), 0),
    "simplex": (constraints.simplex, 1),
    "ordered": (constraints.ordered_vector, 1),
    "positive ordered": (constraints.positive_ordered_vector, 1),
    "correlation Cholesky": (constraints.corr_cholesky, 1),
    "correlation matrix": (constraints.corr_matrix, 1),
}


class Pushforward(dist.TransformedDistribution):
    """A distribution on a support; torch's own forgets the support of composed transforms."""

    def __init__(self, base, on):
        self.on = on
        super().__init__(base, [biject_to(on)])

    @constraints.dependent_property
    def support(self):
        return self.on

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(Pushforward, _instance)
        new.on = self.on
        return super().expand(batch_shape, _instance=new)


@pytest.mark.parametrize(("support", "event_dim"), SUPPORTS.values(), ids=SUPPORTS.keys())
def test_weights_are_the_evidence_where_q_is_the_posterior(make, support, event_dim):
    """One identity for bijection, Jacobian, plates, model density and guide density together."""
    transform = biject_to(support)

    def model(x):
        with pyro.plate("data", 2):
            base = dist.Normal(torch.zeros(x.shape), 2.0).to_event(event_dim)
            value = pyro.sample("value", Pushforward(base, support))
            u = transform.inv(value)
            pyro.sample("x", dist.Normal(u, 1.0).to_event(event_dim), obs=x)

    x = torch.randn(2, 3) if event_dim else torch.randn(2)
    guide = make(model).setup(x)
    guide.locs.value, guide.scales.value = 0.8 * x, 0.8**0.5
    evidence = dist.Normal(0.0, 5.0**0.5).log_prob(x).sum()
    weights = log_importance_weights(model, guide, (x,), num_draws=20)
    torch.testing.assert_close(weights, evidence.expand(20), rtol=0, atol=1e-9)
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert loss.loss(model, guide, x) == pytest.approx(-evidence.item(), abs=1e-9)


# -- models that a guide refuses, and guides that do not fit


def no_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def only_discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def unbounded_discrete():
    pyro.sample("k", dist.Poisson(3.0))


def covariance():
    pyro.sample("sigma", dist.Wishart(torch.tensor(5.0), torch.eye(3)))


def sphere():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def moving_support():
    upper = pyro.sample("upper", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Uniform(0.0, upper))


def subsampled_sequential():
    for i in pyro.plate("data", 10, subsample_size=3):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (no_latents, "no latent site"),
        (only_discrete, r"every latent site of the model is discrete \(\['k'\]\)"),
        (unbounded_discrete, "'k' .Poisson. is discrete with an unbounded support"),
        (covariance, "latent site 'sigma' .Wishart. has support PositiveDefinite.*no bijection"),
        (sphere, "latent site 'direction' .* has support .*Sphere.*no bijection"),
        (moving_support, "support of latent site 'z' depends on other latent sites"),
        (subsampled_sequential, "sequential plate 'data', which is subsampled"),
    ],
)
def test_models_without_a_mean_field_guide_are_refused(make, model, match):
    guide = make(model)
    with pytest.raises(ModelError, match=match):
        guide()
    assert not guide.is_set_up


def test_arguments_that_do_not_fit_the_model(make):
    with pytest.raises(ModelError, match=r"do not fit the model: missing a required argument: 'x'"):
        make(MODELS["scalar real"].model).setup()


def test_a_plate_of_another_size_is_named(make):
    case = MODELS["real in a plate"]
    guide, _ = set_up(make, case)
    with pytest.raises(GuideMismatchError, match="plate 'group' .* size 5, .* set up for size 3"):
        guide(torch.zeros(5))
    guide(*case.args())


def test_a_site_of_another_shape_is_named(make):
    def model(x):
        pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))

    guide = make(model).setup(torch.zeros(3))
    with pytest.raises(GuideMismatchError, match=r"site 'z' has shape \(4,\).*shape \(3,\)"):
        guide(torch.zeros(4))


def test_data_of_another_size_are_fine_where_latents_are_global(make):
    guide, _ = set_up(make, MODELS["scalar real"])
    assert guide(torch.zeros(17))["z"].shape == ()


def test_a_model_without_its_data_is_no_mismatch(make):
    def model(n, y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    guide = make(model).setup(3, torch.ones(3))
    draws = Predictive(model, guide=guide, num_samples=4)(5)
    assert draws["y"].shape == (4, 5)


def layout_of(model, *args):
    return run_prototype(model, args, {})


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (
            "real in a plate",
            r"\['mu', 'tau', 'theta'\] missing in the guide; \['z'\] only in the g",
        ),
        ("scalar positive", r"\['rate'\] missing"),
    ],
)
def test_a_guide_for_another_model_is_refused(make, other, match):
    guide, _ = set_up(make, MODELS["scalar real"])
    case = MODELS[other]
    with pytest.raises(GuideMismatchError, match=match):
        check_same_sites(layout_of(case.model, *case.args()).layout, guide.layout)


def test_a_model_in_another_order_is_refused(make):
    def model(first, second):
        for name in (first, second):
            pyro.sample(name, dist.Normal(0.0, 1.0))

    guide = make(model).setup("a", "b")
    assert check_same_sites(layout_of(model, "a", "b").layout, guide.layout) is None
    with pytest.raises(GuideMismatchError, match="in the order"):
        check_same_sites(layout_of(model, "b", "a").layout, guide.layout)


def test_subsampled_layouts_match_the_full_one(make):
    for name in ("subsampled plate", "subsample given"):
        guide, args = set_up(make, MODELS[name])
        check_same_sites(layout_of(MODELS[name].model, *args).layout, guide.layout)


@pytest.mark.parametrize(
    ("view", "value", "error", "match"),
    [
        ("scales", -1.0, ValueError, "scale of site 'z' must be finite and satisfy"),
        ("scales", float("nan"), ValueError, "must be finite"),
        ("locs", float("inf"), ValueError, "loc of site 'z' must be finite"),
        ("locs", torch.zeros(2), ValueError, r"unconstrained shape \(\); got \(2,\)"),
    ],
)
def test_bad_values_for_a_site_are_refused(make, view, value, error, match):
    guide, _ = set_up(make, MODELS["scalar real"])
    before = guide.state_dict()
    with pytest.raises(error, match=match):
        getattr(guide, view).z = value
    assert all(torch.equal(before[k], v) for k, v in guide.state_dict().items())


def test_other_bad_requests(make):
    guide, _ = set_up(make, MODELS["scalar real"])
    with pytest.raises(KeyError, match="w"):
        guide.locs["w"]
    with pytest.raises(ValueError, match="has parameters .*'loc', 'scale'.*got 'df'"):
        guide.site_params("df")
    with pytest.raises(GuideMismatchError, match=r"\['z'\] are missing from \['w'\]"):
        guide.log_prob({"w": torch.zeros(())})
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        guide.quantiles([0.0, 0.5])
    with pytest.raises(ValueError, match="num_draws must be at least 1; got 0"):
        guide.sample_posterior(0)


# -- living with other guides and modules


def test_parts_of_a_guide_list(make):
    case = MODELS["real in a plate"]
    guide = AutoGuideList(case.model)
    guide.append(make(poutine.block(case.model, expose=["mu", "tau"])))
    guide.append(make(poutine.block(case.model, hide=["mu", "tau"])))
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(*case.args()) for _ in range(3)]
    assert torch.isfinite(torch.tensor(losses)).all()
    assert set(guide(*case.args())) == {"mu", "tau", "theta"} == set(guide.median())
    assert guide.quantiles([0.1, 0.9])["theta"].shape == (2, 3)
    assert guide[1].loc.shape == (3,)
    clone = pickle.loads(pickle.dumps(guide))
    torch.testing.assert_close(clone.median(), guide[0].median() | guide[1].median())


def test_beside_a_stock_guide_for_the_discrete_part(make):
    case = MODELS["discrete summed out"]
    guide = AutoGuideList(case.model)
    guide.append(make(poutine.block(case.model, hide=["k"])))
    guide.append(AutoDiscreteParallel(poutine.block(case.model, expose=["k"])))
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
    assert torch.isfinite(torch.tensor([svi.step(*case.args()) for _ in range(3)])).all()


def test_a_bayesian_module(make):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
            self.scale = PyroParam(torch.tensor(1.0), constraints.positive)

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, self.scale), obs=y)

    model, x, y = Regression(), torch.randn(5, 2), torch.randn(5)
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    scale, bias = model.scale.detach().clone(), model.linear.bias.detach().clone()
    for _ in range(3):
        svi.step(x, y)
    assert guide.locs.linear.weight.shape == (1, 2)
    assert "_model" in guide.__dict__
    assert not any(name.startswith("linear") for name, _ in guide.named_parameters())
    assert model.scale != scale
    assert (model.linear.bias != bias).all()
    assert Predictive(model, guide=guide, num_samples=3)(x)["y"].shape == (3, 5)


def test_as_a_part_of_a_module(make):
    class Trainer(PyroModule):
        def __init__(self, model):
            super().__init__("trainer")
            self.guide = make(model)

        def forward(self, *args):
            return self.guide(*args)

    case = MODELS["scalar positive"]
    trainer = Trainer(case.model)
    trainer(*case.args())
    assert set(pyro.get_param_store().keys()) == {"trainer.guide.loc", "trainer.guide.scale"}
    assert [name for name, _ in trainer.named_parameters()] == [
        "guide.loc_unconstrained",
        "guide.scale_unconstrained",
    ]


def test_starting_points(make):
    case = MODELS["subsampled plate"]
    args = case.args()
    values = {"mu": torch.tensor(2.0), "z": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    guide = make(case.model, init_loc_fn=init_to_value(values=values)).setup(*args)
    assert guide.locs.mu.item() == 2.0
    # A minibatch's start is repeated to the full plate, as Pyro's own guides do.
    torch.testing.assert_close(guide.median()["z"][:8], torch.tensor([1.0, 2, 3, 4, 1, 2, 3, 4]))
    for init in (init_to_median, init_to_sample, init_to_uniform, init_to_feasible, init_to_mean):
        assert make(case.model, init_loc_fn=init).setup(*args).layout.size == 11
