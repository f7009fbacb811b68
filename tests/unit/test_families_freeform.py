"""Splines, mixtures of Normals and histograms: identities, and fits to laws of every kind."""

import math
import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mf.families import Normal
from pyro_mf.families.anchored_map import free_numbers, relative_logs
from pyro_mf.families.histogram import Histogram
from pyro_mf.families.mixture_quantile import mixture_quantile
from pyro_mf.families.normal_mixture import NormalMixture
from pyro_mf.families.protocol import Family
from pyro_mf.families.spline import Spline

FAMILIES = {
    "spline": Spline(),
    "spline_of_7": Spline(num_bins=7, bound=3.0),
    "normal_mixture": NormalMixture(),
    "mixture_of_1": NormalMixture(num_components=1),
    "mixture_of_5": NormalMixture(num_components=5),
    "histogram": Histogram(),
    "histogram_of_9": Histogram(num_bins=9),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
DEFAULTS = [Spline(), NormalMixture(), Histogram()]
every_default = pytest.mark.parametrize("family", DEFAULTS, ids=lambda f: f.name)
smooth = pytest.mark.parametrize("family", list(FAMILIES.values())[:5], ids=list(FAMILIES)[:5])


def some_params(family, batch=(3,), spread=0.7, dtype=torch.float64):
    """A shape of its own for every element."""
    generator = torch.Generator().manual_seed(7)
    loc, scale = torch.linspace(-2.0, 3.0, math.prod(batch)).reshape(batch), torch.ones(batch)
    params = family.init(loc, 0.5 * scale)
    shape = [p + spread * torch.randn(p.shape, generator=generator) for p in params[2:]]
    return tuple(p.to(dtype) for p in (*params[:2], *shape))


class Law:
    """A law known by its density: quantiles and expectations by quadrature."""

    def __init__(self, log_prob, low, high):
        self.grid = torch.linspace(low, high, 200_001)
        self.log_prob = log_prob(self.grid)
        steps = 0.5 * (self.log_prob.exp()[1:] + self.log_prob.exp()[:-1]) * self.grid.diff()
        self.cdf = torch.cat([torch.zeros(1), steps.cumsum(0)])
        assert abs(float(self.cdf[-1]) - 1.0) < 1e-6
        self.mean = self.expect(self.grid)
        self.sd = self.expect((self.grid - self.mean).square()).sqrt()

    def expect(self, values):
        return torch.trapezoid(self.log_prob.exp() * values, self.grid)

    def quantile(self, p):
        at = torch.searchsorted(self.cdf, p).clamp(1, len(self.grid) - 1)
        share = (p - self.cdf[at - 1]) / (self.cdf[at] - self.cdf[at - 1])
        return self.grid[at - 1] + share * (self.grid[at] - self.grid[at - 1])

    def sample(self, num, seed=0):
        return self.quantile(torch.rand(num, generator=torch.Generator().manual_seed(seed)))

    def kl(self, family, params):
        ours = family.log_prob(params, self.grid[:, None])[:, 0]
        return float(self.expect(self.log_prob - ours))


def normal_log_prob(u, loc=0.0, scale=1.0):
    return torch.distributions.Normal(loc, scale).log_prob(u)


LAWS = {
    "normal": Law(normal_log_prob, -9.0, 9.0),
    "skew_normal": Law(
        lambda u: math.log(2) + normal_log_prob(u) + torch.special.log_ndtr(5.0 * u), -3.0, 9.0
    ),
    "bimodal": Law(
        lambda u: (
            torch.logaddexp(normal_log_prob(u, -2.0, 0.5), normal_log_prob(u, 2.0, 0.5))
            - math.log(2)
        ),
        -7.0,
        7.0,
    ),
    "student_t": Law(torch.distributions.StudentT(3.0).log_prob, -300.0, 300.0),
    "log_gamma": Law(lambda u: 0.3 * u - u.exp() - math.lgamma(0.3), -70.0, 4.5),
}


@every_family
def test_family_keeps_its_contract(family):
    assert isinstance(family, Family)
    params = some_params(family)
    assert len(params) == len(family.param_names) == len(family.constraints)
    assert family.param_names[:2] == ("loc", "scale")
    for value, constraint in zip(params, family.constraints, strict=True):
        assert value.shape[:1] == (3,)
        assert constraint.check(value).all()
    assert family == pickle.loads(pickle.dumps(family))
    assert hash(family) == hash(pickle.loads(pickle.dumps(family)))
    assert family != Normal()


@every_family
def test_start_is_nearly_the_normal(family):
    law, params = LAWS["normal"], family.init(torch.zeros(1), torch.ones(1))
    assert law.kl(family, params) < (0.02 if "histogram" in family.name else 0.005)
    if isinstance(family, Spline):
        u = torch.linspace(-30.0, 30.0, 101)[:, None]
        torch.testing.assert_close(family.log_prob(params, u), Normal().log_prob(params[:2], u))


@every_family
def test_density_integrates_to_one_and_gives_the_entropy(family):
    params = some_params(family)
    # Steps of equal probability follow a density however steep; 1e-9 of the mass is left out.
    score = torch.linspace(-6.0, 6.0, 20_001)
    grid = family.quantile(params, torch.special.ndtr(score)[:, None])
    log_prob = family.log_prob(params, grid)
    total = torch.trapezoid(log_prob.exp(), grid, dim=0)
    entropy = family.entropy(params)
    # A trapezoid errs by its width at a histogram's jumps, by its square at a spline's kinks.
    tolerance = {"histogram": 1e-2, "spline": 2e-5}.get(family.name, 1e-6)
    torch.testing.assert_close(total, torch.ones(3), atol=tolerance, rtol=0)
    if entropy is not None:
        numeric = torch.trapezoid(-log_prob.exp() * log_prob, grid, dim=0)
        torch.testing.assert_close(entropy, numeric, atol=1e-2, rtol=0)


@every_family
def test_quantile_inverts_the_distribution_function(family):
    params = some_params(family)
    p = torch.tensor([1e-12, 0.01, 0.5, 0.9, 1 - 1e-9])[:, None]
    distribution = family.distribution(params)
    assert distribution.batch_shape == (3,)
    cdf = distribution.cdf(family.quantile(params, p))
    torch.testing.assert_close(cdf, p.expand(5, 3), rtol=1e-6, atol=1e-13)
    at_ends = family.quantile(params, torch.tensor([0.0, 1.0])[:, None])
    assert (at_ends == torch.tensor([-math.inf, math.inf])[:, None]).all()


@every_family
def test_log_prob_is_the_distributions_and_the_slope_of_its_cdf(family):
    params = some_params(family)
    u = family.quantile(params, torch.tensor([0.003, 0.1, 0.4001, 0.77, 0.998])[:, None])
    log_prob = family.log_prob(params, u)
    distribution = family.distribution(params)
    torch.testing.assert_close(distribution.log_prob(u), log_prob, atol=1e-7, rtol=1e-7)
    step = 1e-5
    slope = (distribution.cdf(u + step) - distribution.cdf(u - step)) / (2 * step)
    torch.testing.assert_close(slope.log(), log_prob, atol=1e-4, rtol=1e-4)


@every_family
def test_log_slope_of_the_transform_is_the_density(family):
    params = some_params(family)
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    u = family.transform(params, noise)
    order = noise.argsort(0)
    assert (u.gather(0, order).diff(dim=0) > 0).all()
    (slope,) = torch.autograd.grad(u.sum(), noise)
    expected = normal_log_prob(noise) - slope.log()
    torch.testing.assert_close(family.log_prob(params, u), expected, atol=1e-6, rtol=1e-6)


@every_default
@pytest.mark.parametrize("batch", [(3,), (3, 4), (), (5, 3)])
def test_any_batch_is_the_same_as_one_by_one(family, batch):
    params = some_params(family, batch)
    noise = family.noise((6, *batch), dtype=torch.float64)
    p = torch.tensor([0.2, 0.7]).reshape(2, *(1,) * len(batch))
    u = family.transform(params, noise)
    found = (u, family.log_prob(params, u), family.quantile(params, p))
    assert [x.shape for x in found] == [(6, *batch), (6, *batch), (2, *batch)]
    assert family.distribution(params).batch_shape == batch
    count = math.prod(batch)
    flat = tuple(x.reshape(count, *x.shape[len(batch) :]) for x in params)
    for k in range(count):
        one = tuple(x[k] for x in flat)
        own = family.transform(one, noise.reshape(6, -1)[:, k])
        alone = (own, family.log_prob(one, own), family.quantile(one, p.reshape(2)))
        for together, separate in zip(found, alone, strict=True):
            torch.testing.assert_close(together.reshape(len(separate), -1)[:, k], separate)


@every_default
def test_one_parameter_set_per_draw(family):
    params, noise = some_params(family, (5, 3)), torch.randn(5, 3)
    u = family.transform(params, noise)
    assert u.shape == family.log_prob(params, u).shape == (5, 3)
    row = tuple(x[2] for x in params)
    torch.testing.assert_close(u[2], family.transform(row, noise[2]))
    torch.testing.assert_close(family.log_prob(params, u)[2], family.log_prob(row, u[2]))


@smooth
def test_gradients_are_the_differences(family):
    params = tuple(p.requires_grad_() for p in some_params(family, (2,)))
    noise = torch.tensor([[-2.0, 0.3], [1.1, 2.7]], requires_grad=True)
    u = family.transform(params, noise).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *p: family.transform(p, x), (noise, *params))
    assert torch.autograd.gradcheck(lambda x, *p: family.log_prob(p, x), (u, *params))


