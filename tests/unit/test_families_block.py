"""Block factors, against torch's multivariate distributions."""

import math
import pickle

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence, transform_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mf.density.capture import capture_graph
from pyro_mf.families.full_rank import FullRank
from pyro_mf.families.low_rank import LowRank
from pyro_mf.families.protocol import Family, event_dim_of

FAMILIES = [FullRank(), FullRank(over="site"), LowRank(rank=2), LowRank(rank=7)]
K = 4

every_block = pytest.mark.parametrize("family", FAMILIES, ids=repr)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def some_params(family, blocks=(3,), dtype=torch.float64, k=K):
    start = family.init(torch.zeros(*blocks, k), torch.ones(*blocks, k))
    generator = torch.Generator().manual_seed(3)
    drawn = []
    for value, constraint in zip(start, family.constraints, strict=True):
        stored = transform_to(constraint).inv(value)
        stored = stored + 0.7 * torch.randn(stored.shape, generator=generator, dtype=stored.dtype)
        drawn.append(transform_to(constraint)(stored).to(dtype))
    return tuple(drawn)


def draws(family, params, num, *, seed=0):
    torch.manual_seed(seed)
    shape = params[0].shape
    return family.transform(params, family.noise((num, *shape), dtype=params[0].dtype))


def weighted_log_likelihood(family, params, u, log_weights):
    weights = torch.softmax(log_weights, 0).reshape(-1, *(1,) * (u.dim() - 2))
    return (weights * family.log_prob(params, u).sum(-1)).sum(0)


@every_block
def test_family_keeps_its_contract(family):
    assert isinstance(family, Family)
    assert event_dim_of(family) == 1
    params = some_params(family)
    assert len(params) == len(family.param_names) == len(family.constraints)
    for value, constraint in zip(params, family.constraints, strict=True):
        assert value.shape[:2] == (3, K)
        assert constraint.check(value).all()
    again = pickle.loads(pickle.dumps(family))
    assert again == family
    assert hash(again) == hash(family)
    on_meta = family.init(*2 * [torch.empty(5, K, device="meta")])
    assert all(p.shape[0] == 5 for p in on_meta)


@every_block
def test_contributions_sum_to_the_joint(family):
    params = some_params(family)
    reference = family.distribution(params)
    assert reference.batch_shape == (3,)
    u = torch.randn(2, 5, 3, K)
    log_prob = family.log_prob(params, u)
    assert log_prob.shape == (2, 5, 3, K)
    torch.testing.assert_close(log_prob.sum(-1), reference.log_prob(u))
    torch.testing.assert_close(family.entropy(params).sum(-1), reference.entropy())


def test_contributions_of_the_full_rank_are_conditional_densities():
    loc, tril = some_params(FullRank(), blocks=())
    u = torch.randn(K)
    parts = FullRank().log_prob((loc, tril), u)
    for i in range(1, K + 1):
        first = MultivariateNormal(loc[:i], scale_tril=tril[:i, :i])
        torch.testing.assert_close(parts[:i].sum(), first.log_prob(u[:i]))


@every_block
def test_draws_have_the_covariance(family):
    # The map is linear in the noise: its Jacobian is the covariance's root, exactly.
    params = some_params(family, blocks=())
    noise = family.noise((1, K), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda n: family.transform(params, n), noise)
    root = jacobian.reshape(K, -1)
    torch.testing.assert_close(root @ root.T, family.distribution(params).covariance_matrix)
    torch.testing.assert_close(family.transform(params, 0.0 * noise)[0], params[0])


@every_block
def test_quantiles_are_marginal(family):
    params = some_params(family)
    p = torch.tensor([0.01, 0.5, 0.9])[:, None, None]
    sd = family.distribution(params).covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    normal = torch.distributions.Normal(params[0], sd)
    torch.testing.assert_close(family.quantile(params, p), normal.icdf(p))


@every_block
def test_gradients_are_those_of_finite_differences(family):
    stored = [
        transform_to(c).inv(p).requires_grad_()
        for p, c in zip(some_params(family, blocks=(2,)), family.constraints, strict=True)
    ]
    noise = family.noise((3, 2, K), dtype=torch.float64)
    u = torch.randn(3, 2, K, requires_grad=True)

    def params(x):
        return tuple(transform_to(c)(v) for v, c in zip(x, family.constraints, strict=True))

    assert torch.autograd.gradcheck(lambda *x: family.transform(params(x), noise), stored)
    assert torch.autograd.gradcheck(lambda u, *x: family.log_prob(params(x), u), (u, *stored))
    assert torch.autograd.gradcheck(lambda *x: family.entropy(params(x)), stored)
    assert torch.autograd.gradgradcheck(lambda *x: family.entropy(params(x)).sum(), stored)


