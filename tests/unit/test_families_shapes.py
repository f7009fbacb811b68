"""Student-t, Laplace, logistic and sinh-arcsinh factors, and their weighted maximum likelihood."""

import math
import pickle

import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.distributions import constraints, transform_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mf.families.laplace import Laplace
from pyro_mf.families.logistic import Logistic
from pyro_mf.families.normal import Normal
from pyro_mf.families.protocol import Family
from pyro_mf.families.sinh_arcsinh import SinhArcsinh
from pyro_mf.families.student_t import StudentT
from pyro_mf.families.weighted_draws import centre_and_width
from pyro_mf.families.weighted_likelihood import LEAST_SCALE, maximise

# Members with and without shape, and far from what one starts with.
_LOC, _SCALE = torch.tensor([0.0, -1.0, 3.0]).double(), torch.tensor([1.0, 0.2, 5.0]).double()
MEMBERS = {
    Laplace(): (_LOC, _SCALE),
    Logistic(): (_LOC, _SCALE),
    SinhArcsinh(): (
        _LOC,
        _SCALE,
        torch.tensor([0.0, 0.6, -0.9]).double(),
        torch.tensor([1.0, 0.7, 1.4]).double(),
    ),
    StudentT(): (_LOC, _SCALE, torch.tensor([3.5, 8.0, 200.0]).double()),
}
SCIPY = {
    Laplace(): scipy.stats.laplace,
    Logistic(): scipy.stats.logistic,
    StudentT(): scipy.stats.t,
}
# Shapes at the ends of their ranges.
EXTREMES = {
    Laplace(): [()],
    Logistic(): [()],
    SinhArcsinh(): [(k, t) for k in (-0.9999, 0.0, 0.9999) for t in (0.1, 1.0, 8.0)],
    StudentT(): [(3.0 + 1e-6,), (10.0,), (1000.0,)],
}
every_family = pytest.mark.parametrize("family", MEMBERS, ids=lambda f: f.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def leaves(params):
    return tuple(p.clone().requires_grad_() for p in params)


def weighted_log_likelihood(family, params, u, log_weights):
    return (torch.softmax(log_weights, 0)[:, None] * family.log_prob(params, u)).sum(0)


def moments(u, log_weights):
    weights = torch.softmax(log_weights, 0)[:, None]
    mean = (weights * u).sum(0)
    return mean, (weights * (u - mean).square()).sum(0).sqrt()


# -- the law -----------------------------------------------------------------------------------


@every_family
def test_family_keeps_its_contract(family):
    assert isinstance(family, Family)
    assert family == type(family)()
    assert hash(family) == hash(type(family)())
    assert pickle.loads(pickle.dumps(family)) == family
    for params in (MEMBERS[family], family.init(_LOC, _SCALE)):
        assert len(params) == len(family.param_names) == len(family.constraints)
        for value, constraint in zip(params, family.constraints, strict=True):
            assert value.shape == (3,)
            assert constraint.check(value).all()
            stored = transform_to(constraint).inv(value)
            torch.testing.assert_close(transform_to(constraint)(stored), value)


@pytest.mark.parametrize("family", SCIPY, ids=lambda f: f.name)
def test_density_entropy_and_quantiles_are_scipys(family):
    loc, scale, *shape = MEMBERS[family]
    frozen = SCIPY[family](*shape, loc=loc, scale=scale)
    u = loc + scale * torch.linspace(-30.0, 30.0, 41)[:, None]
    log_prob = family.log_prob(MEMBERS[family], u)
    torch.testing.assert_close(log_prob, torch.as_tensor(frozen.logpdf(u)))
    torch.testing.assert_close(
        family.entropy(MEMBERS[family]), torch.as_tensor(frozen.entropy()), atol=1e-12, rtol=1e-12
    )
    p = torch.tensor([1e-15, 1e-6, 0.01, 0.3, 0.5, 0.7, 0.999])[:, None]
    quantile = torch.as_tensor(frozen.ppf(p))
    torch.testing.assert_close(family.quantile(MEMBERS[family], p), quantile, rtol=1e-9, atol=1e-12)


@every_family
def test_density_integrates_to_the_distribution_function_and_the_entropy(family):
    params = MEMBERS[family]
    for d in range(3):
        one = tuple(p[d] for p in params)

        def density(u, one=one):
            return float(family.log_prob(one, torch.tensor(u)).exp())

        def surprise(u, one=one):
            log_prob = family.log_prob(one, torch.tensor(u))
            return float(-log_prob.exp() * log_prob)

        ends = [float(family.quantile(one, torch.tensor(p))) for p in (1e-15, 0.01, 0.3, 0.9)]
        end = float(family.quantile(one, torch.tensor(1 - 1e-15)))
        pieces = list(zip(ends, [*ends[1:], end], strict=True))
        masses = [scipy.integrate.quad(density, *ends, epsabs=1e-12)[0] for ends in pieces]
        torch.testing.assert_close(torch.tensor(masses), torch.tensor([0.01, 0.29, 0.6, 0.1]))
        entropy = sum(scipy.integrate.quad(surprise, *ends, epsabs=1e-12)[0] for ends in pieces)
        torch.testing.assert_close(float(family.entropy(one)), entropy, atol=1e-8, rtol=0)


@every_family
def test_distribution_says_the_same(family):
    params = MEMBERS[family]
    distribution = family.distribution(params)
    assert distribution.batch_shape == (3,)
    u = torch.randn(4, 5, 3)
    torch.testing.assert_close(family.log_prob(params, u), distribution.log_prob(u))
    torch.testing.assert_close(family.entropy(params), distribution.entropy())
    assert distribution.rsample((7,)).shape == (7, 3)


@every_family
def test_quantile_inverts_the_distribution_function(family):
    params = MEMBERS[family]
    cdf = getattr(family, "cdf", lambda params, u: family.distribution(params).cdf(u))
    p = torch.tensor([1e-4, 0.01, 0.5, 0.9, 0.9999])[:, None].expand(5, 3)
    torch.testing.assert_close(cdf(params, family.quantile(params, p)), p, rtol=1e-12, atol=1e-13)


@every_family
def test_noise_follows_the_factor(family):
    # 20000 draws: the empirical distribution function is within 5 / (2 sqrt(S)) of the true one.
    params = MEMBERS[family]
    u = family.transform(params, family.noise((20_000, 3), dtype=torch.float64))
    p = torch.tensor([0.01, 0.05, 0.3, 0.5, 0.8, 0.99])[:, None]
    share = (u[None] < family.quantile(params, p)[:, None]).double().mean(1)
    assert (share - p).abs().max() < 5 / (2 * 20_000**0.5)
    wrong = (params[0], 1.2 * params[1], *params[2:])
    other = (u[None] < family.quantile(wrong, p)[:, None]).double().mean(1)
    assert (other - p).abs().max() > 5 / (2 * 20_000**0.5)  # the test can fail


@every_family
def test_init_has_the_mean_and_standard_deviation_asked_for(family):
    one = tuple(p[2] for p in family.init(_LOC, _SCALE))
    ends = [float(family.quantile(one, torch.tensor(p))) for p in (1e-15, 0.3, 0.7, 1 - 1e-15)]

    def moment(u, power):
        return (u - 3.0) ** power * float(family.log_prob(one, torch.tensor(u)).exp())

    for power, expected in ((1, 0.0), (2, 25.0)):
        found = sum(
            scipy.integrate.quad(moment, low, high, args=(power,))[0]
            for low, high in zip(ends, ends[1:], strict=False)
        )
        assert found == pytest.approx(expected, abs=1e-5)


def test_sinh_arcsinh_is_normal_without_skew_and_with_tail_one():
    params = SinhArcsinh().init(_LOC, _SCALE)
    noise = torch.randn(50, 3)
    u = Normal().transform((_LOC, _SCALE), noise)
    torch.testing.assert_close(SinhArcsinh().transform(params, noise), u)
    log_prob = SinhArcsinh().log_prob(params, 5.0 * u)
    torch.testing.assert_close(log_prob, Normal().log_prob((_LOC, _SCALE), 5.0 * u))
    torch.testing.assert_close(SinhArcsinh().entropy(params), Normal().entropy((_LOC, _SCALE)))


def test_sinh_arcsinh_keeps_median_and_range_whatever_its_shape():
    skew, tail = torch.linspace(-0.99, 0.99, 7), torch.linspace(0.1, 5.0, 9)[:, None]
    params = torch.broadcast_tensors(torch.tensor(2.0), torch.tensor(3.0), skew, tail)
    low, median, high = SinhArcsinh().quantile(
        params, torch.tensor([0.05, 0.5, 0.95])[:, None, None]
    )
    torch.testing.assert_close(median, torch.full_like(median, 2.0))
    z = math.sqrt(2.0) * torch.erfinv(torch.tensor(0.9))
    torch.testing.assert_close(high - low, 2.0 * z * torch.full_like(low, 3.0))
    bowley = (high + low - 2.0 * median) / (high - low)
    torch.testing.assert_close(bowley, (skew * torch.tanh(0.5 * tail * z.asinh())).expand(9, 7))


def test_sinh_arcsinh_is_the_law_of_jones_and_pewsey():
    # Their X = sinh((arcsinh Z + e) / d), shifted and stretched.
    loc, scale, skew, tail = (p[1] for p in MEMBERS[SinhArcsinh()])
    e, d, z = float(skew.atanh()), float(1.0 / tail), 1.6448536269514722
    unit = float(scale) * z / math.sinh(math.asinh(z) / d) / math.cosh(e)
    shift = float(loc) - unit * math.sinh(e)
    noise = torch.randn(20)
    theirs = shift + unit * (noise.asinh() / d + e).sinh()
    torch.testing.assert_close(SinhArcsinh().transform((loc, scale, skew, tail), noise), theirs)


def test_sinh_arcsinh_entropy_is_exact_at_the_ends_of_its_range():
    v = torch.linspace(-3.2, 3.2, 200_001)  # the arcsinh of the noise
    for skew in (0.0, 0.7, 0.9999):
        for tail in (0.1, 2.0, 8.0):
            params = tuple(torch.tensor(x) for x in (1.0, 2.0, skew, tail))
            surprise = -SinhArcsinh().log_prob(params, SinhArcsinh().transform(params, v.sinh()))
            density = Normal().log_prob(params[:1] + (torch.tensor(1.0),), v.sinh() + 1.0).exp()
            exact = torch.trapezoid(density * v.cosh() * surprise, v)
            torch.testing.assert_close(SinhArcsinh().entropy(params), exact, atol=2e-8, rtol=0)


# -- derivatives, precision, shapes --------------------------------------------------------------


@every_family
def test_gradients_are_those_of_finite_differences(family):
    params = leaves(MEMBERS[family])
    noise = family.noise((5, 3), dtype=torch.float64)
    u = family.transform(MEMBERS[family], noise).requires_grad_()
    assert torch.autograd.gradcheck(lambda *p: family.transform(p, noise), params)
    assert torch.autograd.gradcheck(lambda u, *p: family.log_prob(p, u), (u, *params))
    assert torch.autograd.gradcheck(lambda *p: family.entropy(p), params)
    assert torch.autograd.gradgradcheck(lambda *p: family.transform(p, noise), params)
    assert torch.autograd.gradgradcheck(lambda u, *p: family.log_prob(p, u), (u, *params))


@every_family
def test_pathwise_gradient_is_that_of_the_expectation(family):
    # E log cosh(u / 4) by quadrature over quantiles, and by 100000 draws: within 5 standard errors.
    params = leaves(tuple(p[:1] for p in MEMBERS[family]))
    u = family.transform(params, family.noise((100_000, 1), dtype=torch.float64))
    value = torch.cosh(u / 4.0).log()
    columns = []
    for param in params:
        one = torch.zeros(100_000).requires_grad_()
        wide = tuple(p.expand(100_000, 1) if p is not param else p + one[:, None] for p in params)
        spread = family.transform(wide, family.noise((100_000, 1), dtype=torch.float64))
        columns.append(torch.autograd.grad(torch.cosh(spread / 4.0).log().sum(), one)[0])
    assert value.shape == (100_000, 1)
    h = 1e-4
    for index, column in enumerate(columns):
        means = []
        for sign in (1.0, -1.0):
            moved = [float(p.detach()) for p in params]
            moved[index] += sign * h
            one = tuple(torch.tensor(m) for m in moved)
            x = torch.linspace(-12.0, 12.0, 40_001)[:, None].sinh()
            density = family.log_prob(one, x).exp() * torch.cosh(x.asinh())
            integrand = density * (x.abs() / 4 + torch.log1p(torch.exp(-x.abs() / 2)) - math.log(2))
            means.append(float(torch.trapezoid(integrand, x.asinh(), dim=0)))
        exact = (means[0] - means[1]) / (2.0 * h)
        standard_error = float(column.std()) / 100_000**0.5
        assert abs(float(column.mean()) - exact) < 5.0 * standard_error + 1e-7


@every_family
@every_dtype
def test_extreme_parameters_and_values_are_finite(family, dtype):
    for shape in EXTREMES[family]:
        for scale in (1e-8, 1.0, 1e8):
            values = [0.5, scale, *shape]
            params = leaves(torch.tensor([v], dtype=dtype) for v in values)
            steps = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1e-3, 3.0, 1e4], dtype=dtype)
            u = (0.5 + scale * steps[:, None]).requires_grad_()
            noise = torch.tensor([-6.0, -1.0, 0.0, 0.5, 6.0], dtype=dtype)[:, None]
            extra = family.noise((5, 1), dtype=dtype).dim() - 2
            drawn = family.transform(params, noise[..., None].expand(5, 1, 2) if extra else noise)
            values = [drawn, family.log_prob(params, u), family.entropy(params)]
            values.append(family.quantile(params, torch.tensor([[1e-6], [0.5], [0.999999]])))
            assert all(torch.isfinite(v).all() and v.dtype == dtype for v in values)
            for value in values[:3]:
                inputs = params if value is drawn else (*params, u)
                found = torch.autograd.grad(
                    value.double().sum() * 1e-3, inputs, allow_unused=True, retain_graph=True
                )
                assert all(torch.isfinite(g).all() for g in found if g is not None)


