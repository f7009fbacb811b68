"""ReverseKL with factors of discrete sites, against brute force over every joint value."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.ops.indexing import Vindex

from pyro_mf import AutoMeanField, ReverseKL
from pyro_mf._errors import GuideMismatchError, ModelError, NonFiniteError, ScoreGradientWarning
from pyro_mf.objectives.discrete import make_plan, score_surrogate
from pyro_mf.solvers.coordinate_ascent import solve_coordinates

X = torch.tensor([1.5, 0.3, 1.4], dtype=torch.float64)
TRANSITION = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


def cat(x):
    is_cat = pyro.sample("is_cat", dist.Bernoulli(1 / 3))
    with pyro.plate("pixels", len(x)):
        pyro.sample("x", dist.Normal(2.0 * is_cat, 1.0), obs=x)


def chain(x):
    k = None
    for t in pyro.markov(range(len(x))):
        p = torch.tensor([0.6, 0.4]) if k is None else Vindex(TRANSITION)[k.long(), :]
        k = pyro.sample(f"k{t}", dist.Categorical(p))
        pyro.sample(f"x{t}", dist.Normal(2.0 * k, 1.0), obs=x[t])


def nested(x):
    """Switches of rows, labels of cells, and a label that ties nothing."""
    pyro.sample("lonely", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("rows", 2, dim=-2):
        s = pyro.sample("s", dist.Bernoulli(0.3))
        with pyro.plate("columns", 2, dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
            scale = 1.0 + s
            pyro.sample("x", dist.Normal(k * scale, 1.0), obs=torch.stack([x[:2], 2 * x[:2]]))


def mixture(x):
    """Labels with continuous latents and a learnable parameter."""
    sd = pyro.param("sd", torch.tensor(0.8), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(Vindex(mu)[..., k], sd), obs=x)


def masked(x):
    with pyro.plate("n", len(x)), poutine.mask(mask=x > 1.0):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def half_summed_out(x):
    """A factor for one label, and a label without one that depends on it."""
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        m = pyro.sample("m", dist.Categorical(Vindex(TRANSITION)[k.long(), :]))
        pyro.sample("x", dist.Normal(k + 2.0 * m, 1.0), obs=x)


def group_test(x):
    """The sum over a plate, which cannot be enumerated in parallel."""
    with pyro.plate("people", 3):
        k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("total", dist.Normal(k.sum(-1), 0.7), obs=2.0 * x[0])


def sum_of_all(x):
    """Looks right to Pyro when enumerated, and is not: the sum is over values, too."""
    with pyro.plate("people", 3):
        k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("total", dist.Normal(k.sum(), 0.7), obs=x[0])


EXACT = {
    "one label": (cat, "bernoulli"),
    "one label, categorical": (cat, "categorical"),
    "chain": (chain, "categorical"),
    "nested plates": (nested, "categorical"),
    "continuous too": (mixture, {"k": "categorical"}),
    "mask": (masked, "bernoulli"),
    "half summed out": (half_summed_out, {"k": "bernoulli"}),
}
exact_models = pytest.mark.parametrize(("model", "family"), EXACT.values(), ids=EXACT)


def uneven(model, family, *args):
    """A guide with probabilities that are not the defaults."""
    guide = AutoMeanField(model, family, init_scale=0.4).setup(*args)
    generator = torch.Generator().manual_seed(3)
    for site in guide.discrete_sites:
        shape = (*site.shape, site.num_values)
        guide.set_log_probs(site.name, torch.randn(shape, generator=generator))
    return guide


def brute_force(model, guide, *args):
    """The ELBO of the draw that the guide makes now: a sum over every joint value, by plain runs.

    Differentiable; entropies of continuous sites in closed form.
    """
    trace = poutine.trace(guide).get_trace(*args)
    sites = {
        name: node
        for name, node in trace.iter_stochastic_nodes()
        if type(node["fn"]).__name__ != "_Subsample"
    }
    values = {name: node["value"] for name, node in sites.items()}
    total = sum(node["fn"].entropy().sum() for node in sites.values())
    cells = [(s, i) for s in guide.discrete_sites for i in range(max(1, s.shape.numel()))]
    log_q = {s.name: guide.log_probs(s.name) for s in guide.discrete_sites}
    for joint in itertools.product(*(range(site.num_values) for site, _ in cells)):
        index = {s.name: torch.zeros(s.shape, dtype=torch.long) for s in guide.discrete_sites}
        for (site, cell), value in zip(cells, joint, strict=True):
            index[site.name].view(-1)[cell] = value
        own = {s.name: s.value_of(index[s.name]) for s in guide.discrete_sites}
        weight = sum(log_q[n].gather(-1, i.unsqueeze(-1)).sum() for n, i in index.items()).exp()
        total = total + weight * log_joint(model, values | own, *args)
    return total


def log_joint(model, values, *args):
    conditioned = poutine.condition(model, values)
    runs = poutine.enum(pyro.infer.config_enumerate(conditioned), first_available_dim=-3)
    trace = poutine.trace(runs).get_trace(*args)
    trace.compute_log_prob()
    if "m" not in trace.nodes or trace.nodes["m"]["is_observed"]:
        return trace.log_prob_sum()
    terms = [n["log_prob"] for n in trace.nodes.values() if n["type"] == "sample"]
    inner = sum(t for t in terms if t.dim() > 1)  # (values of m, 1, plate)
    return sum(t.sum() for t in terms if t.dim() <= 1) + inner.logsumexp(0).sum()


def at_seed(function):
    pyro.set_rng_seed(11)
    return function()


@exact_models
def test_elbo_is_the_sum_over_every_joint_value(model, family):
    guide = uneven(model, family, X)
    objective = ReverseKL()
    objective.loss(model, guide, X)  # looks at the model once, which takes random numbers
    loss = at_seed(lambda: objective.loss(model, guide, X))
    expected = at_seed(lambda: brute_force(model, guide, X))
    torch.testing.assert_close(-loss, float(expected.detach()), rtol=1e-12, atol=1e-12)
    if not guide.layout.sites:  # nothing is drawn, so nothing is left to chance
        assert loss == objective.loss(model, guide, X)


@exact_models
@pytest.mark.parametrize("entropy", ["closed_form", "stl"])
def test_gradients_are_those_of_the_sum(model, family, entropy):
    guide = uneven(model, family, X)
    objective = ReverseKL(entropy=entropy)
    objective.loss(model, guide, X)
    leaves = [p for n, p in guide.named_parameters() if p.numel()]
    store = pyro.get_param_store()
    leaves += [store._params["sd"]] if "sd" in store else []
    loss = at_seed(lambda: objective.differentiable_loss(model, guide, X))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    exact = torch.autograd.grad(at_seed(lambda: brute_force(model, guide, X)), leaves)
    for leaf, gradient, expected in zip(leaves, found, exact, strict=True):
        if entropy == "stl" and leaf.shape == (2,) and guide.layout.sites:
            continue  # another unbiased estimate for the continuous site
        torch.testing.assert_close(gradient, -expected, rtol=1e-10, atol=1e-12)
        if leaf.numel() < 3 and entropy == "closed_form":
            numeric = torch.zeros_like(leaf)
            for i in range(leaf.numel()):
                ends = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        leaf.view(-1)[i] += step
                        ends.append(float(at_seed(lambda: brute_force(model, guide, X))))
                        leaf.view(-1)[i] -= step
                numeric.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(gradient, -numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["one label", "chain", "nested plates", "mask"])
def test_stock_enumeration_gives_the_same(name):
    model, family = EXACT[name]
    guide = uneven(model, family, X)
    stock = TraceEnum_ELBO(max_plate_nesting=2).loss(model, guide, X)
    assert ReverseKL().loss(model, guide, X) == pytest.approx(stock, abs=1e-10)


def test_long_chains_cost_no_more_than_their_length():
    x = torch.randn(30)  # brute force would take 2^30 runs
    guide = uneven(chain, "categorical", x)
    probs = torch.stack([guide.probs(f"k{t}") for t in range(30)]).detach()
    expected = probs[0] @ torch.tensor([0.6, 0.4]).log()
    expected += sum(a @ TRANSITION.log() @ b for a, b in itertools.pairwise(probs))
    expected += (probs * dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])).sum()
    expected -= (probs * probs.log()).sum()
    assert ReverseKL().loss(chain, guide, x) == pytest.approx(-float(expected), rel=1e-12)


def subsampled(x, index):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x), subsample=index):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(mu + 2.0 * k, 1.0), obs=x[index])


@pytest.mark.parametrize("family", [{"k": "bernoulli"}, "normal"], ids=["factor", "summed out"])
def test_minibatches_average_to_the_full_data(family):
    everything = torch.arange(3)
    guide = AutoMeanField(subsampled, family, init_scale=1e-12).setup(X, everything)
    if guide.discrete_sites:
        assert guide.probs("k").shape == (3, 2)
        guide.set_log_probs("k", torch.randn(3, 2))
    objective = ReverseKL(entropy="closed_form")
    full = objective.loss(subsampled, guide, X, everything)
    pairs = [torch.tensor(pair) for pair in itertools.combinations(range(3), 2)]
    losses = [objective.loss(subsampled, guide, X, pair) for pair in pairs]
    assert sum(losses) / len(losses) == pytest.approx(full, abs=1e-9)
    assert max(losses) - min(losses) > 0.1  # no two are alike


# -- where values cannot be summed over ----------------------------------------------------------


def branch(x):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(2.0 if k > 0 else 0.0, 1.0), obs=x[0])


def too_many(x):
    """Each of a few labels could be summed over, not all at once."""
    total = sum(pyro.sample(f"k{i}", dist.Categorical(torch.ones(64))) for i in range(5))
    pyro.sample("x", dist.Normal(total, 1.0), obs=x[0])


def outer_dependence(x):
    """A label that is summed out ties all elements of a plate together."""
    m = pyro.sample("m", dist.Bernoulli(0.5))
    with pyro.plate("n", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * m))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "family", "kept", "why"),
    [
        (group_test, "bernoulli", 0, "model fails"),
        (sum_of_all, "bernoulli", 0, "gives another log density"),
        (branch, "bernoulli", 0, "Boolean value of Tensor"),
        (too_many, "categorical", 3, "16777216 elements, more than the 1048576"),
        (outer_dependence, {"k": "bernoulli"}, 0, "depends on all of its elements"),
    ],
    ids=["sum over a plate", "silent sum", "branch", "too many", "tied by a summed-out label"],
)
def test_what_cannot_be_summed_over_is_drawn_and_said(model, family, kept, why):
    guide = AutoMeanField(model, family).setup(X)
    with pytest.warns(ScoreGradientWarning, match=why):
        plan = make_plan(model, guide, (X,), {}, math.inf)
    assert len(plan.enumerated) == kept
    assert len(plan.sites) == len(guide.discrete_sites)


def test_the_warning_comes_once():
    guide = AutoMeanField(branch, "bernoulli").setup(X)
    objective = ReverseKL()
    with pytest.warns(ScoreGradientWarning):
        objective.loss(branch, guide, X)
    objective.loss_and_grads(branch, guide, X)  # a second warning would be an error


def test_score_gradients_are_unbiased():
    # 300 steps of 4 draws; z = 5 standard errors, which is about 5 % of the gradient's norm.
    # Without the score term only the entropy's part is left, far outside: the negative control.
    guide = uneven(group_test, "bernoulli", X)
    leaf = guide.get_parameter("k_logits_unconstrained")
    elbo = brute_force(group_test, guide, X)
    (exact,) = torch.autograd.grad(elbo, leaf)
    entropy = sum(-(guide.probs("k") * guide.log_probs("k")).sum(-1))
    (control,) = torch.autograd.grad(entropy, leaf)
    objective, values, gradients = ReverseKL(4), [], []
    with pytest.warns(ScoreGradientWarning):
        objective.loss(group_test, guide, X)
    for _ in range(300):
        loss = objective.differentiable_loss(group_test, guide, X)
        values.append(-loss.detach())
        gradients.append(-torch.autograd.grad(loss, leaf)[0])
    values, gradients = torch.stack(values), torch.stack(gradients)
    se = gradients.std(0) / 300**0.5
    assert ((gradients.mean(0) - exact).abs() < 5 * se).all()
    assert ((control - exact).abs() > 5 * se).any()
    assert abs(values.mean() - elbo) < 5 * values.std() / 300**0.5


def test_leave_one_out_baseline_is_that_of_the_others():
    signal, log_prob = torch.randn(4), torch.randn(4, requires_grad=True)
    surrogate = score_surrogate(list(signal), list(log_prob))
    assert surrogate.item() == 0.0
    others = (signal.sum() - signal) / 3
    (gradient,) = torch.autograd.grad(surrogate, log_prob)
    torch.testing.assert_close(gradient, (signal - others) / 4)
    constant = score_surrogate([torch.tensor(7.0)] * 4, list(log_prob))
    assert torch.autograd.grad(constant, log_prob)[0].abs().max() < 1e-12


# -- coordinate ascent ---------------------------------------------------------------------------


def test_one_label_has_its_exact_posterior():
    guide = AutoMeanField(cat, "bernoulli")
    outcome = solve_coordinates(cat, guide, (X,))
    log_joints = torch.stack(
        [
            math.log(2 / 3) + dist.Normal(0.0, 1.0).log_prob(X).sum(),
            math.log(1 / 3) + dist.Normal(2.0, 1.0).log_prob(X).sum(),
        ]
    )
    torch.testing.assert_close(guide.probs("is_cat").detach(), log_joints.softmax(0))
    assert outcome.converged
    assert outcome.elbo == pytest.approx(float(log_joints.logsumexp(0)), abs=1e-12)


@pytest.mark.parametrize("name", ["chain", "nested plates", "mask", "half summed out"])
def test_coordinate_ascent_never_falls_and_ends_where_the_gradient_is_zero(name):
    model, family = EXACT[name]
    guide = uneven(model, family, X)
    before = ReverseKL().loss(model, guide, X)
    outcome = solve_coordinates(model, guide, (X,), tolerance=1e-12)
    losses = torch.tensor([before, *outcome.losses])
    assert (losses.diff() < 1e-12).all()
    assert losses[0] - losses[-1] > 0.01
    objective = ReverseKL()
    assert -objective.loss_and_grads(model, guide, X) == pytest.approx(outcome.elbo, abs=1e-10)
    for site in guide.discrete_sites:
        gradient = guide.get_parameter(f"{site.param_name}_unconstrained").grad
        assert gradient.abs().max() < 1e-9


def test_impossible_values_get_no_probability():
    def model():
        k = pyro.sample("k", dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf])))
        pyro.sample("x", dist.Normal(k.double(), 1.0), obs=torch.tensor(1.0))

    guide = AutoMeanField(model, "categorical").setup()
    with pytest.raises(NonFiniteError, match="probability zero"):
        ReverseKL().loss(model, guide)
    solve_coordinates(model, guide)
    assert guide.probs("k")[2] == 0.0
    assert math.isfinite(ReverseKL().loss(model, guide))


def test_coordinate_ascent_says_what_it_is_not_for():
    def tied():
        a = pyro.sample("a", dist.Categorical(torch.ones(2)))
        equal = torch.eye(2).log()  # b must be a
        pyro.sample("b", dist.Categorical(logits=Vindex(equal)[a, :]))

    guide = AutoMeanField(tied, "categorical").setup()
    with pytest.raises(NonFiniteError, match="'a' is impossible.*summed out"):
        solve_coordinates(tied, guide)
    with pytest.raises(GuideMismatchError, match=r"continuous sites \['mu'\]"):
        solve_coordinates(mixture, AutoMeanField(mixture, {"k": "categorical"}), (X,))
    with pytest.warns(ScoreGradientWarning), pytest.raises(ModelError, match="cannot be summed"):
        solve_coordinates(branch, AutoMeanField(branch, "bernoulli"), (X,))
