r"""A mixture of Student-t's, as a proposal for targets with several modes or with bends.

It is fitted by EM to weighted draws, which minimises the forward KL from what they represent. One
component stays apart: it is as wide as all draws together, has heavy tails and keeps its share, so
that no place that the others leave out gets more weight than that share lets it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_mf.kernels.student_t import StudentT, sobol_nets
from pyro_mf.kernels.weighted import temper, weighted_moments

_DEFENSIVE_SHARE, _DEFENSIVE_DF = 0.1, 3.0
_MAX_COMPONENTS = 20
_DRAWS_PER_COMPONENT = 10  # and dimension
_MAX_DRAWS = 8192  # to which a mixture is fitted
_FIRST_STEPS, _STEPS = 30, 5  # of EM, from nothing and from an earlier fit
_MIN_DRAWS_PER_DIMENSION = 2  # effective ones, below which a component is dropped
_LEAST_SD = 1e-6  # of a component, in that of all
_JITTER = 1e-6  # in correlations
_TINY = 1e-300


class StudentMixture:
    """A mixture of Student-t distributions on vectors.

    Args:
        shares: Weights of the components, positive, that sum to one, shape ``(K,)``.
        components: K of them.

    Example:
        >>> narrow = StudentT(torch.zeros(1).double(), torch.ones(1, 1).double(), 7.0)
        >>> far = StudentT(torch.full((1,), 9.0).double(), torch.ones(1, 1).double(), 7.0)
        >>> mixture = StudentMixture(torch.tensor([0.25, 0.75]).double(), [narrow, far])
        >>> z = mixture.sample(1024, torch.Generator().manual_seed(0))
        >>> round(float((z > 4.5).double().mean()), 2)
        0.75

    References:
        Cappe, Douc, Guillin, Marin and Robert (2008), Adaptive Importance Sampling in General
        Mixture Classes, https://arxiv.org/abs/0710.4242
    """

    def __init__(self, shares: Tensor, components: Sequence[StudentT]) -> None:
        self.shares, self.components = shares, list(components)

    def sample(self, num_draws: int, generator: torch.Generator) -> Tensor:
        """Draws, shape ``(num_draws, D)``, in nets as :class:`StudentT` has them.

        One coordinate of the nets says which component a draw comes from, so that each net has
        nearly the right number of each.
        """
        size = len(self.components[0].loc)
        uniform = sobol_nets(num_draws, size + 2, generator)
        edges = self.shares.cumsum(0)[:-1].to(uniform)
        which = torch.searchsorted(edges, uniform[:, 0].contiguous())
        z = self.components[0].loc.new_empty(num_draws, size)
        for k, component in enumerate(self.components):
            mine = which == k
            z[mine] = component.at(uniform[mine, 1:])
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        """Log density at the rows of ``(S, D)``, shape ``(S,)``."""
        return torch.logsumexp(_joint(self.components, self.shares, z), 0)

    def matched(self, z: Tensor, log_weights: Tensor) -> StudentMixture:
        """The mixture after more steps of EM on weighted draws.

        Args:
            z: Draws, shape ``(S, D)``.
            log_weights: Shape ``(S,)``; flattened where they are worth too few draws.
        """
        power = temper(log_weights, _DRAWS_PER_COMPONENT * z.shape[1])
        weights = torch.softmax(power * log_weights, 0)
        return _fitted(self.components[:-1], self.shares[:-1], z, weights, _STEPS)


def fit_mixture(z: Tensor, log_weights: Tensor, *, generator: torch.Generator) -> StudentMixture:
    """Fit a mixture to weighted draws of a target.

    Args:
        z: Draws, shape ``(S, D)``, such as those of tempered SMC or of chains.
        log_weights: Shape ``(S,)``; zeros for chains.
        generator: Source of the starting clusters.

    Returns:
        At most 21 components: a cluster with few draws is dropped.

    Raises:
        ValueError: If the draws are fewer than twice their dimensions, or lie in a plane.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> z = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
        >>> mixture = fit_mixture(z, torch.zeros(1000).double(), generator=generator)
        >>> bool((mixture.log_prob(z).mean() + 2.84).abs() < 0.1)  # entropy of a Gaussian
        True
    """
    from scipy.cluster.vq import kmeans2  # late, as it takes long to import

    size = z.shape[1]
    spread = torch.linalg.cholesky_ex(torch.cov(z.T).reshape(size, size))[1]
    if len(z) < 2 * size or int(spread):
        raise ValueError(
            f"a mixture needs draws that spread in all {size} dimensions; got {len(z)} with a "
            "covariance that is not positive definite, or fewer than twice the dimensions."
        )
    num_draws = min(_MAX_DRAWS, len(z))
    chosen = _systematic(torch.softmax(log_weights, 0), num_draws, generator)
    z = z[chosen]
    weights = z.new_full((num_draws,), 1.0 / num_draws)
    num = max(1, min(_MAX_COMPONENTS, num_draws // (_DRAWS_PER_COMPONENT * size)))
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    scaled = (z - z.mean(0)) / z.std(0)
    _, labels = kmeans2(scaled.numpy(), num, minit="++", seed=seed)
    labels = torch.as_tensor(labels, dtype=torch.long)
    responsibilities = torch.nn.functional.one_hot(labels, num).T.to(z)
    flat = torch.ones_like(responsibilities)
    start = _updated(z, weights, responsibilities, flat, max(7.0, float(size)))
    return _fitted(*start, z, weights, _FIRST_STEPS)


def _fitted(
    components: Sequence[StudentT], shares: Tensor, z: Tensor, weights: Tensor, steps: int
) -> StudentMixture:
    """Steps of EM, and the component that stays apart."""
    mean, covariance = weighted_moments(z, weights)
    wide = StudentT(mean, torch.linalg.cholesky(covariance), _DEFENSIVE_DF)
    df, size = components[0].degrees_of_freedom, z.shape[1]
    for _ in range(steps):
        distance = torch.stack([c.whiten(z).square().sum(-1) for c in components])
        responsibilities = torch.softmax(_joint(components, shares, z), 0)
        nearness = (df + size) / (df + distance)
        components, shares = _updated(z, weights, responsibilities, nearness, df)
    share = shares.new_tensor([_DEFENSIVE_SHARE])
    return StudentMixture(
        torch.cat([(1.0 - _DEFENSIVE_SHARE) * shares / shares.sum(), share]), [*components, wide]
    )


def _joint(components: Sequence[StudentT], shares: Tensor, z: Tensor) -> Tensor:
    """Log of share times density of each component at each row, shape ``(K, S)``."""
    each = torch.stack([component.log_prob(z) for component in components])
    return shares.log()[:, None] + each


def _systematic(weights: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Indices of draws, each as often as its weight says, shape ``(num,)``."""
    start = torch.rand((), generator=generator, dtype=weights.dtype)
    positions = (torch.arange(num) + start) / num
    return torch.searchsorted(weights.cumsum(0), positions).clamp_max(len(weights) - 1)