@every_family
def test_single_precision_is_near_double_precision(family):
    params = MEMBERS[family]
    single = tuple(p.float() for p in params)
    u = family.quantile(params, torch.linspace(0.001, 0.999, 50)[:, None])
    for found, exact in (
        (family.log_prob(single, u.float()), family.log_prob(params, u)),
        (family.entropy(single), family.entropy(params)),
        (
            family.quantile(single, torch.tensor([0.01, 0.5, 0.9])[:, None]).double() / _SCALE,
            family.quantile(params, torch.tensor([0.01, 0.5, 0.9])[:, None]) / _SCALE,
        ),
    ):
        torch.testing.assert_close(found.double(), exact, atol=3e-5, rtol=3e-5)


@every_family
@pytest.mark.parametrize("batch", [(), (2,), (3, 4), (6, 2)])
def test_batches_of_any_shape(family, batch):
    params = family.init(torch.randn(batch), torch.rand(batch) + 0.5)
    noise = family.noise((5, *batch))
    u = family.transform(params, noise)
    assert u.shape == family.log_prob(params, u).shape == (5, *batch)
    assert family.entropy(params).shape == batch
    assert family.quantile(params, torch.tensor(0.3)).shape == batch
    assert family.distribution(params).batch_shape == batch
    if batch:
        p = torch.rand(7, *(1,) * len(batch))
        assert family.quantile(params, p).shape == (7, *batch)
        first = tuple(p.reshape(-1)[:1] for p in params)
        flat = u.reshape(5, -1)
        torch.testing.assert_close(
            family.log_prob(first, flat[:, :1]), family.log_prob(params, u).reshape(5, -1)[:, :1]
        )