def test_histogram_gradients_are_the_differences():
    # Away from edges, where there are none.
    params = tuple(p.requires_grad_() for p in some_params(Histogram(9), (2,)))
    noise = torch.tensor([[-2.8, 0.2], [1.1, 2.6]])
    u = Histogram(9).transform(params, noise).detach()
    assert torch.autograd.gradcheck(lambda *p: Histogram(9).transform(p, noise), params)
    assert torch.autograd.gradcheck(lambda *p: Histogram(9).log_prob(p, u), params)
    assert torch.autograd.gradcheck(lambda *p: Histogram(9).entropy(p), params)


def test_mixture_has_second_derivatives():
    family = NormalMixture(2)
    params = tuple(p.requires_grad_() for p in some_params(family, (2,)))
    noise = torch.tensor([[-2.0, 0.3]], requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *p: family.transform(p, x), (noise, *params))


def test_mixture_quantile_of_one_component_is_the_normals():
    noise = torch.linspace(-37.0, 37.0, 301)
    found = mixture_quantile(torch.zeros(1), torch.ones(1), 2.0 * torch.ones(1), noise)
    torch.testing.assert_close(found, 1.0 + 2.0 * noise)


def test_mixture_location_and_scale_are_mean_and_sd():
    family = NormalMixture(4)
    params = some_params(family)
    distribution = family.distribution(params)
    torch.testing.assert_close(distribution.mean, params[0])
    torch.testing.assert_close(distribution.stddev, params[1])