@every_block
def test_divergence_from_a_normal_prior_is_torchs(family):
    params = some_params(family)
    prior = MultivariateNormal(torch.ones(K), 2.0 * torch.eye(K))
    found = kl_divergence(family.distribution(params), prior)
    covariance, loc = family.distribution(params).covariance_matrix, params[0]
    second = covariance.diagonal(dim1=-2, dim2=-1) + (loc - 1.0).square()
    cross = (0.25 * second + 0.5 * math.log(4.0 * math.pi)).sum(-1)
    torch.testing.assert_close(cross - family.entropy(params).sum(-1), found)


@every_block
def test_init_has_the_marginals(family):
    loc, scale = torch.randn(3, K), torch.rand(3, K) + 0.1
    params = family.init(loc, scale)
    covariance = family.distribution(params).covariance_matrix
    torch.testing.assert_close(params[0], loc)
    torch.testing.assert_close(covariance.diagonal(dim1=-2, dim2=-1).sqrt(), scale)
    off = covariance / (scale[..., None] * scale[..., None, :]) - torch.eye(K)
    assert off.abs().max() <= 0.0101
    # Every parameter has a gradient there, or a fit would never leave it.
    leaves = tuple(p.detach().requires_grad_() for p in params)
    u = family.transform(leaves, family.noise((5, 3, K), dtype=torch.float64))
    loss = u.sum(-1).square().sum() - family.entropy(leaves).sum()
    assert all((g != 0).any() for g in torch.autograd.grad(loss, leaves))


@every_block
def test_fit_weighted_finds_a_member_again(family):
    params = some_params(family)
    if isinstance(family, LowRank) and family.rank >= K:
        pytest.skip("not identified")
    # Draws whose moments are exactly the member's.
    wanted = family.distribution(params).covariance_matrix
    z = torch.linalg.qr(torch.randn(64, 3 * K))[0]
    z = z - z.mean(0)
    z = torch.linalg.qr(z)[0].reshape(64, 3, K) * 8.0
    u = params[0] + torch.einsum("sbj,bij->sbi", z, torch.linalg.cholesky(wanted))
    fitted = family.fit_weighted(u, torch.full((64,), 5.0))
    torch.testing.assert_close(fitted[0], params[0])
    tolerance = 1e-6 if isinstance(family, FullRank) else 0.02  # EM approaches, and k=4 is tight
    found = family.distribution(fitted).covariance_matrix
    sd = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (found - wanted) / (sd[..., None] * sd[..., None, :])
    assert error.abs().max() < tolerance


