"""Factors at home on a support, against quadrature, torch's own distributions and closed forms."""

import math
import pickle

import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import biject_to, constraints, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mf.density.capture import capture_graph
from pyro_mf.families.angles import inverse_spread, log_bessel, spread_of
from pyro_mf.families.beta import Beta, LogitBeta
from pyro_mf.families.dirichlet import Dirichlet
from pyro_mf.families.gamma import Gamma, LogGamma
from pyro_mf.families.gamma_function import (
    digamma_remainder,
    inverse_trigamma,
    log_gamma_remainder,
)
from pyro_mf.families.inverse_gamma import InverseGamma
from pyro_mf.families.log_concave import NUM_NODES, value_at_noise
from pyro_mf.families.log_normal import LogNormal
from pyro_mf.families.protocol import Family, event_dim_of, home_of
from pyro_mf.families.von_mises import VonMises

# Members of ordinary shape, narrow and wide.
PARAMS = {
    LogNormal(): ([0.3, -2.0, 1.0], [0.5, 2.0, 1e-3]),
    Gamma(): ([0.3, 2.0, 400.0], [0.1, 3.0, 50.0]),
    InverseGamma(): ([0.3, 2.0, 400.0], [0.1, 3.0, 50.0]),
    Beta(): ([0.3, 2.0, 400.0], [0.5, 1.0, 30.0]),
    VonMises(): ([0.3, -2.0, 3.0], [0.2, 3.0, 400.0]),
}
EXTREME = {
    LogNormal(): ([-300.0, 300.0], [1e-4, 1e3]),
    Gamma(): ([1e-2, 1e6, 1.0], [1e-3, 1e6, 1e20]),
    InverseGamma(): ([1e-2, 1e6, 1.0], [1e-3, 1e6, 1e20]),
    Beta(): ([1e-2, 1e6, 1e-2, 1.0], [1e-2, 1e6, 1e6, 1e8]),
    VonMises(): ([-300.0, 0.0, 3.0], [1e-6, 30.0, 1e6]),
}
TO_SUPPORT = {
    "positive": constraints.positive,
    "unit_interval": constraints.unit_interval,
}

every_native = pytest.mark.parametrize("family", PARAMS, ids=lambda f: f.name)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def params_of(family, table=PARAMS, dtype=torch.float64, *, grad=False):
    return tuple(torch.tensor(p, dtype=dtype, requires_grad=grad) for p in table[family])


def grid_of(family, params, size=20_001, tail=1e-13):
    low, high = (family.quantile(params, torch.tensor(p)) for p in (tail, 1 - tail))
    return low + (high - low) * torch.linspace(0.0, 1.0, size)[:, None]


@every_native
def test_family_keeps_its_contract(family):
    assert isinstance(family, Family)
    assert home_of(family)
    params = params_of(family)
    assert len(params) == len(family.param_names) == len(family.constraints)
    assert family == type(family)()
    assert hash(family) == hash(type(family)())
    assert pickle.loads(pickle.dumps(family)) == family


@every_native
def test_density_integrates_to_one_and_gives_the_entropy(family):
    params = params_of(family)
    grid = grid_of(family, params)
    log_prob = family.log_prob(params, grid)
    total = torch.trapezoid(log_prob.exp(), grid, dim=0)
    torch.testing.assert_close(total, torch.ones(3), atol=1e-9, rtol=0)
    numeric = torch.trapezoid(-log_prob.exp() * log_prob, grid, dim=0)
    torch.testing.assert_close(family.entropy(params), numeric, atol=1e-8, rtol=0)