@pytest.mark.slow  # by torch's own tracer; by ours in test_families.py
@every_family
def test_loss_can_be_captured(family):
    def loss(stored, noise):
        params = tuple(transform_to(c)(p) for c, p in zip(family.constraints, stored, strict=True))
        u = family.transform(params, noise)
        return (family.log_prob(params, u) - u.square()).mean() + family.entropy(params).sum()

    def value_and_grad(stored, noise):
        value = loss(stored, noise)
        return value, torch.autograd.grad(value, stored)

    stored = leaves(
        transform_to(c).inv(p) for c, p in zip(family.constraints, MEMBERS[family], strict=True)
    )
    graph = make_fx(value_and_grad)(stored, family.noise((4, 3), dtype=torch.float64))
    noise = family.noise((4, 3), dtype=torch.float64)
    other = leaves(p.detach() + 0.1 for p in stored)
    torch.testing.assert_close(graph(other, noise), value_and_grad(other, noise))
    batched = torch.func.vmap(lambda u: family.log_prob(MEMBERS[family], u))(torch.zeros(4, 3))
    torch.testing.assert_close(batched, family.log_prob(MEMBERS[family], torch.zeros(4, 3)))


# -- weighted likelihood -------------------------------------------------------------------------


@every_family
def test_fit_recovers_the_parameters_of_weighted_draws(family):
    # Draws of a wider member, weighted back: estimates are within 5 standard errors, those of the
    # weighted score's sandwich. 20000 draws see an error of 5 % in a scale, for instance.
    params = MEMBERS[family]
    wide = (params[0], 1.5 * params[1], *params[2:])
    u = family.transform(wide, family.noise((20_000, 3), dtype=torch.float64))
    for d in range(3):
        column, one = u[:, d : d + 1], tuple(p[d : d + 1] for p in params)
        proposal = tuple(p[d : d + 1] for p in wide)
        log_weights = (family.log_prob(one, column) - family.log_prob(proposal, column))[:, 0]
        fitted = torch.cat(family.fit_weighted(column, log_weights))
        weights = torch.softmax(log_weights, 0)
        leaf = torch.cat(one).expand(20_000, -1).clone().requires_grad_()
        log_prob = family.log_prob(tuple(leaf.T), column[:, 0])
        (scores,) = torch.autograd.grad(log_prob.sum(), leaf)
        bread = torch.linalg.inv((scores * weights[:, None]).T @ scores)
        meat = (scores * weights.square()[:, None]).T @ scores
        standard_error = (bread @ meat @ bread).diagonal().sqrt()
        error = (fitted - torch.cat(one)).abs()
        if family == StudentT() and d == 2:  # 200 degrees of freedom are as good as any above 50
            assert fitted[2] > 50.0
            error, standard_error = error[:2], standard_error[:2]
        assert (error < 5.0 * standard_error).all(), (error / standard_error, d)
        assert (standard_error[:2] < 0.04 * params[1][d]).all()


