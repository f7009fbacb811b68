"""Families against closed forms and against torch's own distributions."""

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_mf.families import FAMILIES, Family, Normal, get_family

every_family = pytest.mark.parametrize("family", [f() for f in FAMILIES.values()], ids=FAMILIES)


def some_params(family):
    return family.init(torch.tensor([0.0, -1.0, 3.0]), torch.tensor([1.0, 0.2, 5.0]))


@every_family
def test_family_keeps_its_contract(family):
    assert isinstance(family, Family)
    assert FAMILIES[family.name] is type(family)
    params = some_params(family)
    assert len(params) == len(family.param_names) == len(family.constraints)
    for value, constraint in zip(params, family.constraints, strict=True):
        assert value.shape == (3,)
        assert constraint.check(value).all()
    assert family == type(family)()
    assert hash(family) == hash(type(family)())


@every_family
def test_log_prob_is_the_distributions(family):
    params = some_params(family)
    u = torch.randn(4, 5, 3)
    torch.testing.assert_close(family.log_prob(params, u), family.distribution(params).log_prob(u))


@every_family
def test_density_integrates_to_one_and_gives_the_entropy(family):
    params = some_params(family)
    # Between quantiles that leave out 2e-10 of the mass; trapezoids are exact to rounding there.
    low, high = (family.quantile(params, torch.tensor(p)) for p in (1e-10, 1 - 1e-10))
    grid = low + (high - low) * torch.linspace(0.0, 1.0, 20_001)[:, None]
    log_prob = family.log_prob(params, grid)
    total = torch.trapezoid(log_prob.exp(), grid, dim=0)
    torch.testing.assert_close(total, torch.ones(3), atol=1e-8, rtol=0)
    entropy = family.entropy(params)
    if entropy is not None:
        numeric = torch.trapezoid(-log_prob.exp() * log_prob, grid, dim=0)
        torch.testing.assert_close(entropy, numeric, atol=1e-6, rtol=0)


@every_family
def test_quantile_inverts_the_distribution_function(family):
    params = some_params(family)
    p = torch.tensor([0.01, 0.5, 0.9])[:, None]
    cdf = family.distribution(params).cdf(family.quantile(params, p))
    torch.testing.assert_close(cdf, p.expand(3, 3))


@every_family
def test_transform_is_monotone_and_carries_gradients(family):
    params = tuple(p.clone().requires_grad_() for p in some_params(family))
    noise = family.noise((1000, 3), dtype=torch.float64).sort(0).values
    u = family.transform(params, noise)
    assert (u.diff(dim=0) > 0).all()
    gradients = torch.autograd.grad(u.square().sum(), params)
    assert all((g != 0).all() for g in gradients)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(family, dtype):
    params = tuple(p.to(dtype) for p in some_params(family))
    noise = family.noise((2, 3), dtype=dtype, device=torch.device("cpu"))
    u = family.transform(params, noise)
    values = [noise, u, family.log_prob(params, u), family.quantile(params, torch.tensor([0.3]))]
    values += [*family.fit_weighted(u, torch.zeros(2, dtype=dtype))]
    assert {v.dtype for v in values} == {dtype}


@every_family
def test_noise_follows_the_factor(family):
    # 20000 draws: the empirical distribution function is within 5 / (2 sqrt(S)) of the true one.
    params = some_params(family)
    u = family.transform(params, family.noise((20_000, 3), dtype=torch.float64))
    p = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99])[:, None]
    share = (u[None] < family.quantile(params, p)[:, None]).double().mean(1)
    assert (share - p).abs().max() < 5 / (2 * 20_000**0.5)


@every_family
def test_fit_weighted_finds_a_member_again(family):
    # Quantiles as draws: the fit's error is that of the quadrature, not of sampling.
    params = some_params(family)
    p = (torch.arange(100_000) + 0.5) / 100_000
    u = family.quantile(params, p[:, None])
    fitted = family.fit_weighted(u, torch.zeros(100_000))
    for found, true in zip(fitted, params, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-3)


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
    a, b = Normal().distribution(some_params(Normal())), torch.distributions.Normal(0.0, 1.0)
    assert kl_divergence(a, b).shape == (3,)


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
