"""A mixture of Normals for every coordinate: several modes, skew, shoulders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, constraints
from torch.distributions.constraints import Constraint

from pyro_mf.families.anchored_map import HALF_LOG_2PI, free_numbers, relative_logs
from pyro_mf.families.mixture_fit import fit_mixture
from pyro_mf.families.mixture_quantile import mixture_quantile
from pyro_mf.families.noise import NormalNoise
from pyro_mf.families.options import check_count
from pyro_mf.families.protocol import Params
from pyro_mf.families.weighted_draws import centre_and_width, likelier

_MAX_LOG = 4.0  # components' probabilities and sds are within a factor of e^8 of each other
_SPREAD = 1.0  # of the means at the start, in components' sds: equal ones would never part


@dataclass(frozen=True)
class NormalMixture(NormalNoise):
    r"""Factors that are mixtures of K Normals, sampled through their quantile function.

    ``loc`` and ``scale`` are the factor's mean and standard deviation. Its shape is given by
    3 (K - 1) free numbers: log probabilities, means and log standard deviations of the components,
    each relative to the others, since a common shift or stretch of them is what ``loc`` and
    ``scale`` say.

    The transform is increasing in standard normal noise and has exact first and second derivatives
    in all parameters. Between two modes far apart it is so steep that a gradient in the
    probabilities would be infinite; it is cut there, where one draw in a million is.
    Probabilities and standard deviations of components differ by a factor of at most 3000.

    Args:
        num_components: Number of components K, at least 1.

    Raises:
        ValueError: If there is no component.

    Example:
        >>> family = NormalMixture(num_components=2)
        >>> u = torch.cat([torch.randn(500) - 4.0, torch.randn(500) + 4.0])[:, None]
        >>> params = family.fit_weighted(u, torch.zeros(1000))
        >>> bool((family.quantile(params, torch.tensor(0.25)) + 4.0).abs() < 0.3)
        True
    """

    num_components: int = 3

    def __post_init__(self) -> None:
        check_count("num_components", self.num_components, 1)

    @property
    def name(self) -> str:
        """``"normal_mixture"``."""
        return "normal_mixture"

    @property
    def param_names(self) -> tuple[str, ...]:
        """Mean, standard deviation, and the shape, ``(K - 1,)`` each."""
        return ("loc", "scale", "mixture_logits", "mixture_locs", "mixture_log_scales")

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Real, but for the scale."""
        real = constraints.real
        return (real, constraints.positive, real, real, real)

    def init(self, loc: Tensor, scale: Tensor) -> Params:
        """Equally wide components close to each other, which are nearly the Normal.

        Their means are from one of their standard deviations below to one above, since components
        that are the same get the same gradients and would remain so.
        """
        free = self.num_components - 1
        zeros = loc.new_zeros(*loc.shape, free)
        locs = torch.linspace(-_SPREAD, _SPREAD, free + 1, dtype=loc.dtype, device=loc.device)
        return (loc, scale, zeros, zeros + locs[:free], zeros.clone())

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Quantiles at the noise's probabilities: increasing in the noise."""
        return params[0] + params[1] * mixture_quantile(*self._standard(params), noise)

    def log_prob(self, params: Params, u: Tensor) -> Tensor:
        """Log density of every element, in nats."""
        loc, scale = params[:2]
        log_probs, locs, scales = self._standard(params)
        z = (((u - loc) / scale)[..., None] - locs) / scales
        log_densities = log_probs - 0.5 * z.square() - scales.log() - HALF_LOG_2PI
        return torch.logsumexp(log_densities, -1) - scale.log()

    def entropy(self, params: Params) -> None:
        """``None``: a mixture's entropy has no closed form."""

    def quantile(self, params: Params, p: Tensor) -> Tensor:
        """Value below which the probability is ``p``."""
        loc = params[0]
        standard: Tensor = torch.special.ndtri(p.to(loc.dtype))
        shape = torch.broadcast_shapes(standard.shape, loc.shape)
        return self.transform(params, standard.expand(shape))

    def distribution(self, params: Params) -> Distribution:
        """A mixture of Normals with batch shape that of ``loc``."""
        loc, scale = (x[..., None] for x in params[:2])
        log_probs, locs, scales = self._standard(params)
        components = torch.distributions.Normal(loc + scale * locs, scale * scales)
        return MixtureSameFamily(Categorical(logits=log_probs), components)

    def fit_weighted(self, u: Tensor, log_weights: Tensor) -> Params:
        """Maximise the weighted likelihood by expectation maximisation, from several starts.

        No component gets narrower than what the effective number of draws can show.
        """
        log_weights = log_weights.double()
        centre, width = centre_and_width(u, log_weights)
        z = (u.double() - centre) / width
        log_probs, means, sds = fit_mixture(z, log_weights, self.num_components)
        probs = log_probs.exp()
        loc = (probs * means).sum(-1)
        scale = (probs * (sds.square() + (means - loc[:, None]).square())).sum(-1).sqrt()
        logits, _ = free_numbers(log_probs, _MAX_LOG)
        log_scales, shift = free_numbers(sds.log(), _MAX_LOG)
        locs = (means - means.mean(-1, keepdim=True)) / shift.exp()
        shape = (logits, locs[:, :-1], log_scales)
        fitted = (centre + width * loc, width * scale, *shape)
        return tuple(x.to(u.dtype) for x in likelier(self, fitted, u.double(), log_weights))

    def _standard(self, params: Params) -> tuple[Tensor, Tensor, Tensor]:
        """Log probabilities, means and sds ``(*batch, K)`` of the mixture with mean 0 and sd 1."""
        _, _, logits, locs, log_scales = params
        log_probs = torch.log_softmax(relative_logs(logits, _MAX_LOG), -1)
        probs = log_probs.exp()
        locs = torch.cat([locs, -locs.sum(-1, keepdim=True)], -1)
        locs = locs - (probs * locs).sum(-1, keepdim=True)
        scales = relative_logs(log_scales, _MAX_LOG).exp()
        sd = (probs * (scales.square() + locs.square())).sum(-1, keepdim=True).sqrt()
        return log_probs, locs / sd, scales / sd