@every_family
def test_fit_is_a_maximum(family):
    u, log_weights = torch.randn(300, 2).exp(), torch.randn(300)
    fitted = family.fit_weighted(u, log_weights)
    best = weighted_log_likelihood(family, fitted, u, log_weights)
    for index, param in enumerate(fitted):
        for factor in (0.98, 1.02):
            moved = list(fitted)
            moved[index] = param * factor
            if not family.constraints[index].check(moved[index]).all():
                continue  # the best is at the end of the range
            assert (weighted_log_likelihood(family, moved, u, log_weights) < best + 1e-9).all()
    shifted = family.fit_weighted(u, log_weights + 300.0)
    torch.testing.assert_close(shifted, fitted, rtol=1e-6, atol=1e-9)


@every_family
@every_dtype
def test_fit_is_robust(family, dtype):
    torch.manual_seed(3)
    few = torch.randn(50, 3)
    outlier = few.clone()
    outlier[7] = 1e8
    dominated = torch.zeros(50)
    dominated[3] = 40.0
    nearly = torch.zeros(50)
    nearly[3] = 6.0
    cases = {
        "few draws": (few, torch.zeros(50)),
        "constant": (torch.tensor([0.0, 0.1, -1e6]).expand(50, 3), torch.zeros(50)),
        "mostly constant": (few * (torch.arange(50) % 5 == 0)[:, None], torch.zeros(50)),
        "one draw has the weight": (few, dominated),
        "one draw has most of the weight": (few, nearly),
        "heavy weights": (few, 5.0 * torch.randn(50)),
        "a draw without weight": (few, torch.where(torch.arange(50) == 3, -torch.inf, 0.0)),
        "far outliers": (outlier, torch.zeros(50)),
        "two values": ((few > 0).double(), torch.zeros(50)),
        "one draw": (few[:1], torch.zeros(1)),
        "two draws": (few[:2], torch.zeros(2)),
    }
    if dtype == torch.float32:  # fits are computed in double precision: only the ends can fail
        cases = {case: cases[case] for case in ("few draws", "constant", "far outliers")}
    for case, (u, log_weights) in cases.items():
        u, log_weights = u.to(dtype), log_weights.to(dtype)
        fitted = family.fit_weighted(u, log_weights)
        for name, value, constraint in zip(
            family.param_names, fitted, family.constraints, strict=True
        ):
            assert value.shape == (3,)
            assert value.dtype == dtype
            assert torch.isfinite(value).all(), (case, name, value)
            assert constraint.check(value).all(), (case, name, value)
        mean, sd = moments(u, log_weights)
        if dtype == torch.float64 and (sd > 0).all():
            ours = weighted_log_likelihood(family, fitted, u, log_weights)
            start = weighted_log_likelihood(family, family.init(mean, sd), u, log_weights)
            assert (ours >= start - 1e-9).all(), (case, ours - start)


