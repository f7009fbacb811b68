"""Fitting a model that has no gradient: draws are taken as they are, and only log q differentiated.

The score-function gradient needs no derivative of the model. It is far noisier than the pathwise
one, so this is the last resort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import Trace_ELBO

from pyro_mf import _pyro

# Draws per step, each a run of the model: with fewer the noise rules, more take too long.
_PARTICLES = 8


def score_objective() -> Trace_ELBO:
    """Pyro's ELBO, which takes the score function where a site is not reparameterised.

    Not ``TraceGraph_ELBO``: it would follow the graph that such a model breaks.
    """
    return Trace_ELBO(num_particles=_PARTICLES)


def without_pathwise(guide: Callable[..., Any]) -> Callable[..., Any]:
    """A guide with the same parameters whose draws carry no gradient.

    Args:
        guide: A guide whose sites are one distribution each.
    """

    def detach(msg: Any) -> None:
        if _pyro.is_subsample(msg):
            return
        fn = msg["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        fn.has_rsample_(False)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _pyro.substitute(detach):
            return guide(*args, **kwargs)

    return run