def _updated(
    z: Tensor, weights: Tensor, responsibilities: Tensor, nearness: Tensor, df: float
) -> tuple[list[StudentT], Tensor]:
    """Components and shares from who is responsible for which draw.

    A covariance from few draws is drawn towards one with the same sds and the correlations that
    components have in common. Components with too few draws are dropped.
    """
    size = z.shape[1]
    mass = responsibilities * weights
    counts = mass.sum(1).square() / mass.square().sum(1).clamp_min(_TINY)
    kept = (counts > _MIN_DRAWS_PER_DIMENSION * size + 1) & (mass.sum(1) > _TINY)
    if not bool(kept.any()):
        kept[mass.sum(1).argmax()] = True
    mass, nearness, counts = mass[kept], nearness[kept], counts[kept]
    shares = mass.sum(1)
    pull = mass * nearness
    locs = pull @ z / pull.sum(1, keepdim=True)
    centred = z - locs[:, None]
    scatter = torch.einsum("ks,ksi,ksj->kij", pull, centred, centred) / shares[:, None, None]
    sds = scatter.diagonal(dim1=1, dim2=2).sqrt()
    sds = sds.clamp_min(_LEAST_SD * (shares @ sds.square()).sqrt() / shares.sum().sqrt())
    correlations = scatter / (sds[:, :, None] * sds[:, None])
    common = torch.einsum("k,kij->ij", shares / shares.sum(), correlations)
    common = (1.0 - _JITTER) * common + _JITTER * torch.eye(size).to(z)
    own = (counts / (counts + size))[:, None, None]
    scale = sds[:, :, None] * torch.linalg.cholesky(own * correlations + (1.0 - own) * common)
    return [StudentT(*c, df) for c in zip(locs, scale, strict=True)], shares / shares.sum()