@pytest.mark.parametrize("family", [StudentT(), SinhArcsinh()], ids=lambda f: f.name)
def test_outliers_do_not_carry_a_heavy_tailed_fit_away(family):
    u = torch.randn(2000, 1)
    u[0] = 1e3
    loc, scale, *_ = family.fit_weighted(u, torch.zeros(2000))
    assert loc.abs() < 0.2
    assert 0.5 < scale < 2.0
    assert moments(u, torch.zeros(2000))[1] > 20.0  # as a Normal's would be


@every_family
def test_fit_follows_shifts_and_stretches(family):
    u, log_weights = torch.randn(200, 3).exp(), torch.randn(200)
    loc, scale, *shape = family.fit_weighted(u, log_weights)
    for shift, stretch in ((5.0, 1e-3), (-300.0, 1e3), (0.0, 1e-12)):
        moved = family.fit_weighted(shift + stretch * u, log_weights)
        expected = (shift + stretch * loc, stretch * scale, *shape)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6 * stretch)


def test_columns_do_not_know_of_each_other():
    u, log_weights = (
        torch.randn(100, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]),
        torch.randn(100),
    )
    together = SinhArcsinh().fit_weighted(u, log_weights)
    for d in range(5):
        alone = SinhArcsinh().fit_weighted(u[:, d : d + 1], log_weights)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[d : d + 1], b, rtol=1e-5, atol=1e-6)


