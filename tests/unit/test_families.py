"""Every family in the registry against the contract, by quadrature and finite differences."""

import math
import pickle

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_mf.density.capture import capture_graph
from pyro_mf.families import FAMILIES, Family, Normal, get_family
from pyro_mf.families.protocol import event_dim_of, home_of

ELEMENTWISE = [f() for f in FAMILIES.values() if not event_dim_of(f())]
BLOCKS = [f() for f in FAMILIES.values() if event_dim_of(f())]
KINDS = {None, "positive", "unit_interval", "simplex", "circular", "boolean", "integer"}


def over(families):
    return pytest.mark.parametrize("family", families, ids=[f.name for f in families])


every_family = over(ELEMENTWISE + BLOCKS)
every_element = over(ELEMENTWISE)
every_block = over(BLOCKS)
LOC, SCALE = torch.tensor([0.0, -1.0, 1.5]).double(), torch.tensor([1.0, 0.2, 0.6]).double()


def bent(family, shape=LOC.shape):
    """Parameters that are no longer those of the member nearest to a Normal."""
    loc, scale = (x.expand(*shape[:-1], 3) for x in (LOC, SCALE))
    generator = torch.Generator().manual_seed(1)
    params = []
    for value, constraint in zip(family.init(loc, scale), family.constraints, strict=True):
        to = torch.distributions.transform_to(constraint)
        stored = to.inv(value)
        shift = 0.3 * torch.randn(stored.shape, generator=generator, dtype=stored.dtype)
        params.append(to(stored + shift))
    return tuple(params)


def bounds(family, params, share=1e-10):
    return (family.quantile(params, torch.tensor(p)) for p in (share, 1 - share))


@every_family
def test_parameters_meet_their_constraints(family):
    assert isinstance(family, Family)
    assert FAMILIES[family.name] is type(family)
    assert get_family(family.name) == family
    assert home_of(family) in KINDS
    for params in (family.init(LOC, SCALE), bent(family)):
        assert len(params) == len(family.param_names) == len(family.constraints)
        for value, constraint in zip(params, family.constraints, strict=True):
            assert bool(constraint.check(value).all())
            assert torch.isfinite(value).all()


@every_family
def test_is_a_value(family):
    assert pickle.loads(pickle.dumps(family)) == family
    assert hash(type(family)()) == hash(family)
    assert repr(family).startswith(type(family).__name__)


@every_family
def test_names_no_attribute_of_a_guide(family):
    from pyro_mf import AutoMeanField

    assert not [name for name in family.param_names if hasattr(AutoMeanField, name)]


@every_element
@pytest.mark.parametrize("make", [lambda f: f.init(LOC, SCALE), bent], ids=["start", "bent"])
def test_density_integrates_to_one_and_gives_the_entropy(family, make):
    params = make(family)
    # The mass in between, and by substitution u = quantile(p) so that kinks and tails are resolved.
    low, high = bounds(family, params, 1e-6)
    grid = low + (high - low) * torch.linspace(0.0, 1.0, 400_001, dtype=torch.float64)[:, None]
    log_prob = family.log_prob(params, grid)
    total = torch.trapezoid(log_prob.exp(), grid, dim=0)
    torch.testing.assert_close(total, torch.full((3,), 1 - 2e-6), atol=2e-5, rtol=0)
    entropy = family.entropy(params)
    if entropy is not None:
        # Midpoints; at the ends, where log q is a logarithm of p, they are off by less than 1 / S.
        p = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        numeric = -family.log_prob(params, family.quantile(params, p[:, None])).mean(0)
        torch.testing.assert_close(entropy, numeric, atol=2e-4, rtol=0)


@every_element
def test_quantile_inverts_the_mass(family):
    params = bent(family)
    low, _ = bounds(family, params, 1e-9)
    for p in (0.05, 0.5, 0.9):
        u = family.quantile(params, torch.tensor(p))
        grid = low + (u - low) * torch.linspace(0.0, 1.0, 200_001, dtype=torch.float64)[:, None]
        mass = torch.trapezoid(family.log_prob(params, grid).exp(), grid, dim=0)
        torch.testing.assert_close(mass, torch.full((3,), p), atol=2e-5, rtol=0)


