"""``AutoMeanField``: one independent factor per element of every continuous latent site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_mf._errors import GuideMismatchError
from pyro_mf.density.sites import Plate, Site
from pyro_mf.families import Family
from pyro_mf.families.product import Product
from pyro_mf.families.protocol import spans_site
from pyro_mf.guides.discrete_guide import DiscreteGuide
from pyro_mf.guides.factors import as_pyro, factor_of
from pyro_mf.guides.plates import as_plates
from pyro_mf.guides.prototype import (
    InitFn,
    Model,
    call_key,
    init_to_origin,
    model_indices,
    read_call,
)
from pyro_mf.guides.site_families import FamilySpec, cut

_QUANTILE_DRAWS = 10_000  # where elements have no quantiles of their own


class AutoMeanField(DiscreteGuide):
    r"""Mean-field guide: :math:`q(z) = \prod_d q_d(z_d)` on the unconstrained space.

    Each latent site is sampled once, under its own name, from a distribution that can score any
    value: a factor on a real support, else a factor pushed through the support's bijection. There
    is no auxiliary site and no Delta, so every objective of Pyro's is right with it, those that
    score values the guide did not draw included.

    Latents that Pyro can enumerate are left out of the guide, for the objective to sum out (with
    stock objectives: ``TraceEnum_ELBO`` on ``config_enumerate(model)``). Those for which a discrete
    family is named, as in ``family={"k": "categorical"}``, have factors: ``guide.probs("k")``.

    Parameters are flat, one tensor of shape ``(D,)`` per parameter of the family (``guide.loc``,
    ``guide.scale``); ``guide.locs.theta`` and ``guide.scales.theta`` read and write one site's
    part. Sites in subsampled plates have parameters for the full plate, and each call uses those
    of the elements that the model visits.

    Args:
        model: A Pyro model.
        family: The factors' family: a name, or an object with the methods of
            :class:`~pyro_mf.families.Family`; a dict of them by site (sites that it leaves out are
            ``"auto"``), discrete sites included; a function of the
            :class:`~pyro_mf.density.sites.Site`; or ``"auto"``.
        init_loc_fn: Per-site initial value in the model's space, as in Pyro's autoguides; the
            default is zero on the unconstrained axis and samples nothing.
        init_scale: Initial standard deviation on the unconstrained axis, positive.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`: makes the plates that are
            subsampled by the guide instead of by the model.

    Raises:
        TypeError: If ``model`` or ``init_loc_fn`` cannot be called or ``init_scale`` is no number.
        ValueError: If ``init_scale`` is not positive or the family is unknown.
        FamilyError: At setup, if a family does not fit its site.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> guide = AutoMeanField(model).setup(torch.tensor([1.0, 3.0]))
        >>> guide.median()
        {'rate': tensor(1.)}

    References:
        Kucukelbir et al. (2017), Automatic Differentiation Variational Inference,
        https://arxiv.org/abs/1603.00788
    """

    def __init__(
        self,
        model: Model,
        family: FamilySpec = "normal",
        *,
        init_loc_fn: InitFn = init_to_origin,
        init_scale: float | Tensor = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            family,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            create_plates=create_plates,
        )
        self._calls: set[Any] = set()

    # -- running as a Pyro guide ---------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, with the arguments of the model.

        Args:
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.

        Returns:
            Values by site name, in the model's space.
        """
        self.setup(*args, **kwargs)
        self._check_call(args, kwargs)
        params = self.flat_params() if self.layout.sites else ()
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for site in self.layout.sites:
            with _inside(site.plates, plates):
                result[site.name] = pyro.sample(site.name, self._factor(site, params, plates))
        for own in self.discrete_sites:
            factor = self._discrete_factor(own, plates)
            with _inside(own.plates, plates):
                result[own.name] = pyro.sample(own.name, factor, infer={"enumerate": "parallel"})
        return result

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for site in self.layout.sites:
            if any(plate.name in self._minibatch.followed for plate in site.plates):
                _check_divisible(self.families[site.name], site)
        self._calls.add(call_key(args, kwargs))

    def _factor(self, site: Site, params: tuple[Tensor, ...], plates: Mapping[str, Any]) -> Any:
        family, own = cut(self.family, params, site)
        if not self._minibatch.visits_all(site, plates):
            _check_divisible(family, site)
            own = tuple(self._minibatch.take(value, site, plates) for value in own)
        return factor_of(family, own, site, self._minibatch.shape_of(site, plates))

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        def ask_model(names: frozenset[str]) -> dict[str, Tensor]:
            if self._model is None and not names & self._minibatch.given:
                return {}  # unpickled, without a model: draw a minibatch, as stock guides do
            return model_indices(self._whole_model(), self.layout, args, kwargs, names)

        if self.master is not None:
            self.plates = super()._create_plates(*args, **kwargs)  # type: ignore[no-untyped-call]
            self._minibatch.check_followed(self.plates, ask_model)
        else:
            created = as_plates(self.create_plates(*args, **kwargs)) if self.create_plates else {}
            self.plates = self._minibatch.create(created, self._prototype_frames, ask_model)
            # Predictive masks out all densities; nothing else runs a guide that way.
            if poutine.get_mask() is False:
                self._minibatch.warn_of_lost_indices(self.plates.keys() - created.keys())
        return self.plates

    def _check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the model again when the arguments have shapes that were not seen before."""
        key = call_key(args, kwargs)
        if key not in self._calls and self._model is not None:
            self._minibatch = read_call(
                self.model, self.layout, self._minibatch, args, kwargs, self._discrete
            )
            self._calls.add(key)

    # -- densities, draws, summaries -------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The guide as one distribution over the flat unconstrained vector ``(D,)``.

        torch's own class where there is one for all of it.
        """
        family, params = self.family, self.flat_params()
        if isinstance(family, Product) and len(family.parts) == 1:  # a block of its own
            part = family.parts[0]
            if part.size == part.block_size:
                return as_pyro(part.family.distribution(tuple(p[0] for p in params)))
        return as_pyro(family.distribution(params)).to_event(1)

    def log_prob_unconstrained(self, z: Tensor) -> Tensor:
        """Log density of flat unconstrained vectors.

        Args:
            z: Shape ``(..., D)``.

        Returns:
            Shape ``(...)``, in nats.
        """
        return self.family.log_prob(self.flat_params(), z).sum(-1)

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log density of values in the model's space, plates at full size.

        Args:
            values: For every site a tensor ``(..., *shape)``; leading dimensions must agree.

        Returns:
            Shape ``(...)``, in nats.

        Raises:
            GuideMismatchError: If a site is missing.
        """
        names = [site.name for site in self.layout.sites]
        names += [site.name for site in self.discrete_sites]
        missing = [name for name in names if name not in values]
        if missing:
            raise GuideMismatchError(
                f"log_prob needs a value for every latent site of the guide; {missing} are missing "
                f"from {list(values)}."
            )
        if not self.layout.sites:
            return torch.as_tensor(self.log_prob_discrete(values))
        z = self.layout.unconstrain(values)
        total = self.log_prob_discrete(values) + self.log_prob_unconstrained(z)
        unconstrained = self.layout.unpack(z)
        for site in self.layout.sites:
            if not site.is_real:
                log_det = site.log_abs_det(unconstrained[site.name], values[site.name])
                total = total - log_det.reshape(*total.shape, -1).sum(-1)
        return total

    @torch.no_grad()
    def sample_unconstrained(self, num_draws: int) -> Tensor:
        """Draw flat unconstrained vectors.

        Args:
            num_draws: Number of draws S, at least 1.

        Returns:
            Shape ``(S, D)``, without a gradient.

        Raises:
            ValueError: If ``num_draws`` is less than 1.
        """
        if num_draws < 1:
            raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
        params = self.flat_params()
        like = params[0]
        shape = (num_draws, self.layout.size)
        noise = self.family.noise(shape, dtype=like.dtype, device=like.device)
        return self.family.transform(params, noise)

    def sample_posterior(self, num_draws: int) -> dict[str, Tensor]:
        """Draw values in the model's space, subsampled plates at full size.

        Args:
            num_draws: Number of draws S, at least 1.

        Returns:
            For every site a tensor ``(S, *shape)``, without a gradient.
        """
        values = self.layout.constrain(self.sample_unconstrained(num_draws))
        return values | self.sample_discrete(num_draws)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Median of every latent site, plates at full size.

        For vector supports such as the simplex this is the image of the unconstrained medians, for
        discrete sites that have factors the most probable value.
        Arguments are accepted, as in Pyro's autoguides, and not used.
        """
        params = self.flat_params()
        half = torch.tensor(0.5, dtype=torch.float64, device=params[0].device)
        return self.layout.constrain(self.family.quantile(params, half)) | self._modes()

    @torch.no_grad()
    def quantiles(
        self, quantiles: Iterable[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantiles of every continuous latent site, plates at full size.

        Exact where a site is mapped to its support element by element; of simplices, ordered
        vectors and matrices by draws, always the same ones.

        Args:
            quantiles: Q probabilities between 0 and 1.
            args: Not used; accepted as in Pyro's autoguides.
            kwargs: Not used.

        Returns:
            For every site a tensor ``(Q, *shape)``.

        Raises:
            ValueError: If a probability is not strictly between 0 and 1.
        """
        layout = self.layout
        listed = quantiles if isinstance(quantiles, Tensor) else list(quantiles)
        params = self.flat_params()
        p = torch.as_tensor(listed, dtype=torch.float64, device=params[0].device).reshape(-1, 1)
        if not bool(((p > 0) & (p < 1)).all()):
            raise ValueError(f"quantiles must lie strictly between 0 and 1; got {listed}.")
        found = layout.constrain(self.family.quantile(params, p))
        joint = [site.name for site in layout.sites if not site.is_elementwise]
        if joint:  # an element of a value depends on several coordinates
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                values = self.sample_posterior(_QUANTILE_DRAWS)
            at = p.reshape(-1)
            found |= {name: torch.quantile(values[name], at.to(values[name]), 0) for name in joint}
        return found


@contextmanager
def _inside(around: Iterable[Plate], plates: Mapping[str, Any]) -> Iterator[None]:
    """The plates around a site."""
    with ExitStack() as stack:
        for plate in around:
            stack.enter_context(plates[plate.name])
        yield


def _check_divisible(family: Family, site: Site) -> None:
    """Refuse a minibatch of a block that holds all of a plate.

    Raises:
        GuideMismatchError: If it does.
    """
    if spans_site(family):
        raise GuideMismatchError(
            f"family '{family.name}' over all of site '{site.name}' makes its elements dependent, "
            "but the model visits only a minibatch of them. Use over='slice' (a block for every "
            "element of the plate), 'normal', or the full data."
        )