@every_native
def test_log_prob_is_the_native_ones_with_jacobian(family):
    if home_of(family) not in TO_SUPPORT:
        pytest.skip("no change of variables")
    params = params_of(family)
    u = family.quantile(params, torch.tensor([0.01, 0.4, 0.97])[:, None])
    to_support = biject_to(TO_SUPPORT[home_of(family)])
    x = to_support(u)
    native = family.native(params).log_prob(x) + to_support.log_abs_det_jacobian(u, x)
    torch.testing.assert_close(family.log_prob(params, u), native, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(family.distribution(params).log_prob(u), family.log_prob(params, u))


@every_native
def test_quantile_inverts_the_distribution_function(family):
    params = params_of(family)
    p = torch.tensor([1e-6, 0.01, 0.5, 0.9, 1 - 1e-6])[:, None]
    u = family.quantile(params, p)
    # The distribution function by quadrature of the density, from where nothing is left of it.
    low = family.quantile(params, torch.tensor(1e-16))
    steps = torch.linspace(0.0, 1.0, 20_001)[:, None, None]
    mass = torch.trapezoid(family.log_prob(params, low + (u - low) * steps).exp(), dim=0, dx=5e-5)
    torch.testing.assert_close(mass * (u - low), p.expand(5, 3), rtol=1e-6, atol=1e-8)
    ends = family.quantile(params, torch.tensor([0.0, 1.0])[:, None])
    assert (ends[0] < u[0]).all()
    assert (ends[1] > u[-1]).all()


def test_gamma_and_beta_quantiles_are_those_of_scipy():
    p = torch.tensor([1e-9, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-6])[:, None]
    a = torch.tensor([0.2, 1.0, 3.0, 15.0, 1e3, 1e6])
    u = Gamma().quantile((a, torch.ones(6)), p)
    torch.testing.assert_close(
        u,
        torch.from_numpy(scipy.special.gammaincinv(a.numpy(), p.numpy())).log(),
        rtol=1e-8,
        atol=1e-8,
    )
    b = torch.tensor([3.0, 0.5, 3.0, 2.0, 1e4, 1e3])
    x = torch.from_numpy(scipy.special.betaincinv(a.numpy(), b.numpy(), p.numpy()))
    keep = x < 0.99  # the logit of what is nearer to 1 is not known
    torch.testing.assert_close(
        Beta().quantile((a, b), p)[keep], x.logit()[keep], rtol=1e-8, atol=1e-8
    )


def test_gamma_quantiles_do_not_underflow():
    # Where x is tiny the distribution function is x^a / Gamma(a + 1).
    a, p = torch.tensor([1e-4, 1e-3]), torch.tensor([1e-12, 1e-3, 0.3])[:, None]
    u = Gamma().quantile((a, torch.ones(2)), p)
    torch.testing.assert_close(u, (p.log() + torch.lgamma(a + 1)) / a, rtol=1e-13, atol=0)
    assert (u < -1000.0).all()


@pytest.mark.parametrize(
    ("law", "shape", "sd"),
    [
        (
            LogGamma(),
            (torch.logspace(-4, 8, 25, dtype=torch.float64),),
            lambda a: torch.polygamma(1, a).sqrt(),
        ),
        (
            LogitBeta(),
            tuple(torch.cartesian_prod(*2 * [torch.logspace(-4, 8, 9, dtype=torch.float64)]).T),
            lambda a, b: (torch.polygamma(1, a) + torch.polygamma(1, b)).sqrt(),
        ),
    ],
    ids=["gamma", "beta"],
)
def test_quantiles_are_at_rounding_from_1e_minus_4_to_1e8(law, shape, sd):
    """Tails that meet: the masses of both sides of each value add up to one."""
    noise = torch.linspace(-8.0, 8.0, 65)[:, None]
    u = value_at_noise(law, noise, *shape)
    assert (u.diff(dim=0) > 0).all()
    is_left = u <= law.mode(*shape)
    side, mirrored = law.side(is_left, *shape), torch.where(is_left, u, -u)
    tail = side.tail(mirrored, NUM_NODES)
    wanted = torch.where(is_left, torch.special.log_ndtr(noise), torch.special.log_ndtr(-noise))
    error = (tail.log_mass - wanted) * tail.ratio / sd(*shape)
    assert error.abs().max() < 1e-10
    finer = side.tail(mirrored, 2 * NUM_NODES)
    assert (finer.ratio / tail.ratio - 1.0).abs().max() < 1e-9


@every_native
def test_transform_is_the_quantile_at_the_noise(family):
    params = params_of(family)
    noise = torch.linspace(-6.0, 6.0, 101)[:, None].expand(101, 3)
    u = family.transform(params, noise)
    assert (u.diff(dim=0) > 0).all()
    torch.testing.assert_close(
        u, family.quantile(params, torch.special.ndtr(noise)), rtol=1e-7, atol=1e-7
    )


@every_native
def test_gradients_are_those_of_finite_differences(family):
    params = params_of(family, grad=True)
    noise = torch.tensor([-4.0, -0.7, 0.2, 3.0])[:, None].expand(4, 3)
    u = family.transform(params, noise).detach().requires_grad_()
    for function in (
        lambda *p: family.transform(p, noise),
        lambda *p: family.log_prob(p, u),
        lambda *p: family.entropy(p),
    ):
        # In logarithms of positive parameters, so that one step length suits all of them.
        stored = [
            (p.detach() if c is constraints.real else p.detach().log()).requires_grad_()
            for p, c in zip(params, family.constraints, strict=True)
        ]

        def of_stored(*x, function=function):
            pairs = zip(x, family.constraints, strict=True)
            return function(*(v if c is constraints.real else v.exp() for v, c in pairs))

        assert torch.autograd.gradcheck(of_stored, stored, atol=1e-5, rtol=1e-5)
    assert torch.autograd.gradcheck(lambda x: family.log_prob(params_of(family), x), u, rtol=1e-4)


@every_native
def test_transform_is_differentiable_twice(family):
    params = params_of(family, grad=True)
    params = tuple(p[:2].detach().requires_grad_() for p in params)
    noise = torch.tensor([-1.3, 0.4])[:, None].expand(2, 2)
    assert torch.autograd.gradgradcheck(
        lambda *p: family.transform(p, noise), params, atol=1e-4, rtol=1e-4
    )


@every_native
def test_pathwise_and_score_gradients_agree(family):
    """d/dtheta E[sin u], by quadrature over the noise and over the values."""
    params = params_of(family, grad=True)
    nodes = torch.linspace(-9.0, 9.0, 2001)[:, None].expand(2001, 3)
    weights = torch.exp(-0.5 * nodes.square()) * 0.009 / math.sqrt(2 * math.pi)
    u = family.transform(params, nodes)
    pathwise = torch.autograd.grad((weights * u.sin()).sum(), params)
    log_prob = family.log_prob(params, u.detach())
    score = torch.autograd.grad((weights * u.detach().sin() * log_prob).sum(), params)
    for a, b in zip(pathwise, score, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@every_native
def test_entropy_is_what_torch_integrates(family):
    """Divergence from another member: torch's closed form is minus entropy and cross entropy."""
    if isinstance(family, VonMises):
        pytest.skip("torch has no divergence of these")
    params = params_of(family)
    other = tuple(p.roll(1) if i else p * 1.5 for i, p in enumerate(params))
    native = kl_divergence(family.native(params), family.native(other))
    grid = grid_of(family, params)
    log_prob = family.log_prob(params, grid)
    cross = torch.trapezoid(log_prob.exp() * family.log_prob(other, grid), grid, dim=0)
    torch.testing.assert_close(-family.entropy(params) - cross, native, rtol=1e-6, atol=1e-6)


@every_native
@both_dtypes
def test_extremes_are_finite(family, dtype):
    params = params_of(family, EXTREME, dtype, grad=True)
    size = len(params[0])
    middle, low, high = (
        family.quantile(params, torch.tensor(p)).detach() for p in (0.5, 0.16, 0.84)
    )
    far = 1e4 * 0.5 * (high - low)
    noise = torch.linspace(-5, 5, 7, dtype=dtype)[:, None].expand(7, size)
    drawn = family.transform(params, noise)
    u = torch.cat([drawn.detach(), torch.stack([middle - far, middle, middle + far])])
    u.requires_grad_()
    log_prob, entropy = family.log_prob(params, u), family.entropy(params)
    values = [drawn, log_prob, entropy, low, high]
    for value in (drawn, log_prob, entropy):
        inputs = (*params, u) if value is log_prob else params
        values += torch.autograd.grad(
            value.sum(), inputs, allow_unused=True, materialize_grads=True
        )
    assert all(v.isfinite().all() for v in values)
    assert {v.dtype for v in values} == {dtype}


@every_native
def test_single_precision_is_near_double(family):
    params = params_of(family)
    noise = torch.linspace(-4, 4, 9)[:, None].expand(9, 3)
    u = family.transform(params, noise)
    narrow = tuple(p.float() for p in params)
    # A value rounded moves by 1e-7 of itself, and narrow densities see it.
    sd = family.quantile(params, torch.tensor(0.84)) - family.quantile(params, torch.tensor(0.5))
    slack = 3e-7 * (1.0 + u.abs().max(0).values) / sd
    assert ((family.transform(narrow, noise.float()).double() - u).abs() / sd <= 3 * slack).all()
    error = (family.log_prob(narrow, u.float()).double() - family.log_prob(params, u)).abs()
    assert (error <= 1e-5 + 30 * slack).all()
    torch.testing.assert_close(
        family.entropy(narrow).double(), family.entropy(params), rtol=1e-5, atol=1e-5
    )


@every_native
def test_batches_of_any_shape(family):
    flat = tuple(p.repeat(4) for p in params_of(family))
    noise = family.noise((5, 12), dtype=torch.float64)
    u = family.transform(flat, noise)
    shaped = tuple(p.reshape(4, 3) for p in flat)
    again = family.transform(shaped, noise.reshape(5, 4, 3))
    torch.testing.assert_close(again.reshape(5, 12), u)
    log_prob = family.log_prob(shaped, again)
    torch.testing.assert_close(log_prob.reshape(5, 12), family.log_prob(flat, u))
    assert (
        family.entropy(shaped).shape == family.quantile(shaped, torch.tensor(0.3)).shape == (4, 3)
    )
    assert family.native(shaped).batch_shape == family.distribution(shaped).batch_shape == (4, 3)
    per_draw = tuple(p.expand(5, 12) for p in flat)
    torch.testing.assert_close(family.transform(per_draw, noise), u)


def draws_and_gradients(family):
    def function(noise, *params):
        params = tuple(p.detach().requires_grad_() for p in params)
        u = family.transform(params, noise)
        loss = (family.log_prob(params, u) + u.square()).sum()
        return (u.detach(), *torch.autograd.grad(loss, params))

    return function


@every_native
def test_graphs_hold_draws_densities_and_gradients(family):
    function, params = draws_and_gradients(family), params_of(family)
    noise, other = (family.noise((6, 3), dtype=torch.float64) for _ in range(2))
    with torch.enable_grad():
        graph = capture_graph(function, (noise, *params))
    for found, true in zip(graph(other, *params), function(other, *params), strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.slow  # make_fx takes seconds for what the recorder does in less than one
@every_native
def test_make_fx_traces_draws_densities_and_gradients(family):
    function, params = draws_and_gradients(family), params_of(family)
    noise, other = (family.noise((6, 3), dtype=torch.float64) for _ in range(2))
    graph = make_fx(function)(noise, *params)
    for found, true in zip(graph(other, *params), function(other, *params), strict=True):
        torch.testing.assert_close(found, true)


@every_native
def test_draws_vectorise_under_vmap(family):
    params, noise = params_of(family), family.noise((6, 3), dtype=torch.float64)
    one = torch.func.vmap(lambda row: family.transform(params, row))(noise)
    torch.testing.assert_close(one, family.transform(params, noise))


@every_native
def test_init_is_near_the_normal(family):
    loc, scale = torch.tensor([0.0, -1.0, 2.0]), torch.tensor([1.0, 0.1, 1e-3])
    params = family.init(loc, scale)
    for value, constraint in zip(params, family.constraints, strict=True):
        assert value.shape == (3,)
        assert constraint.check(value).all()
    p = torch.tensor([0.16, 0.5, 0.84])[:, None]
    standard = (family.quantile(params, p) - loc) / scale
    torch.testing.assert_close(
        standard, torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 3), atol=0.3, rtol=0
    )
    assert all(x.isfinite().all() for x in family.init(loc, torch.tensor([1e-9, 50.0, 1e3])))


@every_native
def test_fit_weighted_finds_a_member_again(family):
    params = params_of(family)
    noise = torch.linspace(-8.0, 8.0, 4001)[:, None].expand(4001, 3)
    fitted = family.fit_weighted(family.transform(params, noise), -0.5 * noise[:, 0].square())
    for found, true in zip(fitted, params, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-9)


@every_native
def test_fit_is_the_forward_optimum_under_weights(family):
    u, log_weights = torch.randn(200, 3), torch.randn(200)
    fitted = tuple(p.requires_grad_() for p in family.fit_weighted(u, log_weights))
    weights = torch.softmax(log_weights, 0)[:, None]
    likelihood = (weights * family.log_prob(fitted, u)).sum()
    for gradient in torch.autograd.grad(likelihood, fitted):
        torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-7, rtol=0)
    shifted = family.fit_weighted(u, log_weights + 300.0)
    for a, b in zip(shifted, fitted, strict=True):
        torch.testing.assert_close(a, b.detach())


@every_native
@both_dtypes
def test_fit_is_robust(family, dtype):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(50, 5, generator=generator, dtype=dtype)
    u[:, 0] = 0.7  # a constant
    u[7, 1] = 300.0  # an outlier
    u[:, 2] *= 1e-4
    u[:, 3] = 20.0 * u[:, 3] - 5.0
    one_heavy = torch.zeros(50, dtype=dtype)
    one_heavy[3] = 40.0
    for log_weights in (torch.zeros(50, dtype=dtype), one_heavy):
        fitted = family.fit_weighted(u, log_weights)
        for value, constraint in zip(fitted, family.constraints, strict=True):
            assert value.dtype == dtype
            assert value.isfinite().all()
            assert constraint.check(value[1:]).all()
        assert family.log_prob(tuple(p[1:] for p in fitted), u[:, 1:]).isfinite().all()
    # Never less likely than the Normal's start.
    fitted = family.fit_weighted(u, torch.zeros(50, dtype=dtype))
    started = family.init(u.mean(0), u.std(0, correction=0).clamp_min(1e-6))
    ours, theirs = (family.log_prob(p, u).mean(0)[1:] for p in (fitted, started))
    assert (ours >= theirs - 1e-3 * (1 + theirs.abs())).all()


def test_remainders_of_the_gamma_function():
    x = torch.tensor([1e-4, 0.3, 5.0, 15.99, 16.01, 40.0])
    torch.testing.assert_close(log_gamma_remainder(x), torch.lgamma(x) - x * x.log() + x)
    torch.testing.assert_close(digamma_remainder(x), torch.digamma(x) - x.log())
    x = torch.tensor([3.0, 20.0, 1e5], requires_grad=True)
    (slope,) = torch.autograd.grad(log_gamma_remainder(x).sum(), x)
    torch.testing.assert_close(slope, digamma_remainder(x))
    y = torch.logspace(-9, 9, 37)
    torch.testing.assert_close(torch.polygamma(1, inverse_trigamma(y)), y)


# -- angles ------------------------------------------------------------------------------------


def test_von_mises_is_torchs_and_scipys():
    concentration = torch.tensor([1e-3, 0.5, 4.0, 40.0, 199.9, 200.1, 1e5])
    params = (torch.full((7,), 0.4), concentration)
    u = 0.4 + torch.linspace(-3.0, 3.0, 13)[:, None] / (1.0 + concentration.sqrt())
    log_prob = VonMises().log_prob(params, u)
    ours = torch.distributions.VonMises(*params).log_prob(u)
    torch.testing.assert_close(log_prob, ours, rtol=1e-4, atol=1e-4)  # torch's own approximation
    exact = scipy.stats.vonmises.logpdf(u.numpy(), concentration.numpy(), loc=0.4)
    torch.testing.assert_close(log_prob, torch.from_numpy(exact), rtol=1e-9, atol=1e-9)
    p = torch.tensor([0.01, 0.3, 0.5, 0.9])[:, None]
    found = VonMises().quantile(params, p)
    share = scipy.stats.vonmises.cdf(found[:, :4].numpy(), concentration[:4].numpy(), loc=0.4)
    torch.testing.assert_close(torch.from_numpy(share), p.expand(4, 4), rtol=1e-7, atol=1e-7)


def test_von_mises_quantiles_are_at_rounding():
    concentration = torch.logspace(-6, 10, 33)
    noise = torch.linspace(-8.0, 0.0, 41)[:, None]
    u = VonMises().quantile((torch.zeros(33), concentration), torch.special.ndtr(noise))
    assert (u.diff(dim=0) > 0).all()
    narrow = concentration > 1e4  # there the law is Normal, to 1 / (8 k)
    standard = u[:, narrow] * concentration[narrow].sqrt()
    torch.testing.assert_close(standard, noise.expand_as(standard), rtol=3e-3, atol=1e-6)
    flat = torch.pi * (2.0 * torch.special.ndtr(noise[:, 0]) - 1.0)
    torch.testing.assert_close(u[:, 0], flat, rtol=1e-5, atol=1e-5)


def test_von_mises_has_a_period():
    params = params_of(VonMises())
    u = torch.randn(5, 3)
    log_prob = VonMises().log_prob(params, u + 14.0 * torch.pi)
    torch.testing.assert_close(log_prob, VonMises().log_prob(params, u), rtol=1e-9, atol=1e-9)
    fitted = VonMises().fit_weighted(u, torch.zeros(5))
    turned = VonMises().fit_weighted(u + 2.0 * torch.pi, torch.zeros(5))
    torch.testing.assert_close(fitted, turned)


def test_native_von_mises_draws_are_differentiable():
    loc, concentration = (p.requires_grad_() for p in params_of(VonMises()))
    native = VonMises().native((loc, concentration))
    assert isinstance(native, torch.distributions.VonMises)
    assert native.has_rsample
    u = native.rsample((4000,))
    assert (u.abs() <= torch.pi).all()
    assert not native.sample().requires_grad
    gradients = torch.autograd.grad(u.sin().sum(), (loc, concentration))
    assert all((g != 0).all() for g in gradients)
    # Mean cosines about the location: 5 standard errors; a wrong concentration is seen.
    cosine = (u - loc).cos().detach()
    error = (cosine.mean(0) - (1.0 - spread_of(concentration.detach()))) * 4000**0.5 / cosine.std(0)
    assert error.abs().max() < 5.0
    wrong = (cosine.mean(0) - (1.0 - spread_of(2.5 * concentration.detach()))) / cosine.std(0)
    assert (wrong.abs() * 4000**0.5 > 5.0).all()
    assert native.expand((2, 3)).rsample().shape == (2, 3)
    torch.testing.assert_close(native.entropy(), VonMises().entropy((loc, concentration)))


def test_constants_of_the_von_mises_law():
    k = torch.tensor([1e-6, 0.3, 20.0, 199.99, 200.01, 1e4], requires_grad=True)
    torch.testing.assert_close(log_bessel(k), torch.special.i0e(k).log(), rtol=1e-12, atol=1e-13)
    (slope,) = torch.autograd.grad(log_bessel(k).sum(), k)
    torch.testing.assert_close(-slope, spread_of(k), rtol=1e-9, atol=1e-13)
    k = torch.logspace(-5, 9, 29)
    torch.testing.assert_close(inverse_spread(spread_of(k)), k, rtol=1e-8, atol=0)


# -- proportions -------------------------------------------------------------------------------

CONCENTRATION = torch.tensor([[0.4, 1.0, 3.0, 0.7], [30.0, 2.0, 7.0, 150.0]], dtype=torch.float64)


def test_dirichlet_keeps_the_contract():
    family = Dirichlet()
    assert isinstance(family, Family)
    assert (event_dim_of(family), home_of(family)) == (1, "simplex")
    assert pickle.loads(pickle.dumps(family)) == family
    assert hash(family) == hash(Dirichlet())
    on_meta = family.init(*2 * [torch.empty(5, 3, device="meta")])
    assert on_meta[0].shape == (5, 4)


def test_dirichlet_is_torchs_on_stick_breaking_coordinates():
    params, u = (CONCENTRATION,), 2.0 * torch.randn(6, 2, 3)
    to_simplex = biject_to(constraints.simplex)
    x = to_simplex(u)
    native = Dirichlet().native(params)
    wanted = native.log_prob(x) + to_simplex.log_abs_det_jacobian(u, x)
    parts = Dirichlet().log_prob(params, u)
    assert parts.shape == (6, 2, 3)
    torch.testing.assert_close(parts.sum(-1), wanted, rtol=1e-10, atol=1e-10)
    law = Dirichlet().distribution(params)
    assert (law.batch_shape, law.event_shape) == ((2,), (3,))
    torch.testing.assert_close(law.log_prob(u), wanted, rtol=1e-10, atol=1e-10)


def test_dirichlet_entropy_is_the_native_one_with_jacobian():
    # Stick breaking's log determinant is the sum of logs of all proportions.
    total = CONCENTRATION.sum(-1, keepdim=True)
    mean_logs = (torch.digamma(CONCENTRATION) - torch.digamma(total)).sum(-1)
    wanted = torch.distributions.Dirichlet(CONCENTRATION).entropy() - mean_logs
    torch.testing.assert_close(Dirichlet().entropy((CONCENTRATION,)).sum(-1), wanted)


def test_dirichlet_draws_have_its_means():
    # Exact where one coordinate is integrated at a time: the first proportion is a Beta variable.
    noise = torch.linspace(-9.0, 9.0, 301)[:, None, None].expand(301, 2, 3)
    weights = torch.exp(-0.5 * noise[:, :1, 0].square()) * 0.06 / math.sqrt(2 * math.pi)
    u = Dirichlet().transform((CONCENTRATION,), noise)
    assert (u.diff(dim=0) > 0).all()
    x = biject_to(constraints.simplex)(u)
    means = CONCENTRATION / CONCENTRATION.sum(-1, keepdim=True)
    torch.testing.assert_close((weights * x[..., 0]).sum(0), means[:, 0])
    # 4000 draws: 5 standard errors.
    u = Dirichlet().transform((CONCENTRATION,), torch.randn(4000, 2, 3))
    x = biject_to(constraints.simplex)(u)
    assert ((x.mean(0) - means).abs() < 5.0 * x.std(0) / 4000**0.5).all()
    p = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    share = (u[None] < Dirichlet().quantile((CONCENTRATION,), p)[:, None]).double().mean(1)
    assert (share - p).abs().max() < 5.0 * 0.5 / 4000**0.5


def test_dirichlet_gradients_and_graphs():
    family, start = Dirichlet(), CONCENTRATION.log().requires_grad_()
    noise, u = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    for function in (
        lambda x: family.transform((x.exp(),), noise),
        lambda x: family.log_prob((x.exp(),), u),
        lambda x: family.entropy((x.exp(),)),
    ):
        assert torch.autograd.gradcheck(function, start, atol=1e-5, rtol=1e-5)
    function = draws_and_gradients(family)
    with torch.enable_grad():
        graph = capture_graph(function, (noise, CONCENTRATION))
    for found, true in zip(graph(u, CONCENTRATION), function(u, CONCENTRATION), strict=True):
        torch.testing.assert_close(found, true)


def test_dirichlet_fit_is_the_forward_optimum():
    u, log_weights = torch.randn(100, 2, 3), torch.randn(100)
    (fitted,) = Dirichlet().fit_weighted(u, log_weights)
    fitted.requires_grad_()
    weights = torch.softmax(log_weights, 0)[:, None, None]
    likelihood = (weights * Dirichlet().log_prob((fitted,), u)).sum()
    (gradient,) = torch.autograd.grad(likelihood, fitted)
    torch.testing.assert_close(gradient, torch.zeros(2, 4), atol=1e-9, rtol=0)
    # A conjugate prior's divergence, by the means of logarithms that the fit matches.
    prior = torch.distributions.Dirichlet(torch.ones(4))
    fitted = fitted.detach()
    logs = torch.digamma(fitted) - torch.digamma(fitted.sum(-1, keepdim=True))
    cross = math.log(6.0) + logs.sum(-1)  # the uniform density is 3!
    divergence = -Dirichlet().entropy((fitted,)).sum(-1) - cross
    torch.testing.assert_close(kl_divergence(Dirichlet().native((fitted,)), prior), divergence)


@both_dtypes
def test_dirichlet_is_robust(dtype):
    u = torch.randn(50, 4, 3, dtype=dtype)
    u[:, 0] = 0.7
    u[7, 1] = 300.0
    u[:, 2] *= 1e-3
    one_heavy = torch.zeros(50, dtype=dtype)
    one_heavy[3] = 40.0
    for log_weights in (torch.zeros(50, dtype=dtype), one_heavy):
        (fitted,) = Dirichlet().fit_weighted(u, log_weights)
        assert fitted.dtype == dtype
        assert (fitted > 0).all()
        assert fitted.isfinite().all()
        assert Dirichlet().log_prob((fitted,), u).isfinite().all()
    (fitted,) = Dirichlet().fit_weighted(u, torch.zeros(50, dtype=dtype))
    (started,) = Dirichlet().init(u.mean(0), u.std(0, correction=0).clamp_min(1e-6))
    ours, theirs = (Dirichlet().log_prob((p,), u).sum(-1).mean(0)[1:] for p in (fitted, started))
    assert (ours >= theirs - 1e-3 * (1 + theirs.abs())).all()


def test_dirichlet_init_is_near_independent_normals():
    loc, scale = torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.3], [1e-2]])
    params = Dirichlet().init(loc, scale.expand(2, 3))
    middle = Dirichlet().quantile(params, torch.tensor(0.5))
    assert ((middle - loc) / scale).abs().max() < 0.6  # K numbers for 2 (K - 1)
    sd = Dirichlet().quantile(params, torch.tensor(0.84)) - middle
    assert ((sd / scale).log().abs() < math.log(2.5)).all()