# A histogram's density jumps where its parameters say, so that its score does not average to zero.
@over([f for f in ELEMENTWISE + BLOCKS if f.name != "histogram"])
def test_draws_follow_the_density(family):
    # E_q of the score is zero: by the draws of transform, under log_prob. Standard errors from the
    # 40,000 draws; five of them, for some tens of parameters.
    params = bent(family)
    draws = family.transform(params, family.noise((40_000, 3), dtype=torch.float64))
    shaped = tuple(p.expand(40_000, *p.shape).clone().requires_grad_() for p in params)
    scores = torch.autograd.grad(
        family.log_prob(shaped, draws).sum(), shaped, allow_unused=True, materialize_grads=True
    )
    for score in scores:
        error = score.std(0) / 200.0
        assert (score.mean(0).abs() <= 5.0 * error + 1e-12).all()


@every_family
def test_transform_is_differentiable_in_the_parameters(family):
    params = bent(family)
    noise = 0.8 * family.noise((5, 3), dtype=torch.float64)
    _hold_to_differences(family, params, lambda p: family.transform(p, noise).sin().sum())


@every_family
def test_log_prob_is_differentiable_in_parameters_and_values(family):
    params = bent(family)
    u = family.transform(params, 0.8 * family.noise((5, 3), dtype=torch.float64)) + 1e-3
    _hold_to_differences(family, params, lambda p: family.log_prob(p, u).sum())
    u.requires_grad_()
    direction = torch.randn_like(u)
    slope = torch.autograd.grad(family.log_prob(params, u).sum(), u)[0].mul(direction).sum()
    step = 1e-6
    ahead, behind = (
        family.log_prob(params, u.detach() + s * direction).sum() for s in (step, -step)
    )
    torch.testing.assert_close(slope, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)