@pytest.mark.parametrize("family", [Spline(), Histogram(), Histogram(9)], ids=repr)
def test_map_location_and_scale_are_quantiles(family):
    params = some_params(family)
    p = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0]))[:, None]
    low, middle, high = family.quantile(params, p)
    torch.testing.assert_close(middle, params[0])
    torch.testing.assert_close(0.5 * (high - low), params[1])


def test_free_numbers_give_the_logs_but_for_a_shift():
    logs = torch.tensor([[2.0, -1.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    free, shift = free_numbers(logs)
    assert free.shape == (2, 3)
    torch.testing.assert_close(relative_logs(free) + shift, logs)


@every_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_parameters_and_values_are_finite(family, dtype):
    size = 6
    loc = torch.tensor([0.0, 1e6, -1e6, 0.0, 0.0, 3.0], dtype=dtype)
    scale = torch.tensor([1.0, 1e-3, 1e6, 1e-12, 1e12, 1.0], dtype=dtype)
    params = family.init(loc, scale)
    generator = torch.Generator().manual_seed(3)
    for spread in (0.0, 3.0, 50.0, 1e4):
        shape = [
            p + spread * torch.randn(p.shape, generator=generator).to(dtype) for p in params[2:]
        ]
        leaves = tuple(p.clone().requires_grad_() for p in (loc, scale, *shape))
        away = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], dtype=dtype)[:, None]
        u = (loc + scale * away).requires_grad_()
        log_prob = family.log_prob(leaves, u)
        noise = torch.tensor([-8.0, -2.0, 0.0, 1e-3, 8.0], dtype=dtype)[:, None].expand(5, size)
        drawn = family.transform(leaves, noise)
        gradients = torch.autograd.grad((log_prob / 1e12).sum(), (*leaves, u), retain_graph=True)
        gradients += torch.autograd.grad(drawn.sum(), leaves)
        for value in (log_prob, drawn, *gradients):
            assert value.dtype == dtype
            assert value.isfinite().all(), spread


@every_default
def test_single_precision_agrees_with_double(family):
    params = some_params(family)
    rough = tuple(p.float() for p in params)
    noise = torch.randn(100, 3)
    u = family.transform(params, noise)
    u_rough = family.transform(rough, noise.float())
    torch.testing.assert_close(u_rough.double(), u, rtol=1e-4, atol=1e-4)
    log_prob = family.log_prob(rough, u.float()).double()
    off = (log_prob - family.log_prob(params, u)).abs()
    assert (off > 1e-3).double().mean() <= (0.02 if family.name == "histogram" else 0.0)


@pytest.mark.slow  # by torch's own tracer; by ours in test_families.py
@every_default
def test_graph_with_gradients_can_be_captured(family):
    def value_and_gradients(noise, *stored):
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in stored)
            u = family.transform(leaves, noise)
            loss = (u.square() + family.log_prob(leaves, u)).sum()
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    params = some_params(family)
    graph = make_fx(value_and_gradients)(family.noise((4, 3), dtype=torch.float64), *params)
    fresh = family.noise((4, 3), dtype=torch.float64)
    other = tuple(p + 0.1 for p in params)
    for ours, eager in zip(graph(fresh, *other), value_and_gradients(fresh, *other), strict=True):
        torch.testing.assert_close(ours, eager)


