"""Where the components of a mixture start: at the posterior's modes, and along their widths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_mf._errors import LinearResponseError, ModelError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.prior import Prior
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.kernels import Metric
from pyro_mf.solvers.draws import fixed_draws
from pyro_mf.solvers.fixed_draw_elbo import FixedDrawELBO
from pyro_mf.solvers.linear_response import linear_response
from pyro_mf.solvers.meter import Meter, MeteredELBO
from pyro_mf.solvers.minimise import MAX_DENSE, descend
from pyro_mf.solvers.mixture_elbo import Components
from pyro_mf.solvers.scouts import climb_from_afar

_NUM_SCOUTS, _SCOUTS_EACH = 32, 8  # sent, and for each component besides
_LEAST_CANDIDATES, _CANDIDATES_EACH = 6, 2  # Normals fitted, and for each component
_DRAWS, _CURVATURE_DRAWS = 32, 16
_NARROW = 0.3  # of the first fit's sds: a wide start leaves a narrow mode
_SAME = 1.0  # nats of divergence between two fits up to which they are of one mode
_LEAST_STRETCH = 0.25  # sds over which components of one mode are spread at least
_LEAST_SHARE = 1e-6  # of the weight, for a mode at the start
_NUM_DIRECTIONS = 2  # in which the components of a mode are placed, one after the other
_OVERLAP = 0.8  # of a mode's sds are those of the components that share it


@dataclass(frozen=True, eq=False)
class Mode:
    """A Normal fitted near one mode.

    Args:
        loc: Location, shape ``(D,)``.
        log_scale: Log scales, shape ``(D,)``.
        elbo: Its ELBO in nats.
    """

    loc: Tensor
    log_scale: Tensor
    elbo: float

    @property
    def x(self) -> Tensor:
        """Location and log scale, as :class:`FixedDrawELBO` takes them."""
        return torch.cat([self.loc, self.log_scale])


@dataclass(frozen=True, eq=False)
class Modes:
    """What scouts have found of a posterior.

    Args:
        fits: Normals at different local optima of their ELBO, the highest first.
        scouts: Where the scouts arrived: about where the posterior is, but not in its proportions,
            shape ``(N, D)``.
        no_prior: Why none of them started at draws of the prior, else empty.
    """

    fits: tuple[Mode, ...]
    scouts: Tensor
    no_prior: str


def find_modes(
    blocks: Blocks, first: Mode, num_components: int, *, seed: int, meter: Meter
) -> Modes:
    """Fit Normals at points of the posterior that were reached from far away.

    Args:
        blocks: The log joint.
        first: A fit that is known.
        num_components: Number of components K.
        seed: Seed of everything random.
        meter: Where gradients are counted; one at all scouts at once counts as one.

    Returns:
        What was found.

    Raises:
        BudgetSpentError: If no more gradients may be computed.
    """

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        meter.count(len(z), first.x, math.inf)
        return blocks.value_and_grad(z)

    generator = torch.Generator().manual_seed(seed)
    prior, why = _prior(blocks)
    scale = first.log_scale.exp()
    num = _NUM_SCOUTS + _SCOUTS_EACH * num_components
    climbed = climb_from_afar(
        density, first.loc, Metric(scale), num=num, generator=generator, prior=prior
    )
    arrived = climbed.values >= climbed.lowest
    scouts = climbed.z[arrived]
    elbo = MeteredELBO(blocks, fixed_draws(_DRAWS, blocks.size, seed=seed), meter)
    found = [Mode(first.loc, first.log_scale, elbo.estimate(first.x).elbo)]
    # Those that have not arrived are on their way, perhaps along a narrow ridge.
    others = climbed.z[torch.isfinite(climbed.values) & ~arrived]
    most = max(_LEAST_CANDIDATES, _CANDIDATES_EACH * num_components)
    starts = _far_apart(scouts, first.loc[None], scale, most)
    known = torch.stack([first.loc, *starts])
    starts += _far_apart(others, known, scale, most - len(starts))
    for start in starts:
        x = torch.cat([start, first.log_scale + math.log(_NARROW)])
        if not math.isfinite(elbo.value_and_gradient(x)[0]):
            continue
        x = descend(elbo, x)
        loc, log_scale = x.chunk(2)
        mode = Mode(loc, log_scale, elbo.estimate(x).elbo)
        if all(_divergence(mode, other) > _SAME for other in found):
            found.append(mode)
    found.sort(key=lambda mode: -mode.elbo)
    return Modes(tuple(found), scouts, why)


def place_components(
    blocks: Blocks, modes: Modes, num_components: int, *, seed: int
) -> Iterator[Components]:
    """Places for the components: at every mode, most where they can gain most.

    Several, where a mode gets more than one: along the directions in which it is widest relative
    to its fit, and where the scouts are.

    Args:
        blocks: The log joint.
        modes: What was found; modes beyond K are left out.
        num_components: Number of components K.
        seed: Seed of directions, where none is known.
    """
    fits = modes.fits[:num_components]
    elbos = torch.tensor([m.elbo for m in fits], dtype=torch.float64)
    shares = torch.softmax(elbos, 0).clamp_min(_LEAST_SHARE)
    counts = torch.ones(len(fits), dtype=torch.int64)
    stretches = [fit.loc.new_zeros(1, blocks.size) for fit in fits]
    if num_components > len(fits):
        stretches = [_stretches(blocks, fit, seed) for fit in fits]
        # What a mode can gain: its share, and the nats by which it is wider than its fit.
        widths = torch.stack(
            [
                (s[0] / f.log_scale.exp()).square().sum()
                for s, f in zip(stretches, fits, strict=True)
            ]
        )
        gains = shares * (0.5 * torch.log1p(widths))
        for _ in range(num_components - len(fits)):
            counts[(gains / counts).argmax()] += 1
    for k in range(max(map(len, stretches))):
        locs, log_scales, logits = [], [], []
        for i, mode in enumerate(fits):
            count, direction = int(counts[i]), stretches[i][min(k, len(stretches[i]) - 1)]
            narrower = math.log(_OVERLAP) if count > 1 else 0.0
            for j in range(count):
                step = 2.0 * j / (count - 1) - 1.0 if count > 1 else 0.0
                locs.append(mode.loc + step * direction)
                log_scales.append(mode.log_scale + narrower)
                logits.append(shares[i].log() - math.log(count))
        yield Components(torch.stack(locs, 1), torch.stack(log_scales, 1), torch.stack(logits))
    if num_components > len(fits) and len(modes.scouts) >= _SCOUTS_EACH * num_components:
        equal = modes.scouts.new_zeros(len(modes.scouts))
        fitted = FactorisedMixture(num_components).fit_weighted(modes.scouts, equal)
        yield Components(fitted[0], fitted[1].log(), fitted[2])


def _prior(blocks: Blocks) -> tuple[Prior | None, str]:
    try:
        prior = Prior(blocks.log_joint)
        prior.sample(2, torch.Generator().manual_seed(0))
    except ModelError as error:
        return None, f"modes were not looked for from draws of the prior ({error})"
    return prior, ""


def _far_apart(points: Tensor, known: Tensor, scale: Tensor, num: int) -> list[Tensor]:
    """Points that are far from known ones and from each other, the farthest first."""
    chosen: list[Tensor] = []
    distance = torch.cdist(points / scale, known / scale).amin(1)
    for _ in range(min(num, len(points))):
        chosen.append(points[int(distance.argmax())])
        to_last = ((points - chosen[-1]) / scale).square().sum(1).sqrt()
        distance = torch.minimum(distance, to_last)
    return chosen


def _divergence(one: Mode, other: Mode) -> float:
    """Mean of the two Kullback-Leibler divergences of two fits, in nats."""
    difference = (one.loc - other.loc).square()
    total = torch.zeros_like(difference)
    for a, b in ((one, other), (other, one)):
        ratio = (2.0 * (a.log_scale - b.log_scale)).exp()
        total = total + 0.5 * (ratio + difference * (-2.0 * b.log_scale).exp() - 1.0)
    return 0.5 * float(total.sum())


def _stretches(blocks: Blocks, mode: Mode, seed: int) -> Tensor:
    """Directions in which a mode is wider than its fit, as long as it is wider: ``(n, D)``."""
    generator = torch.Generator().manual_seed(seed)
    scale = mode.log_scale.exp()
    noise = torch.randn(1, len(scale), generator=generator, dtype=torch.float64)
    anywhere = _LEAST_STRETCH * scale * noise
    if len(scale) > MAX_DENSE:
        return anywhere
    elbo = FixedDrawELBO(blocks, fixed_draws(_CURVATURE_DRAWS, len(scale), seed=seed))
    try:
        found = linear_response(mode.loc, elbo.curvature(mode.x).hessian)
    except LinearResponseError:
        return anywhere
    variances, directions = torch.linalg.eigh(found.covariance / (scale[:, None] * scale))
    excess = (variances - 1.0).clamp_min(_LEAST_STRETCH**2).sqrt()
    stretched: Tensor = (excess * scale[:, None] * directions).T.flip(0)
    return stretched[:_NUM_DIRECTIONS]