def test_columns_beyond_the_memory_are_computed_in_turn(monkeypatch):
    u, log_weights = torch.randn(50, 7), torch.randn(50)
    at_once = Logistic().fit_weighted(u, log_weights)
    monkeypatch.setattr("pyro_mf.families.weighted_likelihood._MAX_ELEMENTS", 100)
    torch.testing.assert_close(Logistic().fit_weighted(u, log_weights), at_once)


def test_maximise_takes_the_likeliest_start_and_parameters_with_dimensions_of_their_own():
    def log_prob(params, u):  # of two modes, at -5 and at 5, the right one higher
        (x,) = params
        return torch.logaddexp(-((x[:, 0] + 5.0) ** 2), 1.0 - ((x[:, 0] - 5.0) ** 2)) - x[:, 1] ** 2

    u = torch.zeros(1, 2)
    left = (torch.tensor([[-4.0, 1.0], [-4.0, 1.0]]),)
    right = (torch.tensor([[4.0, 1.0], [20.0, 1.0]]),)
    (found,) = maximise(log_prob, [constraints.real], [left, right], u, torch.zeros(1))
    torch.testing.assert_close(found, torch.tensor([[5.0, 0.0], [-5.0, 0.0]]), atol=1e-4, rtol=0)


def test_maximise_stays_where_the_density_is_defined():
    def log_prob(params, u):  # no value beyond 1, and the steepest ascent leads there
        return 100.0 * params[0] + torch.log(1.0 - params[0]) + 0.0 * u

    (found,) = maximise(
        log_prob, [constraints.real], [(torch.zeros(1),)], torch.zeros(3, 1), torch.zeros(3)
    )
    torch.testing.assert_close(found, torch.tensor([0.99]))


def test_scales_have_a_floor_where_the_likelihood_has_none():
    u = torch.cat([torch.zeros(90, 1), torch.randn(10, 1)])
    scale = StudentT().fit_weighted(u, torch.zeros(100))[1]
    width = centre_and_width(u, torch.zeros(100))[1]
    torch.testing.assert_close(scale, LEAST_SCALE * width, rtol=1e-2, atol=0)


# -- Student-t's own -----------------------------------------------------------------------------


def test_student_t_nears_the_normal():
    params = (_LOC, _SCALE, torch.full((3,), 1000.0))
    u = Normal().quantile((_LOC, _SCALE), torch.tensor([0.1, 0.5, 0.8])[:, None])
    gap = StudentT().log_prob(params, u) - Normal().log_prob((_LOC, _SCALE), u)
    assert gap.abs().max() < 2e-3


@pytest.mark.parametrize("min_df", [0.5, 10.0, math.nan])
def test_student_t_refuses_a_bound_that_its_start_does_not_keep(min_df):
    with pytest.raises(ValueError, match="min_df must be between 1 and 10; got"):
        StudentT(min_df=min_df)


@every_dtype
def test_student_t_quantiles_far_out(dtype):
    df = torch.tensor([1.0, 2.5, 10.0, 1000.0], dtype=dtype)
    params = (torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype), df)
    p = torch.tensor([1e-30, 1e-10, 0.2, 0.4999], dtype=dtype)[:, None]
    found = StudentT(min_df=1.0).quantile(params, p)
    exact = torch.as_tensor(scipy.stats.t(df.double()).ppf(p.double()))
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=0)
