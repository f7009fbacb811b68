"""``FitResult``: a trained guide with everything that is known about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_mf._errors import LinearResponseError
from pyro_mf.convert.guide_draws import GuideDraws, draw_guide
from pyro_mf.density import Layout, LogJoint
from pyro_mf.diagnostics.diagnose import DEFAULT_BUDGET
from pyro_mf.fitting.problem import Problem, at_least
from pyro_mf.fitting.response import Response, elements_of, respond, respond_at
from pyro_mf.fitting.restarts import Optimum
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.solvers.evidence import EvidenceBounds
from pyro_mf.solvers.linear_response import LinearResponse
from pyro_mf.solvers.minimise import MAX_DENSE
from pyro_mf.solvers.outcome import Outcome, StopReason
from pyro_mf.solvers.posterior_draws import PosteriorDraws

if TYPE_CHECKING:
    import pandas as pd

    from pyro_mf.diagnostics.diagnosis import Diagnosis
    from pyro_mf.diagnostics.importance import ImportanceResample


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """What :func:`~pyro_mf.fit` returns; printing it shows the report.

    Args:
        problem: Model, arguments, trained guide and objective.
        solver: Which solver ran: ``"deterministic"``, ``"moment_matching"`` or ``"stochastic"``.
        reason: Why that one.
        seed: Seed of the fit.
        restarts: Where each start ended, in order; one entry without restarts.
        best: Index of the optimum that is the result.
        seconds: Wall time by phase, all starts together.
        notes: Sentences on what went wrong on the way and what was done about it.
        response: Linear response where it is known already; see :meth:`linear_response`.
        verdicts: What :meth:`diagnose` has found so far, by what was judged.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_mf.fitting import fit
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> result = fit(model, (torch.tensor([1.0, 2.0, 3.0]),))
        >>> result.converged, round(result.guide.median()["loc"].item(), 3)
        (True, 1.5)
    """

    problem: Problem
    solver: str
    reason: str
    seed: int
    restarts: tuple[Optimum, ...]
    best: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    response: Response | None = None
    verdicts: dict[str, Diagnosis] = field(default_factory=dict)

    # -- what was reached ------------------------------------------------------------------------

    @property
    def guide(self) -> Any:
        """The trained guide; it works with everything of Pyro's that takes a guide."""
        return self.problem.guide

    @property
    def outcome(self) -> Outcome:
        """What the solver reported of the best start."""
        return self.restarts[self.best].outcome

    @property
    def elbo(self) -> float:
        """ELBO of the guide in nats, at fresh draws."""
        return self.outcome.elbo

    @property
    def elbo_se(self) -> float:
        """Standard error of :attr:`elbo` in nats."""
        return self.outcome.elbo_se

    @property
    def eubo(self) -> float:
        """Evidence upper bound of the guide in nats; NaN unless fitted by moment matching.

        ``eubo - elbo`` is KL(q || p) + KL(p || q).
        """
        return math.nan if self.outcome.forward is None else self.outcome.forward.eubo

    @property
    def eubo_se(self) -> float:
        """Standard error of :attr:`eubo` in nats."""
        return math.nan if self.outcome.forward is None else self.outcome.forward.eubo_se

    @property
    def evidence(self) -> EvidenceBounds:
        """Between which two numbers the log evidence lies, in nats, each with its error.

        From below by an ELBO; from above by an EUBO, which needs draws of the posterior and is
        infinite without: only moment matching has them.
        """
        if self.outcome.forward is not None:
            return self.outcome.forward.bounds
        return EvidenceBounds(self.elbo, self.elbo_se, math.inf, math.nan)

    @property
    def draws(self) -> PosteriorDraws | None:
        """Draws of the posterior that moment matching fitted the factors to, else ``None``."""
        return None if self.outcome.forward is None else self.outcome.forward.draws

    @property
    def losses(self) -> tuple[float, ...]:
        """The objective in nats after each iteration of the best start; none of moment matching.

        That is the negative ELBO for the reverse KL, the cross-entropy for the forward KL.
        """
        return self.outcome.losses

    @property
    def stop_reason(self) -> StopReason:
        """``"converged"``, ``"budget"``, ``"interrupted"`` or ``"diverged"``."""
        return self.outcome.stop_reason

    @property
    def converged(self) -> bool:
        """Whether the solver stopped because it was done."""
        return self.outcome.converged

    @property
    def message(self) -> str:
        """Why the solver stopped, with the numbers."""
        return self.outcome.message

    @property
    def num_gradients(self) -> int:
        """Gradient evaluations of all starts together."""
        return sum(optimum.outcome.num_gradients for optimum in self.restarts)

    @property
    def layout(self) -> Layout:
        """Where each latent site lives in the flat vector, plates at full size."""
        return self.guide.layout if isinstance(self.guide, FlatGuide) else self.log_joint.layout

    @property
    def log_joint(self) -> LogJoint:
        """The model with its full data as a density.

        Raises:
            ModelError: If the model subsamples its data.
        """
        return self.problem.log_joint

    # -- using it --------------------------------------------------------------------------------

    def linear_response(self, sites: Sequence[str] | None = None) -> LinearResponse:
        """Location and covariance of the unconstrained latents, corrected for mean field.

        The deterministic solver leaves it behind for up to 400 latents; after another solver it is
        computed at the first call, from about ``128 * D`` gradients of the log joint.

        Args:
            sites: Latent sites whose elements are wanted, in this order; all by default. With more
                than 400 latents they have to be named, and each element takes tens to hundreds of
                gradients of the ELBO.

        Returns:
            The response; element k of its vectors is that of the sites' elements one after another.

        Raises:
            LinearResponseError: If there is none at this optimum; the message says why.
            ValueError: If a site is not a latent.
        """
        if sites is not None and self.layout.size > MAX_DENSE:
            return respond_at(self.problem, sites, seed=self.seed)
        response = self.known_response()
        if response.found is None:
            raise LinearResponseError(response.refusal)
        if sites is None:
            return response.found
        return response.found.at(elements_of(self.layout, sites))

    def known_response(self) -> Response:
        """The linear response with its ELBO, or why there is none; computed at the first call."""
        if self.response is None:
            found = respond(self.problem, self.outcome, seed=self.seed)
            object.__setattr__(self, "response", found)  # a cache, not a change
            return found
        return self.response

    def posterior_draws(self) -> PosteriorDraws:
        """:attr:`draws`, where there are any.

        Raises:
            ValueError: If there are none.
        """
        if self.draws is None:
            raise ValueError(
                f"this fit has no draws of the posterior: it is by the {self.solver} solver. Only "
                "moment matching makes them, as in fit(..., objective=ForwardKL())."
            )
        return self.draws

    def linear_response_guide(self) -> Any:
        """A Pyro guide whose uncertainty is that of linear response.

        Returns:
            An :class:`~pyro.infer.autoguide.AutoMultivariateNormal` with location and covariance of
            :meth:`linear_response`, for ``Predictive``, ``from_pyro_svi`` and everything else.

        Raises:
            LinearResponseError: If there is none at this optimum; the message says why.
        """
        from pyro_mf.fitting.full_rank import full_rank_guide

        response = self.linear_response()
        return full_rank_guide(self.problem, response)

    def summary(self, *, deterministic: bool = False) -> pd.DataFrame:
        """Mean, sd and quantiles of every scalar element, in the model's own space.

        Args:
            deterministic: Whether to add ``pyro.deterministic`` sites, from 4000 draws run through
                the model.

        Returns:
            One row per element, named as ``theta[0]``, with columns ``mean``, ``sd``, ``5%``,
            ``50%`` and ``95%`` of the mean-field posterior, and ``mean_lr`` and ``sd_lr`` with the
            covariance from linear response. These two are NaN where there is none, and
            ``.attrs["linear_response"]`` says why; ``.attrs["believe"]`` is the sd to believe,
            ``"sd"`` or ``"sd_lr"``, that of the Gaussian with the higher ELBO. A fit by moment
            matching has ``mean_draws`` and ``sd_draws`` in place of these two, those of the draws
            of the posterior themselves: what Normal factors on an unconstrained axis cannot be.
            Elements of discrete sites that have factors have the probabilities of their values, in
            columns ``P(0)``, ``P(1)``, and so on, and NaN in all others.
        """
        from pyro_mf.fitting.summary import summarise

        return summarise(self, deterministic=deterministic)

    def sample(
        self,
        num_draws: int,
        *,
        linear_response: bool = False,
        draws: bool = False,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Draw from the fitted posterior, in the model's own space and on full plates.

        Args:
            num_draws: Number of draws S, at least 1.
            linear_response: Whether to draw from the Gaussian of :meth:`linear_response`, with
                correlations, in place of the mean-field posterior.
            draws: Whether to take some of :attr:`draws`, by weight and with replacement.
            seed: Seed of the draws.

        Returns:
            For every latent site a tensor ``(S, *shape)``, as ``Predictive`` takes; discrete sites
            that have factors are drawn from these.

        Raises:
            LinearResponseError: If linear response is asked for and there is none.
            ValueError: If draws of the posterior are asked for and there are none, or both are.
        """
        z = self.sample_unconstrained(
            num_draws, linear_response=linear_response, draws=draws, seed=seed
        )
        values = self.layout.constrain(z)
        if draws or not getattr(self.guide, "discrete_sites", ()):
            return values
        return values | self._draw(num_draws, seed).discrete

    def sample_unconstrained(
        self,
        num_draws: int,
        *,
        linear_response: bool = False,
        draws: bool = False,
        seed: int = 0,
    ) -> Tensor:
        """Draw flat unconstrained vectors, shape ``(S, D)``; see :meth:`sample`.

        Raises:
            LinearResponseError: As there.
            ValueError: As there.
        """
        at_least("num_draws", num_draws, 1)
        if linear_response and draws:
            raise ValueError("linear_response and draws exclude each other. Choose one.")
        if linear_response or draws:
            source = self.linear_response() if linear_response else self.posterior_draws()
            z = source.sample(num_draws, seed=seed)
            return z.to(dtype=self.log_joint.dtype, device=self.log_joint.device)
        return self._draw(num_draws, seed).z

    def _draw(self, num_draws: int, seed: int) -> GuideDraws:
        args, kwargs = self.problem.model_args, self.problem.model_kwargs
        return draw_guide(self.guide, args, kwargs, self.layout, num_draws, seed)

    def importance_resample(
        self,
        num_draws: int = 1000,
        *,
        linear_response: bool = False,
        num_proposals: int | None = None,
        seed: int = 0,
    ) -> ImportanceResample:
        """Draws of the posterior: those of the fit, resampled by Pareto-smoothed weights.

        Args:
            num_draws: Number of draws, at least 1.
            linear_response: Whether to weight draws of the Gaussian of :meth:`linear_response`,
                which is much nearer to the posterior than the mean field wherever latents depend on
                one another.
            num_proposals: Number of draws that are weighted, at least 25; by default ten per draw
                and at least 4000.
            seed: Seed of everything random.

        Returns:
            The draws by site in ``samples``, k-hat with its error and threshold, the effective
            sample size, and ``to_arviz()``.

        Raises:
            LinearResponseError: If linear response is asked for and there is none.
            ModelError: If the model subsamples its data in a way that cannot be undone.
            ValueError: If a number is too small, or there are no weights.

        Warns:
            KhatWarning: If k-hat is above its threshold: these are then not draws of the posterior.
        """
        from pyro_mf.fitting.verdicts import importance_resample_result

        return importance_resample_result(
            self,
            num_draws,
            linear_response=linear_response,
            num_proposals=num_proposals,
            seed=seed,
        )

    def diagnose(
        self,
        *,
        linear_response: bool = False,
        draws: bool = False,
        seed: int = 0,
        max_gradients: int = DEFAULT_BUDGET,
        progress: bool | None = None,
    ) -> Diagnosis:
        """Judge the fit by draws of the posterior that are made anew, with checks of their own.

        They come from importance sampling, parallel Hamiltonian chains started at the fit's own
        draws and at points reached from elsewhere, or tempering, whichever passes its checks, as
        for the forward KL. Every scalar element of every latent and deterministic site is held to
        them. Where no draws pass, the verdict is amber at best, and what is merely suspicious
        counts: chains that drift away from the fit's draws, a solver that did not converge, starts
        that disagree.

        Args:
            linear_response: Whether to judge the Gaussian of :meth:`linear_response`, as in
                :meth:`sample`.
            draws: Whether to judge :attr:`draws`.
            seed: Seed of everything random. Another claim with the same seed is judged by the same
                draws, if they passed their checks; another seed is a second opinion.
            max_gradients: Budget, in gradients of the log joint at 64 points each; at least 1.
            progress: As for :func:`~pyro_mf.fit`.

        Returns:
            The verdict. It is about marginals: functions of several parameters are right only if
            they are deterministic sites, or if the k-hat of the joint is good, too.

        Raises:
            LinearResponseError: If linear response is asked for and there is none.
            ModelError: If the model subsamples its data in a way that cannot be undone.
            ValueError: If draws of the posterior are asked for and there are none, or both are.

        References:
            Wang, Kasprzak and Huggins (2023), A Targeted Accuracy Diagnostic for Variational
            Approximations, https://arxiv.org/abs/2302.12419
        """
        from pyro_mf.fitting.verdicts import diagnose_result

        found = diagnose_result(
            self,
            linear_response=linear_response,
            draws=draws,
            seed=seed,
            max_gradients=max_gradients,
            progress=progress,
        )
        self.verdicts[found.claim] = found
        return found

    def to_arviz(self, *, linear_response: bool = False, draws: bool = False, **kwargs: Any) -> Any:
        """Convert for ArviZ.

        A fit with restarts becomes one chain per start, each drawn from the optimum that it ended
        at, so that R-hat shows whether they agree. With ``num_chains`` or ``like`` all chains are
        drawn from the best.

        Args:
            linear_response: Whether to draw from the Gaussian of :meth:`linear_response`.
            draws: Whether to take :attr:`draws`: chains as they are, weighted draws resampled.
            **kwargs: As for :func:`pyro_mf.from_pyro_svi`, or with ``draws`` as for
                :func:`pyro_mf.from_pyro`.

        Returns:
            An ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (ArviZ 1.x).

        Raises:
            LinearResponseError: If linear response is asked for and there is none.
            ValueError: If draws of the posterior are asked for and there are none.
        """
        from pyro_mf.fitting.chains import convert_draws, convert_result

        if draws:
            return convert_draws(self, **kwargs)
        return convert_result(self, linear_response=linear_response, **kwargs)

    def resume(
        self,
        *,
        tolerance: float = 0.1,
        max_gradients: int | None = None,
        progress: bool | None = None,
    ) -> FitResult:
        """Go on where the stochastic solver stopped, as if it had not.

        The guide is trained further, so that of this result is, too.

        Args:
            tolerance: As for :func:`~pyro_mf.fit`.
            max_gradients: Budget in gradient evaluations from here; by default the solver's own.
            progress: As for :func:`~pyro_mf.fit`.

        Raises:
            TypeError: If a number is of the wrong kind.
            ValueError: If the solver was another one, or a number is not positive.
        """
        from pyro_mf.fitting.fit import resume

        return resume(self, tolerance=tolerance, max_gradients=max_gradients, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write the fit to one file, whole or not at all.

        The file holds tensors, numbers and strings, so ``torch.load(path, weights_only=True)``
        reads it. It holds neither model nor data.

        Args:
            path: The file; one that exists is replaced.

        Raises:
            TypeError: If the guide is a function, whose parameters are in Pyro's store.
        """
        from pyro_mf.fitting.archive import save_result

        save_result(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Any,
        model_args: tuple[Any, ...] = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        guide: Any | None = None,
    ) -> FitResult:
        """Read a fit back.

        Args:
            path: A file that :meth:`save` wrote. Nothing in it is run.
            model: The model of the fit.
            model_args: Its positional arguments.
            model_kwargs: Its keyword arguments.
            guide: A new guide to load into; needed only where ``fit`` was given one that is not an
                ``AutoMeanField``.

        Returns:
            The result. Learnable parameters of the model get their fitted values.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If the file is cut short, none of ours, of a newer version, or of a fit
                of another model.
        """
        from pyro_mf.fitting.archive import load_result

        return load_result(Path(path), model, model_args, model_kwargs, guide)

    def __repr__(self) -> str:
        from pyro_mf.fitting.report import one_line

        return one_line(self)

    def __str__(self) -> str:
        from pyro_mf.fitting.report import report

        return report(self)
