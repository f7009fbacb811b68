"""What a verdict says beyond marginals: weights of the joint, the evidence, symmetry."""

from __future__ import annotations

import math

from torch import Tensor

from pyro_mf._errors import NonFiniteError
from pyro_mf.density.blocks import Blocks
from pyro_mf.density.sites import Layout
from pyro_mf.diagnostics.check import Check
from pyro_mf.diagnostics.claim import Claim
from pyro_mf.diagnostics.evidence import EvidenceBracket, evidence_bracket
from pyro_mf.diagnostics.khat import site_khats
from pyro_mf.diagnostics.symmetry import asymmetry
from pyro_mf.solvers.posterior_draws import PosteriorDraws

_NUM_DRAWS, _NUM_COSTLY = 4096, 512
_NUM_MIRRORED, _NUM_COSTLY_MIRRORED = 512, 64
_NUM_MARGINAL = 4000  # draws by which k-hats of marginals are estimated
_MAX_LATENTS = 200  # of them; each takes 30 ms
_MAX_GAP = 0.5  # nats of KL(q|p) + KL(p|q) up to which a joint is as good as the posterior's
_ASYMMETRIC = 0.2  # of the index, from which on means may move


def judge_joint(
    claim: Claim, blocks: Blocks, z: Tensor, draws: PosteriorDraws | None, *, seed: int
) -> tuple[Check, ...]:
    """Checks of the joint; none of them decides, for marginals may be right where the joint is not.

    Args:
        claim: What is judged.
        blocks: The log joint.
        z: Draws of the claim, shape ``(S, D)``.
        draws: Draws of the posterior, where there are any.
        seed: Seed of more draws.
    """
    return (*_by_weights(claim, blocks, draws, seed), *_by_symmetry(blocks, z))


def marginal_khats(
    claim: Claim, layout: Layout, z: Tensor, draws: PosteriorDraws
) -> dict[str, float]:
    """k-hat of every element of the sites whose elements are mapped one by one, by its name."""
    if layout.size > _MAX_LATENTS:
        return {}
    try:
        found = site_khats(
            layout,
            z[:_NUM_MARGINAL],
            draws.z,
            log_weights=draws.log_weights,
            log_q=claim.elementwise,
            reference_ess=draws.diagnostics.get("ess"),
        )
    except ValueError:  # too few draws of the posterior, or a point in place of a density
        return {}
    names = layout.element_names()
    return {
        names[k]: float(found.khat[k])
        for site in layout.sites
        if site.is_elementwise
        for k in range(site.start, site.stop)
    }


def _by_weights(
    claim: Claim, blocks: Blocks, draws: PosteriorDraws | None, seed: int
) -> list[Check]:
    if claim.proposal is None:
        return []
    known = draws if claim.proposal.log_prob is not None else None
    num = _NUM_COSTLY if blocks.is_costly else _NUM_DRAWS
    try:
        found = evidence_bracket(blocks.log_joint, claim.proposal, known, num_draws=num, seed=seed)
    except (ValueError, NonFiniteError) as error:
        return [Check("joint", None, f"there are no importance weights: {error}")]
    return [_joint(found), _evidence(found)]


def _joint(found: EvidenceBracket) -> Check:
    values = {"khat": found.khat, "khat_se": found.khat_se, "threshold": found.threshold}
    text = f"k-hat {found.khat:.2f} ± {found.khat_se:.2f}, good up to {found.threshold:.2f}"
    gap = found.gap
    if gap.elbo + 2.0 * gap.se <= _MAX_GAP:
        finding = f"the posterior's but for {max(gap.elbo, 0.0):.2g} nats ({text})"
        return Check("joint", None, finding, "", values)
    can_be_mended = found.khat <= found.threshold
    text += ": weights can mend it" if can_be_mended else ": weights cannot mend it"
    advice = "for functions of several parameters, such as predictions and differences, draw by "
    advice += "importance_resample(), " if can_be_mended else ""
    advice += "linear_response=True or draws=True, or make them deterministic sites to be judged"
    return Check("joint", None, text, advice, values)


def _evidence(found: EvidenceBracket) -> Check:
    text = f"ELBO {found.elbo:.2f} ± {found.elbo_se:.2g}"
    if found.multi_draw:
        most = max(found.multi_draw)
        best = found.multi_draw[most]
        text += f", {best.elbo:.2f} ± {best.se:.2g} by {most} draws at a time"
    values = {"elbo": found.elbo, "eubo": found.eubo, "log_evidence": found.log_evidence}
    if math.isfinite(found.eubo):
        text += f", EUBO {found.eubo:.2f} ± {found.eubo_se:.2g}: the log evidence is between them"
        gap = found.gap
        text += f", KL(q|p) + KL(p|q) is {gap.elbo:.2f} ± {gap.se:.2g} nats"
    if found.contradicts_itself:
        advice = "the draws of the posterior contradict the fit: give more max_gradients"
        return Check("evidence", "amber", text + ", which cannot be negative", advice, values)
    return Check("evidence", None, text, "", values)


def _by_symmetry(blocks: Blocks, z: Tensor) -> list[Check]:
    num = _NUM_COSTLY_MIRRORED if blocks.is_costly else _NUM_MIRRORED
    try:
        found = asymmetry(blocks.log_joint, z[:num], z.mean(0))
    except ValueError:
        return []
    text = f"{found.index:.2f} of the log density's spread is odd about the approximation's centre"
    if found.index > _ASYMMETRIC:
        site = max(found.sites, key=lambda name: found.sites[name])
        text += f", most by '{site}': means can be wrong"
    else:
        text += ": means can be right however wrong sds are"
    return [Check("symmetry", None, text, "", {"index": found.index, "nats": found.nats})]
