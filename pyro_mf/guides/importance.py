"""Importance weights of a guide's draws: the raw material of k-hat and of evidence estimates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_mf.density.log_joint import LogJoint
from pyro_mf.guides.matching import check_same_sites
from pyro_mf.guides.protocol import FactorisedGuide
from pyro_mf.guides.prototype import Model


@torch.no_grad()
def log_importance_weights(
    model: Model,
    guide: FactorisedGuide,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int = 1000,
) -> Tensor:
    r"""Log weights :math:`\log p(x, z_s) - \log q(z_s)` of fresh draws from the guide.

    Their mean is the ELBO, the log of the weights' mean estimates the log evidence, and
    :func:`~pyro_mf.weights.psis` reads k-hat off them. Discrete latents are summed out.

    Args:
        model: A Pyro model on its full data.
        guide: A guide for it, which is set up if it has not been.
        model_args: The model's positional arguments.
        model_kwargs: The model's keyword arguments.
        num_draws: Number of draws S, at least 1. One S gives k-hat to about one digit only, see
            ``khat_se``: 1000 draws leave it uncertain by 0.1 or more.

    Returns:
        Shape ``(S,)``, in nats, without a gradient.

    Raises:
        ModelError: If the model subsamples a plate: weights of a minibatch are mostly noise.
        GuideMismatchError: If the guide was built for another model.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf.guides import AutoMeanField
        >>> def prior():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> exact = AutoMeanField(prior, init_scale=1.0)
        >>> log_importance_weights(prior, exact, num_draws=3).abs().max() < 1e-6
        tensor(True)
    """
    kwargs = dict(model_kwargs or {})
    log_joint = LogJoint(model, model_args, kwargs)
    guide.setup(*model_args, **kwargs)
    check_same_sites(log_joint.layout, guide.layout)
    z = guide.sample_unconstrained(num_draws)
    return log_joint(z) - guide.log_prob_unconstrained(z)