def _hold_to_differences(family, params, function):
    stored = [
        torch.distributions.transform_to(c).inv(p).requires_grad_()
        for p, c in zip(params, family.constraints, strict=True)
    ]

    def value(shift):
        moved = (s + shift * d for s, d in zip(stored, directions, strict=True))
        return function(
            tuple(
                torch.distributions.transform_to(c)(m)
                for m, c in zip(moved, family.constraints, strict=True)
            )
        )

    directions = [torch.randn_like(s) for s in stored]
    found = torch.autograd.grad(value(0.0), stored, allow_unused=True, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    step = 1e-6
    with torch.no_grad():
        difference = (value(step) - value(-step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=2e-4, atol=2e-4)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(family, dtype):
    params = tuple(p.to(dtype) for p in family.init(LOC, SCALE))
    noise = family.noise((60, 3), dtype=dtype, device=torch.device("cpu"))
    u = family.transform(params, noise)
    values = [noise, u, family.log_prob(params, u), family.quantile(params, torch.tensor([0.3]))]
    values += [*family.fit_weighted(u, torch.zeros(60, dtype=dtype))]
    assert {v.dtype for v in values} == {dtype}


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(family, dtype):
    loc = torch.tensor([-30.0, 0.0, 30.0], dtype=dtype)
    for scale in (1e-3, 1.0, 30.0):
        params = tuple(p.requires_grad_() for p in family.init(loc, torch.full_like(loc, scale)))
        noise = family.noise((4, 3), dtype=dtype)
        noise[0], noise[1] = 5.0, -5.0
        u = family.transform(params, noise)
        log_prob = family.log_prob(params, u)
        gradients = torch.autograd.grad(log_prob.sum() + u.sum(), params, allow_unused=True)
        for value in (u, log_prob, *(g for g in gradients if g is not None)):
            assert torch.isfinite(value).all()


@every_element
def test_batches_of_any_shape(family):
    flat = family.init(LOC, SCALE)
    site = family.init(LOC.expand(2, 3), SCALE.expand(2, 3))
    u = torch.randn(4, 2, 3)
    whole = family.log_prob(site, u)
    assert whole.shape == (4, 2, 3)
    torch.testing.assert_close(whole[:, 1], family.log_prob(flat, u[:, 1]))
    alone = family.init(LOC[0], SCALE[0])
    torch.testing.assert_close(whole[..., 0], family.log_prob(alone, u[..., 0]))
    noise = family.noise((4, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(
        family.transform(site, noise)[:, 0], family.transform(flat, noise[:, 0])
    )


@every_family
def test_is_captured_as_a_graph(family):
    params = tuple(p.clone() for p in bent(family))

    def loss(noise, *params):
        params = tuple(p.detach().requires_grad_() for p in params)
        with torch.enable_grad():
            u = family.transform(params, noise)
            value = (family.log_prob(params, u) + u.square()).sum()
            return torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)

    noise = family.noise((6, 3), dtype=torch.float64)
    graph = capture_graph(loss, (noise, *params))
    other = family.noise((6, 3), dtype=torch.float64)
    torch.testing.assert_close(graph(other, *params), loss(other, *params))


@every_element
def test_distribution_is_the_family(family):
    params = bent(family)
    distribution = family.distribution(params)
    assert distribution.batch_shape == (3,)
    u = family.transform(params, family.noise((7, 3), dtype=torch.float64))
    torch.testing.assert_close(distribution.log_prob(u), family.log_prob(params, u))
    assert distribution.sample((2,)).shape == (2, 3)


@every_element
def test_fit_weighted_is_no_worse_than_the_nearest_normal_member(family):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    u = torch.stack([u[:, 0], u[:, 1].exp(), u[:, 2] + 3.0 * (u[:, 0] > 0)], 1)
    log_weights = torch.randn(400, generator=generator, dtype=torch.float64)
    weights = torch.softmax(log_weights, 0)
    mean = weights @ u
    sd = (weights @ (u - mean).square()).sqrt()

    def likelihood(params):
        return weights @ family.log_prob(params, u)

    fitted = likelihood(family.fit_weighted(u, log_weights))
    assert (fitted >= likelihood(family.init(mean, sd)) - 1e-6).all()
    shifted = likelihood(family.fit_weighted(u, log_weights + 300.0))
    torch.testing.assert_close(shifted, fitted, atol=1e-6, rtol=0)


@every_element
@pytest.mark.parametrize("trouble", ["few", "constant", "one draw", "outlier"])
def test_fit_weighted_survives(family, trouble):
    u, log_weights = torch.randn(50, 2), torch.zeros(50)
    if trouble == "few":
        u, log_weights = u[:3], log_weights[:3]
    elif trouble == "constant":
        u[:, 1] = 0.5
    elif trouble == "one draw":
        log_weights[7] = 60.0
    else:
        u[3, 0] = 1e4
    params = family.fit_weighted(u, log_weights)
    for value, constraint in zip(params, family.constraints, strict=True):
        assert torch.isfinite(value).all()
        assert bool(constraint.check(value).all())
    assert torch.isfinite(family.log_prob(params, u)).all()


@every_block
def test_block_contributions_sum_to_the_density(family):
    params = bent(family)
    u = torch.randn(6, 3)
    expected = family.distribution(params).log_prob(u)
    torch.testing.assert_close(family.log_prob(params, u).sum(-1), expected)
    entropy = family.entropy(params)
    if entropy is not None:
        torch.testing.assert_close(entropy.sum(-1), family.distribution(params).entropy())


def test_normal_fit_is_the_forward_optimum_under_weights():
    u = torch.randn(200, 2)
    log_weights = torch.randn(200)
    loc, scale = Normal().fit_weighted(u, log_weights)
    loc, scale = loc.requires_grad_(), scale.requires_grad_()
    weights = torch.softmax(log_weights, 0)[:, None]
    cross_entropy = -(weights * Normal().log_prob((loc, scale), u)).sum()
    for gradient in torch.autograd.grad(cross_entropy, (loc, scale)):
        torch.testing.assert_close(gradient, torch.zeros(2), atol=1e-12, rtol=0)
    shifted = Normal().fit_weighted(u, log_weights + 300.0)
    torch.testing.assert_close(shifted, (loc.detach(), scale.detach()))


def test_normal_divergence_is_analytic():
    params = Normal().init(LOC, SCALE)
    a, b = Normal().distribution(params), torch.distributions.Normal(0.0, 1.0)
    assert kl_divergence(a, b).shape == (3,)
    assert math.isclose(float(kl_divergence(a, b)[0]), 0.0, abs_tol=1e-12)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ("norml", ValueError, "Unknown family 'norml'.*The families are .*did you mean 'normal'"),
        ("Normal", ValueError, "did you mean 'normal'"),
        (Normal, TypeError, "object with the methods"),
        (3, TypeError, "got 3"),
    ],
)
def test_unknown_families_are_refused(given, error, match):
    with pytest.raises(error, match=match):
        get_family(given)


def test_objects_pass_through():
    family = Normal()
    assert get_family(family) is family
    assert get_family("normal") == family