@every_default
def test_draws_follow_the_factor(family):
    # 20000 draws: the empirical distribution function is within 5 / (2 sqrt(S)) of the true one.
    params = some_params(family)
    u = family.transform(params, family.noise((20_000, 3), dtype=torch.float64))
    p = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99])[:, None]
    share = (u[None] < family.quantile(params, p)[:, None]).double().mean(1)
    assert (share - p).abs().max() < 5 / (2 * 20_000**0.5)


@every_default
def test_fit_finds_every_law(family):
    # From 10000 draws a quantile at p has the standard error sqrt(p (1 - p)) / (100 density); the
    # bound is five of them, and 0.02 sds for what the family cannot do. In the gap between modes
    # there is no density, and the median is free. KL of 26 free numbers from so many draws: 0.0013.
    p = torch.tensor([0.05, 0.5, 0.95])
    draws = torch.stack([law.sample(10_000) for law in LAWS.values()], 1)
    params = family.fit_weighted(draws, torch.full((10_000,), 3.0))
    for k, (name, law) in enumerate(LAWS.items()):
        own = tuple(x[k : k + 1] for x in params)
        true = law.quantile(p)
        density = law.log_prob[torch.searchsorted(law.grid, true)].exp()
        bound = 5 * (p * (1 - p)).sqrt() / (100 * density) + 0.02 * law.sd
        error = (family.quantile(own, p[:, None])[:, 0] - true).abs()
        # The left tail of a log-Gamma is not one of three Normals.
        allowed = 0.12 * law.sd if (name, family.name) == ("log_gamma", "normal_mixture") else bound
        assert (error < allowed).all(), (name, error / law.sd)
        normal_kl = law.kl(Normal(), (law.mean[None], law.sd[None]))
        if name == "normal":
            assert law.kl(family, own) < 0.004
        else:
            assert law.kl(family, own) < 0.15 * normal_kl, name


