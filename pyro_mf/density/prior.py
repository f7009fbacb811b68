"""The model's prior on the unconstrained space: as a density and as a sampler.

It is where a path of tempered densities can begin that no mode of the posterior is missing from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import ModelError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.checks import headline
from pyro_mf.density.log_joint import LogJoint

_MAX_LOST = 0.01  # share of draws that may be lost, which the evidence is then wrong by


class Prior:
    """What a model says before it sees its data, in the flat coordinates of its log joint.

    Observed sites and ``pyro.factor`` terms are left out; a factor that was meant as part of the
    prior is then taken for part of the likelihood. Discrete latents are drawn and forgotten.

    Args:
        log_joint: The log joint of the model with its data.

    Raises:
        ModelError: If the prior cannot be sampled, or its density is not that of its draws:
            an improper site, or a latent under ``poutine.scale`` or ``poutine.mask``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.LogNormal(1.0, 2.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale), obs=x)
        >>> prior = Prior(LogJoint(model, (torch.tensor(3.0),)))
        >>> z = prior.sample(2, torch.Generator().manual_seed(0))
        >>> expected = dist.Normal(1.0, 2.0).log_prob(z.squeeze(1))
        >>> torch.allclose(prior.value_and_grad(z)[0], expected.double(), atol=1e-5)
        True
    """

    def __init__(self, log_joint: LogJoint) -> None:
        self._model = without_likelihood(log_joint.model)
        self._args, self._kwargs = log_joint.model_args, log_joint.model_kwargs
        self.layout = log_joint.layout
        self._sites = [site.name for site in self.layout.sites]
        with torch.random.fork_rng(), torch.no_grad():
            self._check(self._run())
        # Not compiled: a prior is soon computed, and a run of tempering soon over.
        own = LogJoint(self._model, self._args, self._kwargs, backend="graph")
        self._blocks = Blocks(own)
        if self._blocks.log_joint.layout.element_names() != self.layout.element_names():
            raise ModelError(
                "the model has other latent sites once its observations are hidden, so its prior "
                "is not known apart from the data. Let no latent depend on whether data are given."
            )

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log prior density, Jacobian included, and gradient at each row of ``(S, D)``.

        It is normalised, as far as the sites' own densities are.
        """
        return self._blocks.value_and_grad(z)

    def sample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Draw flat unconstrained vectors.

        Args:
            num_draws: Number of draws S, at least 1.
            generator: Seeds the draws; torch's global generators are left as they were.

        Returns:
            Shape ``(S, D)``, in double precision.

        Raises:
            ModelError: If the model fails at a draw, or more than one in a hundred lie at infinity
                on the unconstrained axis, as values rounded to the edge of their support do.
        """
        rows: list[Tensor] = []
        num_lost = 0
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            while len(rows) < num_draws:
                trace = self._run()
                row = self.layout.unconstrain({s: trace.nodes[s]["value"] for s in self._sites})
                if bool(torch.isfinite(row).all()):
                    rows.append(row.to(torch.float64))
                    continue
                num_lost += 1
                if num_lost > 1 + _MAX_LOST * num_draws:
                    raise ModelError(
                        f"{num_lost} draws from the prior, of {num_lost + len(rows)}, lie at "
                        "infinity on the unconstrained axis: at the edge of their support, where "
                        "draws under- or overflow. Use priors that keep away from the edge."
                    )
        return torch.stack(rows)

    def _run(self) -> Any:
        try:
            # What is observed is not looked at, so neither is what a draw makes of its parameters.
            with poutine.block(), pyro.validation_enabled(False):
                return poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
        except NotImplementedError as error:
            raise ModelError(
                f"the prior cannot be sampled: {headline(error)}. Give every latent site a proper "
                "prior."
            ) from error
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"the model fails at a draw from its prior: {headline(error)}.") from (
                error
            )

    def _check(self, trace: Any) -> None:
        for name in self._sites:
            node = trace.nodes[name]
            is_scaled = bool((torch.as_tensor(node["scale"]) != 1.0).any())
            is_masked = node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all())
            if is_scaled or is_masked:
                raise ModelError(
                    f"latent site '{name}' is under poutine.{'scale' if is_scaled else 'mask'}, so "
                    "its prior density is not the one that it is drawn from. Scale or mask the "
                    "observed sites only."
                )


def without_likelihood(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its observed sites and ``pyro.factor`` terms hidden."""
    hidden: Callable[..., Any] = poutine.block(model, hide_fn=_is_likelihood)
    return hidden


def _is_likelihood(node: Any) -> bool:
    """Whether a sample statement's density depends on data: observed, or a factor."""
    return (
        node["type"] == "sample"
        and node["is_observed"]
        and not _pyro.is_deterministic(node)
        and not _pyro.is_subsample(node)
    )
