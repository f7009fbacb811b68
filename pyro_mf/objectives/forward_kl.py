"""``ForwardKL``: the cross-entropy of posterior and guide as an objective of stock ``SVI``."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_mf._errors import CheckpointError, DifferentDataWarning, EstimatorWarning
from pyro_mf.density.capture import Backend, check_backend
from pyro_mf.density.recorder import map_tensors
from pyro_mf.objectives.forward_choice import choose
from pyro_mf.objectives.forward_estimators import seeded
from pyro_mf.objectives.forward_pair import Arguments, FlatPair, Pair, TracedPair
from pyro_mf.objectives.forward_prior import Simulation
from pyro_mf.objectives.forward_report import ForwardDiagnostics
from pyro_mf.objectives.forward_traced import TracedImportance
from pyro_mf.objectives.gradients import backward_if_finite, outside_inference_mode

Fn = Callable[..., Any]

NAMES = ("hmc", "imh", "msc", "snis", "smc", "prior")

# Chains are kept for this many combinations of model, guide and data.
_MAX_PAIRS = 8
_CHANGES = 3  # sets of data from which on somebody is warned


class ForwardKL(ELBO):
    r"""Forward (inclusive) divergence KL(p || q), through the cross-entropy.

    Minimises :math:`-\mathbb{E}_{p(z \mid x)}[\log q(z)]` in nats on the unconstrained space, which
    is the divergence plus the entropy of the posterior there, a constant. The draws :math:`z` carry
    no gradient; it goes through log q alone. Learnable parameters of the model get the gradient of
    maximum likelihood over the same draws (wake-theta), of which the loss's value has no part.

    The guide has to score values that it did not draw: :class:`~pyro_mf.AutoMeanField` does, and
    guides written by hand; Pyro's own autoguides do not. Chains belong to a model, a guide and the
    numbers in the arguments, and are part of :meth:`state_dict`.

    Args:
        num_particles: Draws N per step, chains where there are chains; at least 2. For ``SVI``:
            where :func:`~pyro_mf.fit` makes all draws before it fits, it takes as many as it needs.
        estimator: Where the draws come from: ``"hmc"``, ``"imh"``, ``"msc"``, ``"snis"``,
            ``"smc"`` or ``"prior"``; ``None`` chooses by model.
        defensive: For ``"imh"``, ``"msc"`` and ``"snis"``, the share of proposals that come from
            Student-t factors three times as wide as q, from 0 to below 1.
        backend: ``"auto"``, ``"graph"``, ``"compile"`` or ``"eager"`` for the log joint.
        vectorize_particles: Accepted for code that was written for Pyro's objectives.
        max_plate_nesting: As in :class:`pyro.infer.ELBO`.

    Attributes:
        estimator: The estimator asked for; ``diagnostics.estimator`` is the one in use.

    Raises:
        TypeError: If ``num_particles`` is no integer, or ``defensive`` no number.
        ValueError: If an argument is out of range or unknown.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_mf import AutoMeanField
        >>> covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> def model():
        ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))
        >>> guide, optim = AutoMeanField(model, init_scale=1.0), pyro.optim.Adam({"lr": 0.02})
        >>> svi = pyro.infer.SVI(model, guide, optim, loss=ForwardKL(num_particles=64))
        >>> losses = [svi.step() for _ in range(100)]
        >>> bool((guide.scale - 1.0).abs().max() < 0.2)  # reverse KL ends at 0.44
        True

    References:
        Naesseth, Lindsten and Blei (2020), Markovian Score Climbing,
        https://arxiv.org/abs/2003.10374
        Kim, Oh, Gardner, Dieng and Kim (2022), Markov Chain Score Ascent,
        https://arxiv.org/abs/2206.06295
        Bornschein and Bengio (2015), Reweighted Wake-Sleep, https://arxiv.org/abs/1406.2751
    """

    def __init__(
        self,
        num_particles: int = 32,
        *,
        estimator: str | None = None,
        defensive: float = 0.0,
        backend: Backend = "auto",
        vectorize_particles: bool = True,
        max_plate_nesting: float = float("inf"),
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int):
            raise TypeError(f"num_particles must be an integer; got {num_particles!r}.")
        if num_particles < 2:
            raise ValueError(f"num_particles must be at least 2; got {num_particles}.")
        if isinstance(defensive, bool) or not isinstance(defensive, int | float):
            raise TypeError(f"defensive must be a number; got {defensive!r}.")
        if not 0.0 <= defensive < 1.0:
            raise ValueError(f"defensive must be a share from 0 to below 1; got {defensive!r}.")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=num_particles, max_plate_nesting=max_plate_nesting
        )
        self.estimator = _check_name(estimator)
        self.defensive = defensive
        self.backend = check_backend(backend)
        self._pairs: list[Pair] = []
        self._saved: list[dict[str, Any]] = []
        self._generator: torch.Generator | None = None
        self._num_calls = 0
        self._num_restarts = 0

    @property
    def diagnostics(self) -> ForwardDiagnostics | None:
        """How the last step's draws were made and how good they are; ``None`` before the first."""
        return self._pairs[-1].diagnostics() if self._pairs else None

    @property
    def fault(self) -> str | None:
        """What is wrong with the last step's draws, in words; ``None`` where nothing is known."""
        return self._pairs[-1].fault() if self._pairs else None

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the cross-entropy in nats, without gradients; chains stay where they are."""
        pair = self._pair(model, guide, (args, kwargs))
        with torch.no_grad():
            return float(pair.loss((args, kwargs), is_step=False))

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Estimate the cross-entropy in nats and add its gradients to the parameters'.

        Raises:
            NonFiniteError: If loss or gradient is not finite. No gradient is stored then, so the
                parameters keep their values.
        """
        total = self.differentiable_loss(model, guide, *args, **kwargs)
        if total.requires_grad:
            backward_if_finite(total)
        return float(total.detach())

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Estimate the cross-entropy in nats as a tensor that can be differentiated once."""
        return self._pair(model, guide, (args, kwargs)).loss((args, kwargs), is_step=True)

    def state_dict(self) -> dict[str, Any]:
        """Chains and random numbers, from which training goes on as if it had not stopped.

        Returns:
            Tensors and numbers, which ``torch.load(weights_only=True)`` reads.
        """
        states = [state for pair in self._pairs if (state := pair.state_dict()) is not None]
        return {
            "version": 1,
            "num_particles": self.num_particles,
            "generator": None if self._generator is None else self._generator.get_state(),
            "chains": [*self._saved, *states],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Chains are used again by the first call with a model of the same latents and the same data.

        Raises:
            CheckpointError: If the state is not one of these, or of another number of particles.
        """
        expected = {"version", "num_particles", "generator", "chains"}
        if not isinstance(state, Mapping) or expected - set(state) or state["version"] != 1:
            raise CheckpointError(
                "expected what ForwardKL.state_dict() returned; got "
                f"{list(state) if isinstance(state, Mapping) else type(state).__name__}."
            )
        if state["num_particles"] != self.num_particles:
            raise CheckpointError(
                f"the saved chains are {state['num_particles']} at a time, this objective has "
                f"num_particles={self.num_particles}. Make it with the same number."
            )
        chains, generator = state["chains"], state["generator"]
        parts = {"estimator", "key", "num_steps", "state"}
        if (
            not isinstance(chains, list)
            or not all(isinstance(c, Mapping) and parts <= set(c) for c in chains)
            or not (generator is None or isinstance(generator, Tensor))
        ):
            raise CheckpointError(
                "the state lacks a part of what ForwardKL.state_dict() returned, or has something "
                "else in its place. Save it again."
            )
        self._pairs = []
        self._saved = list(chains)
        self._generator = None
        if state["generator"] is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        # Graphs are cheap to make again and cannot travel; chains can.
        return self.__dict__ | {"_pairs": [], "_generator": None, "_saved": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.load_state_dict(state["_saved"])

    def _pair(self, model: Fn, guide: Fn, arguments: Arguments) -> Pair:
        self._num_calls += 1
        for pair in self._pairs:
            if pair.matches(model, guide, arguments):
                if pair is not self._pairs[-1]:
                    self._pairs.remove(pair)
                    self._pairs.append(pair)
                return pair
        # Graphs are captured with gradients, which tensors made in inference mode refuse.
        with torch.inference_mode(mode=False), torch.enable_grad():
            pair = self._new_pair(model, guide, map_tensors(arguments, outside_inference_mode))
        self._pairs = [*self._pairs[1 - _MAX_PAIRS :], pair]
        return pair

    def _new_pair(self, model: Fn, guide: Fn, arguments: Arguments) -> Pair:
        generator = self._own_generator()
        before = generator.get_state()
        with seeded(generator):
            choice = choose(self.estimator, model, guide, *arguments, self.backend)
        count = self.num_particles
        if choice.name == "prior":
            return TracedPair(Simulation(model, guide, count, generator), choice)
        if choice.log_joint is None:
            return TracedPair(TracedImportance(model, guide, count, generator), choice)
        self._num_restarts += 1
        self._warn_of_changing_data()
        pair = FlatPair(
            model,
            guide,
            choice,
            choice.log_joint,
            num_particles=count,
            defensive=self.defensive,
            generator=generator,
        )
        for state in self._saved:
            if state["estimator"] == choice.name and state["key"] == pair.key:
                self._saved.remove(state)
                if _has_been_loaded(pair, state):
                    generator.set_state(before)  # the start of new chains was for nothing
                else:
                    warnings.warn(
                        "the saved chains are those of another density than this model's with "
                        "these data, so new ones are started.",
                        DifferentDataWarning,
                        stacklevel=2,
                    )
                break
        return pair

    def _warn_of_changing_data(self) -> None:
        if self._num_restarts == _CHANGES and self._num_restarts > self._num_calls / 2:
            warnings.warn(
                f"the data changed at {self._num_restarts} of {self._num_calls} steps. Each set of "
                "data has a posterior and chains of its own, and the guide is fitted to all in "
                "turn: with minibatches to something wider than the posterior of all data. Give "
                "all data at once; or use estimator='prior' for an amortised guide.",
                EstimatorWarning,
                stacklevel=2,
            )

    def _own_generator(self) -> torch.Generator:
        """Randomness of its own, seeded once by torch's global generator."""
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        return self._generator

    def _get_trace(self, model: Fn, guide: Fn, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            "ForwardKL does not hand out traces; use loss, loss_and_grads or differentiable_loss."
        )


def _has_been_loaded(pair: FlatPair, state: Mapping[str, Any]) -> bool:
    """Load saved chains, unless they are those of another density.

    Raises:
        CheckpointError: If they are no chains.
    """
    try:
        if not pair.is_same_density(state):
            return False
        pair.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the saved chains lack a part, or have something else in its place ({error}). Save "
            "them again."
        ) from error
    return True


def _check_name(estimator: str | None) -> str | None:
    if estimator is None or estimator in NAMES:
        return estimator
    near = difflib.get_close_matches(str(estimator), NAMES, n=1, cutoff=0.3)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"estimator must be None or one of {', '.join(NAMES)}; got {estimator!r}.{hint}"
    )
