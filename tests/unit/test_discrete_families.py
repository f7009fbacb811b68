"""Families of discrete sites, and what a guide with such factors does."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.ops.indexing import Vindex

from pyro_mf import AutoMeanField, ReverseKL
from pyro_mf._errors import FamilyError, GuideMismatchError, GuideNotSetUpError, ModelError
from pyro_mf.families import Normal
from pyro_mf.families.discrete import DISCRETE_FAMILIES, Bernoulli, Categorical, DiscreteFamily
from pyro_mf.guides.auto_mean_field_mixture import AutoMeanFieldMixture

every_family = pytest.mark.parametrize(
    ("family", "k"), [(Bernoulli(), 2), (Categorical(), 2), (Categorical(), 5)], ids=str
)

# -- families ------------------------------------------------------------------------------------


def some_params(family, k, batch=(3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return family.init(2.0 * torch.randn(*batch, k, generator=generator, dtype=dtype))


@every_family
@pytest.mark.parametrize("batch", [(), (3,), (3, 4)], ids=str)
def test_family_keeps_its_contract(family, k, batch):
    assert isinstance(family, DiscreteFamily)
    assert not isinstance(Normal(), DiscreteFamily)
    assert DISCRETE_FAMILIES[family.name] is type(family)
    assert pickle.loads(pickle.dumps(family)) == family
    assert hash(family) == hash(copy.deepcopy(family))
    params = some_params(family, k, batch)
    assert len(params) == len(family.param_names) == len(family.constraints)
    log_probs = family.log_probs(params)
    assert log_probs.shape == (*batch, k)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(batch))
    native = family.native(params)
    assert native.batch_shape == batch
    torch.testing.assert_close(family.entropy(params), native.entropy())
    index = torch.randint(k, (6, *batch))
    log_prob = family.log_prob(params, index)
    torch.testing.assert_close(log_prob, native.log_prob(index.to(native.sample())))
    each = torch.stack([family.log_prob(params, torch.tensor(i)).expand(batch) for i in range(k)])
    torch.testing.assert_close(each.movedim(0, -1), log_probs)
    torch.testing.assert_close(family.log_probs(family.init(log_probs + 3.0)), log_probs)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_stay_finite(family, k, dtype):
    for size in (0.0, 1e2, 1e6):
        params = some_params(family, k, dtype=dtype)
        params = tuple((size * p).requires_grad_() for p in params)
        entropy = family.entropy(params)
        log_probs = family.log_probs(params)
        assert entropy.dtype == log_probs.dtype == dtype
        gradients = torch.autograd.grad(entropy.sum() + log_probs.sum(), params)
        for value in (entropy, log_probs, *gradients):
            assert torch.isfinite(value).all()


@every_family
def test_entropy_has_the_gradient_of_finite_differences(family, k):
    params = some_params(family, k, (2,))
    leaf = params[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: family.entropy((p,)), (leaf,))


@every_family
def test_fit_weighted_is_the_weighted_frequency(family, k):
    family = type(family)() if k == 2 else Categorical(num_values=k)
    index, log_weights = torch.randint(k, (20_000, 3)), torch.randn(20_000)
    found = family.log_probs(family.fit_weighted(index, log_weights)).exp()
    weights = log_weights.softmax(0)
    expected = torch.stack([(weights[:, None] * (index == i)).sum(0) for i in range(k)], -1)
    # Half an effective draw per value, of some 7000.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    shifted = family.fit_weighted(index, log_weights + 500.0)
    torch.testing.assert_close(family.log_probs(shifted).exp(), found)


def test_fit_weighted_keeps_what_was_not_drawn_possible():
    family = Categorical(num_values=3)
    for log_weights in (torch.zeros(4), torch.tensor([0.0, -1e4, -1e4, -1e4])):
        probs = family.log_probs(family.fit_weighted(torch.zeros(4, 2).long(), log_weights)).exp()
        assert torch.isfinite(probs.log()).all()
        assert (probs[:, 0] > 0.5).all()


@pytest.mark.parametrize("bad", [1, 0, -2, 2.0, True, "two"])
def test_number_of_values_is_checked(bad):
    with pytest.raises(ValueError, match="at least 2"):
        Categorical(num_values=bad)


# -- guides --------------------------------------------------------------------------------------

X = torch.tensor([1.5, 0.3, 1.4, -0.2], dtype=torch.float64)


def mixture(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    is_odd = pyro.sample("is.odd", dist.Bernoulli(0.3))
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(Vindex(mu)[..., k] + is_odd, 1.0), obs=x)


def labels(x):
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


BOTH = {"k": "categorical", "is.odd": "bernoulli"}


def set_up(model=mixture, family=None):
    guide = AutoMeanField(model, family or BOTH, init_scale=0.3).setup(X)
    for site in guide.discrete_sites:
        guide.set_log_probs(site.name, torch.randn(*site.shape, site.num_values))
    return guide


def test_draws_modes_and_densities_include_discrete_sites():
    guide = set_up()
    draws = guide.sample_posterior(40_000)
    assert list(draws) == ["mu", "is.odd", "k"]
    assert draws["k"].shape == (40_000, 4)
    assert draws["k"].dtype == torch.int64
    assert draws["is.odd"].dtype == torch.float64
    share = torch.nn.functional.one_hot(draws["k"], 3).double().mean(0)
    assert (share - guide.probs("k")).abs().max() < 5 * 0.5 / 40_000**0.5  # z = 5
    assert not any(value.requires_grad for value in draws.values())
    torch.testing.assert_close(guide.median()["k"], guide.probs("k").argmax(-1))
    assert set(guide.quantiles([0.1, 0.9])) == {"mu"}  # of values without an order there are none
    values = {name: value[:5] for name, value in draws.items()}
    expected = guide.log_prob_unconstrained(guide.layout.unconstrain(values))
    expected = expected + dist.Categorical(probs=guide.probs("k")).log_prob(values["k"]).sum(-1)
    expected = expected + guide.log_probs("is.odd")[values["is.odd"].long()]
    torch.testing.assert_close(guide.log_prob(values), expected)
    with pytest.raises(GuideMismatchError, match="'k'"):
        guide.log_prob({"mu": values["mu"], "is.odd": values["is.odd"]})


def test_trace_has_plain_distributions_under_the_sites_own_names():
    guide = set_up()
    trace = pyro.poutine.trace(guide).get_trace(X)
    assert isinstance(trace.nodes["k"]["fn"], dist.Categorical)
    assert isinstance(trace.nodes["is.odd"]["fn"], dist.Bernoulli)
    torch.testing.assert_close(trace.nodes["k"]["fn"].probs, guide.probs("k"))
    values = {n: node["value"].detach() for n, node in trace.iter_stochastic_nodes() if n != "n"}
    torch.testing.assert_close(trace.log_prob_sum(), guide.log_prob(values))


def test_predictive_draws_from_the_factors():
    guide = set_up(labels, "bernoulli")
    draws = Predictive(labels, guide=guide, num_samples=500)(X)
    share = draws["k"].mean(0)
    assert (share - guide.probs("k")[:, 1]).abs().max() < 5 * 0.5 / 500**0.5  # z = 5


def steps_of(loss):
    guide = set_up(labels, "bernoulli")
    svi = SVI(labels, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    before = guide.probs("k").detach()
    assert all(isinstance(svi.step(X), float) for _ in range(3))
    assert (guide.probs("k") - before).abs().min() > 1e-3


def test_stock_objectives_train_it():
    steps_of(TraceEnum_ELBO(max_plate_nesting=1))
    steps_of(ReverseKL())


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO()])
def test_stock_objectives_that_draw_say_how_not_to(loss):
    with pytest.warns(UserWarning, match="TraceEnum_ELBO"):
        steps_of(loss)


def test_states_pickles_and_copies():
    guide = set_up()
    fresh = AutoMeanField(mixture, BOTH).setup(X)
    assert fresh._pyro_name != guide._pyro_name
    assert (fresh.probs("k") == 1 / 3).all() or torch.allclose(
        fresh.probs("k"), torch.tensor(1 / 3)
    )
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    thawed, clone = pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)
    for other in (fresh, thawed, clone):
        torch.testing.assert_close(other.probs("k"), guide.probs("k"))
        assert other.sample_posterior(2)["k"].shape == (2, 4)
    clone.set_log_probs("k", torch.zeros(3))
    assert not torch.allclose(clone.probs("k"), guide.probs("k"))
    torch.testing.assert_close(clone.probs("k"), torch.full((4, 3), 1 / 3))
    other = AutoMeanField(mixture, {"k": "categorical"}).setup(X)
    with pytest.raises(GuideMismatchError, match="is.odd"):
        other.load_state_dict(guide.state_dict())


def test_kinds_of_sites():
    def model():
        a = pyro.sample("a", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Binomial(2, 0.3))
        loc = (a * torch.arange(3.0)).sum(-1) + b
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    guide = AutoMeanField(model, "categorical").setup()
    assert [site.kind for site in guide.discrete_sites] == ["one_hot", "integer"]
    assert guide.median()["a"].tolist() == [1.0, 0.0, 0.0]
    assert guide.sample_posterior(4)["a"].shape == (4, 3)
    assert guide.log_prob(guide.median()).exp().item() == pytest.approx(1 / 9)
    stock = TraceEnum_ELBO(max_plate_nesting=0).loss(model, guide)
    assert ReverseKL().loss(model, guide) == pytest.approx(stock)


def subsampled(x, index):
    with pyro.plate("n", len(x), subsample=index):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x[index])


def test_minibatches_touch_their_own_elements():
    guide = AutoMeanField(subsampled, "bernoulli").setup(X, torch.tensor([0, 1]))
    assert guide.probs("k").shape == (4, 2)
    ReverseKL().loss_and_grads(subsampled, guide, X, torch.tensor([3, 1]))
    touched = guide.get_parameter("k_logits_unconstrained").grad != 0
    assert touched.tolist() == [False, True, False, True]
    assert guide(X, torch.tensor([2]))["k"].shape == (1,)
    with pytest.raises(GuideMismatchError, match="size 3"):
        guide(X[:3], torch.tensor([0]))


def test_lists_of_guides_take_them_as_members():
    guide = AutoGuideList(mixture)
    guide.append(AutoMeanField(pyro.poutine.block(mixture, expose=["mu"])))
    hidden = pyro.poutine.block(mixture, hide=["mu", "x"])
    guide.append(AutoMeanField(hidden, BOTH))
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(X)
    assert set(guide(X)) == {"mu", "k", "is.odd"}


def test_without_factors_nothing_changes():
    guide = AutoMeanField(mixture).setup(X)
    assert guide.discrete_sites == ()
    assert not guide.has_discrete_factors
    assert set(guide.median()) == {"mu"}
    assert not AutoMeanFieldMixture(mixture).setup(X).has_discrete_factors
    left = AutoMeanField(mixture, {"k": "categorical", "is.odd": "auto"}).setup(X)
    assert [site.name for site in left.discrete_sites] == ["k"]


def test_only_those_asked_for_are_known_before_setup():
    assert AutoMeanField(mixture, BOTH).has_discrete_factors
    with pytest.raises(GuideNotSetUpError):
        AutoMeanField(mixture, BOTH).probs("k")


# -- at the door ---------------------------------------------------------------------------------


def counts():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    n = pyro.sample("n", dist.Poisson(rate))
    pyro.sample("x", dist.Normal(n, 1.0), obs=torch.tensor(1.0))


def vector():
    k = pyro.sample("k", dist.Bernoulli(0.3 * torch.ones(3)).to_event(1))
    pyro.sample("x", dist.Normal(k.sum(-1), 1.0), obs=torch.tensor(1.0))


def ragged():
    with pyro.plate("n", 2):
        k = pyro.sample("k", dist.Binomial(torch.tensor([2.0, 3.0]), 0.5))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.zeros(2))


@pytest.mark.parametrize(
    ("model", "family", "message"),
    [
        (mixture, {"mu": "categorical"}, r"'mu' is continuous.*\['is.odd', 'k'\]"),
        (mixture, "bernoulli", "'mu' is continuous. Say which sites"),
        (mixture, {"k": "normal"}, "'normal' is for continuous sites; site 'k' is discrete"),
        (mixture, {"kk": "categorical"}, r"'kk', which is no latent.*\['mu', 'is.odd', 'k'\]"),
        (mixture, {"k": "bernoulli"}, "'k' .Categorical. has 3 values. Take 'categorical'"),
        (mixture, {"k": Categorical(num_values=4)}, "asked for 4 values; site 'k'.*has 3"),
        (mixture, {"k": Categorical(num_values=2)}, "asked for 2 values; site 'k'.*has 3"),
        (counts, {"n": "categorical"}, "'n' .Poisson.*cannot be listed. Bound its support"),
        (vector, {"k": "bernoulli"}, "'k' .Independent.*cannot be listed. Put its elements into"),
        (ragged, {"k": "categorical"}, "'k' .Binomial. cannot have a factor"),
    ],
)
def test_what_does_not_fit_is_refused_at_setup(model, family, message):
    args = (X,) if model is mixture else ()
    with pytest.raises(FamilyError, match=message):
        AutoMeanField(model, family).setup(*args)


def test_names_are_looked_up_at_once():
    with pytest.raises(ValueError, match="did you mean 'categorical'"):
        AutoMeanField(mixture, {"k": "categoricl"})
    with pytest.raises(ModelError, match="family={'k': 'categorical'}"):
        AutoMeanField(labels).setup(X)
    with pytest.raises(ValueError, match="for discrete sites, which ask for it by name"):
        AutoMeanField(mixture, lambda site: "categorical").setup(X)


def test_writing_probabilities_is_checked():
    guide = set_up()
    with pytest.raises(KeyError, match=r"no factor of a discrete site 'mu'.*'k'"):
        guide.probs("mu")
    with pytest.raises(ValueError, match=r"shape \(4, 3\); got \(2,\)"):
        guide.set_log_probs("k", torch.zeros(2))
    with pytest.raises(ValueError, match="must be finite"):
        guide.set_log_probs("k", torch.tensor([0.0, 1.0, float("nan")]))


def test_parameters_do_not_take_taken_names():
    def model():
        pyro.sample("a.b", dist.Bernoulli(0.5))
        pyro.sample("a__b", dist.Bernoulli(0.5))

    with pytest.raises(FamilyError, match="'a__b_logits', which is taken"):
        AutoMeanField(model, "bernoulli").setup()


def test_a_function_of_the_site_is_asked_about_discrete_sites_too():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("k", dist.Bernoulli(p))
        pyro.sample("other", dist.Bernoulli(p))

    asked = {"k": "bernoulli", "p": "beta", "other": "auto"}
    guide = AutoMeanField(model, family=lambda site: asked[site.name]).setup()
    assert guide.probs("k").shape == (2,)
    with pytest.raises(KeyError):
        guide.probs("other")  # summed out
    assert guide.families["p"].name == "beta"
    assert pickle.loads(pickle.dumps(guide)).families == guide.families