def test_full_rank_fit_is_the_weighted_covariance():
    u, log_weights = torch.randn(200, 2, 3), torch.randn(200)
    loc, tril = FullRank().fit_weighted(u, log_weights)
    for b in range(2):
        weights = torch.softmax(log_weights, 0)
        wanted = torch.cov(u[:, b].T, correction=0, aweights=weights)
        torch.testing.assert_close(tril[b] @ tril[b].T, wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(loc[b], weights @ u[:, b])


def test_low_rank_fit_finds_the_factors_of_many_columns():
    # 40 columns, 2 factors: the covariance is known to sampling error of 2000 draws, which a
    # correlation has to 1 / sqrt(S) = 0.022; of 800 the largest error is within 4.5 of these.
    family = LowRank(rank=2)
    params = some_params(family, blocks=(), k=40)
    fitted = family.fit_weighted(draws(family, params, 2000), torch.zeros(2000))
    wanted, found = (family.distribution(p).covariance_matrix for p in (params, fitted))
    sd = wanted.diagonal().sqrt()
    error = (found - wanted) / (sd[:, None] * sd)
    assert error.abs().max() < 4.5 * 0.022 * math.sqrt(2)
    diagonal = FullRank().init(params[0], sd)  # a negative control
    control = (FullRank().distribution(diagonal).covariance_matrix - wanted) / (sd[:, None] * sd)
    assert control.abs().max() > 0.3


@every_block
@both_dtypes
def test_fit_is_robust(family, dtype):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(50, 2, K, generator=generator, dtype=dtype)
    u[:, 0, 0] = 0.7  # a constant
    u[7, 0, 1] = 1e6  # an outlier
    u[:, 1, 1] = 3.0 * u[:, 1, 0]  # dependent
    one_heavy = torch.zeros(50, dtype=dtype)
    one_heavy[3] = 40.0
    few = u[:3]
    for values, log_weights in (
        (u, torch.zeros(50, dtype=dtype)),
        (u, one_heavy),
        (few, torch.zeros(3, dtype=dtype)),
    ):
        fitted = family.fit_weighted(values, log_weights)
        for value, constraint in zip(fitted, family.constraints, strict=True):
            assert value.dtype == dtype
            assert value.isfinite().all()
            assert constraint.check(value).all()
        assert family.log_prob(fitted, values).isfinite().all()
        assert family.entropy(fitted).isfinite().all()


@every_block
def test_fit_is_never_worse_than_independence(family):
    for num in (3, 50):
        u, log_weights = draws(family, some_params(family), num), 0.3 * torch.randn(num)
        weights = torch.softmax(log_weights, 0)[:, None, None]
        mean = (weights * u).sum(0)
        sd = (weights * (u - mean).square()).sum(0).sqrt()
        fitted = family.fit_weighted(u, log_weights)
        started = FullRank().init(mean, sd)
        ours = weighted_log_likelihood(family, fitted, u, log_weights)
        assert (ours >= weighted_log_likelihood(FullRank(), started, u, log_weights)).all()


@every_block
def test_fit_follows_shifts_and_stretches(family):
    u, log_weights = draws(family, some_params(family), 60), torch.randn(60)
    shift, stretch = torch.randn(3, K), torch.tensor([1e-3, 1.0, 30.0, 1e4])
    before = family.distribution(family.fit_weighted(u, log_weights))
    after = family.distribution(family.fit_weighted(shift + stretch * u, log_weights + 9.0))
    torch.testing.assert_close(after.mean, shift + stretch * before.mean)
    stretched = stretch[:, None] * before.covariance_matrix * stretch
    error = (after.covariance_matrix - stretched) / (stretch[:, None] * stretch)
    assert error.abs().max() < 1e-6


@every_block
@both_dtypes
def test_extremes_are_finite(family, dtype):
    for scale in (1e-6, 1e6):
        params = some_params(family, dtype=dtype)
        params = (params[0], *(p * scale for p in params[1:]))
        params = tuple(p.requires_grad_() for p in params)
        noise = family.noise((4, 3, K), dtype=dtype)
        drawn = family.transform(params, noise)
        u = torch.cat([drawn.detach(), params[0].detach()[None] + 1e4 * scale]).requires_grad_()
        log_prob = family.log_prob(params, u)
        values = [
            drawn,
            log_prob,
            family.entropy(params),
            *torch.autograd.grad(drawn.sum(), params, allow_unused=True, materialize_grads=True),
        ]
        values += torch.autograd.grad(log_prob.sum(), (*params, u))
        assert all(v.isfinite().all() for v in values)
        assert {v.dtype for v in values} == {dtype}


@every_block
def test_batches_of_any_shape(family):
    params = some_params(family, blocks=(6,))
    noise = family.noise((5, 6, K), dtype=torch.float64)
    u = family.transform(params, noise)
    assert u.shape == (5, 6, K)
    log_prob = family.log_prob(params, u)
    shaped = tuple(p.unflatten(0, (2, 3)) for p in params)
    again = family.transform(shaped, noise.unflatten(1, (2, 3)))
    torch.testing.assert_close(again.flatten(1, 2), u)
    torch.testing.assert_close(family.log_prob(shaped, again).flatten(1, 2), log_prob)
    assert family.entropy(shaped).shape == family.quantile(shaped, torch.tensor(0.3)).shape
    one = tuple(p[0] for p in params)  # no blocks: one vector
    torch.testing.assert_close(family.transform(one, noise[:, 0]), u[:, 0])
    torch.testing.assert_close(family.log_prob(one, u[:, 0]), log_prob[:, 0])
    torch.testing.assert_close(family.log_prob(one, u[0, 0]), log_prob[0, 0])
    per_draw = tuple(p.expand(5, *p.shape) for p in params)
    torch.testing.assert_close(family.transform(per_draw, noise), u)
    torch.testing.assert_close(family.log_prob(per_draw, u), log_prob)


@pytest.mark.slow  # by torch's own tracer; by ours in test_families.py
@every_block
@pytest.mark.parametrize("trace", [capture_graph, make_fx], ids=["recorder", "make_fx"])
def test_graphs_hold_draws_densities_and_gradients(family, trace):
    def function(noise, *params):
        params = tuple(p.detach().requires_grad_() for p in params)
        u = family.transform(params, noise)
        loss = (family.log_prob(params, u) + u.square()).sum()
        return (u.detach(), *torch.autograd.grad(loss, params))

    params = some_params(family)
    noise, other = (family.noise((6, 3, K), dtype=torch.float64) for _ in range(2))
    given = (noise, *params)
    graph = capture_graph(function, given) if trace is capture_graph else make_fx(function)(*given)
    for found, true in zip(graph(other, *params), function(other, *params), strict=True):
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FullRank(over="plate"), "over must be 'slice'.*'site'.*got 'plate'"),
        (lambda: LowRank(over="all"), "got 'all'"),
        (lambda: LowRank(rank=0), "rank must be an integer of at least 1; got 0"),
        (lambda: LowRank(rank=True), "got True"),
        (lambda: LowRank(rank=1.5), "got 1.5"),
    ],
)
def test_options_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()
