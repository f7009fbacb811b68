"""The reference posteriors are captured and finite; their data are not part of the repository."""

from __future__ import annotations

import pytest
import torch

from benchmarks.posteriors import DATA, MODELS, load
from pyro_mf.density import LogJoint


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the reference posteriors, see POSTERIORDB")
@pytest.mark.parametrize("name", MODELS)
def test_reference_posterior_is_captured_and_names_its_parameters(name) -> None:
    posterior = load(name)
    log_joint = LogJoint(posterior.model, posterior.args, backend="graph")
    assert log_joint.mode == "vmap"
    z = 0.2 * torch.randn(3, log_joint.size)
    value, gradient = log_joint.value_and_grad(z)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    out = log_joint.evaluate(z)
    sites = out.latents.keys() | out.deterministics.keys()
    assert {parameter.split("[")[0] for parameter in posterior.reference} <= sites
