"""At q = posterior the log weights are constant, on every kind of support.

The prior is a Normal pushed through the support's bijection and there are no data, so the guide
with that Normal's parameters is the posterior and the evidence is one. This guards the density of
the model, the density of the guide and both Jacobians at once.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch.distributions import biject_to

from pyro_mf.density import LogJoint
from pyro_mf.diagnostics.evidence import evidence_bracket
from pyro_mf.diagnostics.full_data import on_full_data
from pyro_mf.diagnostics.importance import importance_resample
from pyro_mf.diagnostics.proposals import guide_proposal
from pyro_mf.guides import AutoMeanField, log_importance_weights
from pyro_mf.objectives import ReverseKL

# Support and unconstrained shape of one event.
SUPPORTS = {
    "real": (constraints.real, ()),
    "real vector": (constraints.real_vector, (3,)),
    "positive": (constraints.positive, ()),
    "lower bound": (constraints.greater_than(2.0), ()),
    "upper bound": (constraints.less_than(-1.0), ()),
    "unit interval": (constraints.unit_interval, ()),
    "interval": (constraints.interval(-2.0, 5.0), ()),
    "simplex": (constraints.simplex, (3,)),
    "ordered": (dist.constraints.ordered_vector, (3,)),
    "positive ordered": (dist.constraints.positive_ordered_vector, (3,)),
    "correlation Cholesky": (constraints.corr_cholesky, (3,)),
}


class Pushed(dist.TransformedDistribution):
    """States the support it was made for; torch's own says "real" after an affine last step."""

    def __init__(self, base, support) -> None:
        self.stated = support
        super().__init__(base, [biject_to(support)])

    @property
    def support(self) -> constraints.Constraint:
        return self.stated

    def expand(self, batch_shape, _instance=None):
        return Pushed(self.base_dist.expand(batch_shape), self.stated)


def pushed(support: constraints.Constraint, shape: tuple[int, ...]) -> TorchDistribution:
    loc = torch.linspace(-0.5, 0.7, 3)[: shape[0]] if shape else torch.tensor(0.3)
    base = dist.Normal(loc, 0.4).to_event(len(shape))
    return Pushed(base, support)


def model(support: constraints.Constraint, shape: tuple[int, ...], plates: bool) -> None:
    if plates:
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1):
            pyro.sample("z", pushed(support, shape))
    else:
        pyro.sample("z", pushed(support, shape))


@pytest.mark.parametrize("plates", [False, True])
@pytest.mark.parametrize("name", SUPPORTS)
def test_log_weights_are_zero_at_the_posterior(name, plates) -> None:
    args = (*SUPPORTS[name], plates)
    guide = AutoMeanField(model)
    guide.setup(*args)
    loc = torch.linspace(-0.5, 0.7, 3) if SUPPORTS[name][1] else torch.tensor(0.3)
    guide.locs.z, guide.scales.z = loc, torch.tensor(0.4)
    weights = log_importance_weights(model, guide, args, num_draws=50)
    assert weights.shape == (50,)
    assert float(weights.abs().max()) < 1e-8
    z = guide.sample_unconstrained(20)
    log_joint = LogJoint(model, args)
    torch.testing.assert_close(log_joint(z), guide.log_prob_unconstrained(z), atol=1e-8, rtol=0.0)
    assert abs(ReverseKL(5, entropy="stl").loss(model, guide, *args)) < 1e-8


def test_a_wrong_jacobian_would_be_seen() -> None:
    """Negative control: the same prior scored without its Jacobian."""
    guide = AutoMeanField(model)
    args = (*SUPPORTS["simplex"], False)
    guide.setup(*args)
    z = guide.sample_unconstrained(20)
    log_joint = LogJoint(model, args)
    without = log_joint(z) - log_joint.evaluate(z).log_abs_det
    assert float(without.std()) > 0.1


@pytest.mark.parametrize("plates", [False, True])
@pytest.mark.parametrize("name", ["real", "positive", "simplex", "correlation Cholesky"])
def test_everything_by_weights_is_exact_at_the_posterior(name, plates) -> None:
    args = (*SUPPORTS[name], plates)
    guide = AutoMeanField(model)
    guide.setup(*args)
    loc = torch.linspace(-0.5, 0.7, 3) if SUPPORTS[name][1] else torch.tensor(0.3)
    guide.locs.z, guide.scales.z = loc, torch.tensor(0.4)
    log_joint = LogJoint(model, args)
    proposal = guide_proposal(guide, log_joint)
    bracket = evidence_bracket(log_joint, proposal, num_draws=256)
    assert abs(bracket.elbo) < 1e-8
    assert abs(bracket.log_evidence) < 1e-8
    assert max(abs(e.elbo) for e in bracket.multi_draw.values()) < 1e-8
    assert bracket.khat == -torch.inf
    found = importance_resample(log_joint, proposal, num_draws=100, num_proposals=100, seed=3)
    assert found.good
    assert found.num_distinct == 100  # equal weights: a permutation of the proposals
    z, _ = proposal(100, 3)
    torch.testing.assert_close(found.z.sort(0).values, z.sort(0).values)


def subsampled(size: int | None) -> None:
    with pyro.plate("p", 20, subsample_size=size):
        pyro.sample("z", dist.Normal(0.3, 0.4))


def test_log_weights_of_a_subsampled_model_are_zero_on_full_data() -> None:
    guide = AutoMeanField(subsampled)
    guide.setup(5)
    guide.locs.z, guide.scales.z = torch.tensor(0.3), torch.tensor(0.4)
    full = on_full_data(subsampled, (5,))
    weights = log_importance_weights(full, guide, (5,), num_draws=50)
    assert float(weights.abs().max()) < 1e-10