@every_default
def test_fit_under_weights_is_that_to_draws_from_the_weighted_law(family):
    # Draws of N(0, 2^2) weighed to the skew normal; about a third of them count.
    law, draws = LAWS["skew_normal"], 2.0 * torch.randn(10_000, 1)
    log_weights = normal_log_prob(draws[:, 0]) + torch.special.log_ndtr(5.0 * draws[:, 0])
    log_weights = log_weights - normal_log_prob(draws[:, 0], 0.0, 2.0) - 500.0
    assert law.kl(family, family.fit_weighted(draws, log_weights)) < 0.01
    assert law.kl(family, family.fit_weighted(draws, torch.zeros(10_000))) > 0.1  # the control


@every_default
def test_fit_to_few_draws_is_not_far_off(family):
    # Fifty draws: a Normal fitted to them would itself have a KL of about 0.02.
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(50, 10, generator=generator)
    params = family.fit_weighted(draws, torch.zeros(50))
    kls = [LAWS["normal"].kl(family, tuple(x[k : k + 1] for x in params)) for k in range(10)]
    assert sum(kls) / 10 < 0.25
    weights = torch.softmax(torch.zeros(50), 0)
    mean = draws.mean(0)
    start = family.init(mean, (draws - mean).square().mean(0).sqrt())
    ours, theirs = ((weights @ family.log_prob(p, draws)) for p in (params, start))
    assert (ours >= theirs - 1e-9).all()


@every_default
def test_fit_follows_shift_and_stretch(family):
    draws = torch.stack([law.sample(300) for law in LAWS.values()], 1)
    log_weights = torch.randn(300)
    loc, scale, *shape = family.fit_weighted(draws, log_weights)
    there = family.fit_weighted(1e3 + 50.0 * draws, log_weights - 3.0)
    p = torch.tensor([0.05, 0.3, 0.95])[:, None]
    moved = family.quantile((1e3 + 50.0 * loc, 50.0 * scale, *shape), p)
    off = (family.quantile(there, p) - moved).abs() / (50.0 * scale)
    assert off.max() < 1e-5


@every_default
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_survives_bad_draws(family, dtype):
    draws = torch.randn(50, 7, dtype=dtype)
    draws[:, 1] = 3.0
    draws[:, 2] = 0.0
    draws[0, 3] = 1e8
    draws[:, 4] = draws[:, 4].sign()
    draws[0, 5], draws[1, 5] = 1e8, -1e8
    draws[1:, 6] = 1e-3
    one_heavy = torch.zeros(50, dtype=dtype)
    one_heavy[7] = 30.0
    only_one = torch.full((50,), -math.inf, dtype=dtype)
    only_one[7] = 0.0
    for log_weights in (torch.zeros(50, dtype=dtype), one_heavy, only_one):
        params = family.fit_weighted(draws, log_weights)
        for value, constraint in zip(params, family.constraints, strict=True):
            assert value.dtype == dtype
            assert value.isfinite().all()
            assert constraint.check(value).all()
        log_prob = family.log_prob(params, draws[7])
        assert log_prob.isfinite().all()
        low, high = family.quantile(params, torch.tensor([0.01, 0.99], dtype=dtype)[:, None])
        assert (low <= high).all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Spline(num_bins=1), "num_bins must be an integer of at least 2; got 1"),
        (lambda: Spline(bound=0.5), "bound must be between 1 and 8 standard deviations; got 0.5"),
        (lambda: Histogram(num_bins=0), "num_bins must be an integer of at least 2; got 0"),
        (lambda: Spline(num_bins=2.5), "got 2.5"),
        (lambda: NormalMixture(num_components="2"), "got '2'"),
        (lambda: Histogram(bound=9.0), "between 1 and 5 .* got 9.0"),
        (
            lambda: NormalMixture(num_components=0),
            "num_components must be an integer of at least 1; got 0",
        ),
    ],
)
def test_options_that_make_no_family_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
