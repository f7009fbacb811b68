"""``AutoMeanFieldMixture``: a mixture of mean fields, for posteriors of several modes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn.module import pyro_method
from torch import Tensor

from pyro_mf._errors import FamilyError, GuideMismatchError
from pyro_mf.density.sites import Layout, Site
from pyro_mf.families.factorised_mixture import FactorisedMixture
from pyro_mf.guides.auto_mean_field import AutoMeanField
from pyro_mf.guides.factors import as_pyro
from pyro_mf.guides.mixture_factor import MixtureFactor
from pyro_mf.guides.prototype import InitFn, Model, init_to_origin


class AutoMeanFieldMixture(AutoMeanField):
    r"""Mixture of mean fields: :math:`q(z) = \sum_k w_k \prod_d N(z_d; m_{dk}, s_{dk})`.

    For posteriors of several modes, which a single mean field fits one of: labels that can be
    swapped, signs, two explanations of the same data. On the unconstrained space, as in
    :class:`~pyro_mf.AutoMeanField`.

    Each latent site is sampled once, under its own name, from its distribution given the sites
    before it: a mixture whose weights those have updated. There is no auxiliary site, and the log
    probabilities of a trace sum to the mixture's own density, of values that the guide did not
    draw too.

    A draw chooses a component, which has no derivative: with stock objectives its gradients are
    score gradients, right and noisy. :class:`~pyro_mf.ReverseKL` and :func:`~pyro_mf.fit` draw
    from every component instead, weighted, and have all derivatives pathwise.

    Parameters are flat: ``guide.loc`` and ``guide.scale`` have shape ``(D, K)``, ``guide.logits``
    has shape ``(K,)``. ``guide.locs.theta`` is one site's part, ``(*shape, K)``.

    Args:
        model: A Pyro model.
        num_components: Number of components K, at least 1. More than the posterior has modes do no
            harm: they follow shape and correlation of the modes, or end with no weight.
        init_loc_fn: Per-site value in the model's space around which the components start; zero on
            the unconstrained axis by default.
        init_scale: Initial scale of all components on the unconstrained axis, positive.
        init_spread: Half the side of the box around it in which they start, in pairs opposite to
            each other, on the unconstrained axis; the same at every setup.
        create_plates: As in :class:`~pyro.infer.autoguide.AutoGuide`.

    Raises:
        TypeError: If ``num_components`` is no integer, ``model`` or ``init_loc_fn`` cannot be
            called, or ``init_scale`` or ``init_spread`` is no number.
        ValueError: If ``num_components`` is less than 1, ``init_scale`` is not positive or
            ``init_spread`` is negative.

    Example:
        >>> def model():
        ...     theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(theta**2, 0.5), obs=torch.tensor(4.0))
        >>> guide = AutoMeanFieldMixture(model, num_components=2).setup()
        >>> [tuple(p.shape) for p in guide.flat_params()]
        [(1, 2), (1, 2), (2,)]

    References:
        Morningstar et al. (2021), Automatic Differentiation Variational Inference with Mixtures,
        https://arxiv.org/abs/2003.01687
    """

    def __init__(
        self,
        model: Model,
        num_components: int = 2,
        *,
        init_loc_fn: InitFn = init_to_origin,
        init_scale: float | Tensor = 0.1,
        init_spread: float = 2.0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            model,
            FactorisedMixture(num_components),
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            create_plates=create_plates,
        )
        if isinstance(init_spread, bool) or not isinstance(init_spread, int | float):
            raise TypeError(f"init_spread must be a number; got {init_spread!r}.")
        if not 0.0 <= init_spread < float("inf"):
            raise ValueError(f"init_spread must not be negative; got {init_spread}.")
        self.init_spread = float(init_spread)

    @property
    def num_components(self) -> int:
        """Number of components K."""
        return self.mixture.num_components

    @property
    def mixture(self) -> FactorisedMixture:
        """The family, over the whole flat vector."""
        return self.family  # type: ignore[return-value]

    @property
    def weights(self) -> Tensor:
        """Weights of the components, shape ``(K,)``, differentiable."""
        return torch.softmax(self.flat_params()[2], -1)

    # -- setting up ------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        is_loaded = "loc_unconstrained" in self._parameters
        super()._setup_prototype(*args, **kwargs)
        try:
            _check_layout(self.layout)
            self._check_whole()
        except (FamilyError, GuideMismatchError):
            self._layout = None  # the next call is to say so again
            raise
        if not is_loaded:
            self._disperse()

    def _disperse(self) -> None:
        """Move the components to where they start: in pairs, opposite to each other."""
        loc, scale, logits = (p.detach().clone() for p in self.flat_params())
        pairs = self.num_components // 2
        if not pairs or not self.init_spread:
            return
        generator = torch.Generator().manual_seed(0)
        uniform = torch.rand(len(loc), pairs, generator=generator, dtype=torch.float64)
        moved = self.init_spread * (2.0 * uniform - 1.0).to(loc)
        loc = loc[:, :1].repeat(1, self.num_components)
        loc[:, :pairs] += moved
        loc[:, -pairs:] -= moved
        self.set_flat_params((loc, scale, logits))

    def _check_whole(self) -> None:
        """Refuse plates of which a call visits a part.

        Raises:
            GuideMismatchError: If there is one around a latent site.
        """
        plates = sorted(self._minibatch.followed)
        if plates:
            raise GuideMismatchError(
                f"plate '{plates[0]}' is subsampled around latent sites, and a mixture makes all "
                "latents dependent: which component a minibatch's latents belong to depends on "
                "the latents that the call leaves out. Use the full plate, AutoMeanField, or "
                "subsample only plates that hold observed sites."
            )

    # -- running as a Pyro guide -----------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site, with the arguments of the model.

        Args:
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.

        Returns:
            Values by site name, in the model's space.
        """
        return self._run(None, args, kwargs)

    @pyro_method
    def run_component(self, component: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site from one component, under the mixture's densities.

        Args:
            component: Its index.
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
        """
        return self._run(component, args, kwargs)

    def strata(self, *args: Any, **kwargs: Any) -> list[tuple[Tensor, Callable[..., Any]]]:
        """The components as guides with reparameterised draws, each with its weight.

        The weighted sum of their ELBOs is the mixture's, in its gradients too.

        Args:
            args: The model's positional arguments.
            kwargs: The model's keyword arguments.
        """
        self.setup(*args, **kwargs)
        weights = self.weights
        return [(weights[k], partial(self.run_component, k)) for k in range(self.num_components)]

    def _run(
        self, component: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        self.setup(*args, **kwargs)
        self._check_call(args, kwargs)
        self._check_whole()
        loc, scale, logits = self.flat_params()
        plates = self._create_plates(*args, **kwargs)
        log_weights, result = torch.log_softmax(logits, -1), {}
        for site in self.layout.sites:
            own = slice(site.start, site.stop)
            shape = (*site.unconstrained_shape, self.num_components)
            factor = MixtureFactor(
                log_weights,
                loc[own].reshape(shape),
                scale[own].reshape(shape),
                event_dim=site.unconstrained_event_dim,
                component=component,
            )
            # The cache gives back the very u that a draw came from, where inverting is inexact.
            transform = None if site.is_real else site.transform.with_cache(1)
            fn = factor if transform is None else dist.TransformedDistribution(factor, [transform])
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate.name])
                value = result[site.name] = pyro.sample(site.name, fn)
            u = value if transform is None else transform.inv(value)
            log_weights = log_weights + factor.evidence(u)
        return result

    # -- densities, draws, summaries -------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The guide as one distribution over the flat unconstrained vector ``(D,)``."""
        return as_pyro(self.family.distribution(self.flat_params()))

    def log_prob_unconstrained(self, z: Tensor) -> Tensor:
        """Log density of flat unconstrained vectors ``(..., D)``, in nats, shape ``(...)``."""
        return self.mixture.joint_log_prob(self.flat_params(), z)

    def set_site_param(self, param: str, site: Site, value: Tensor) -> None:
        """Write one site's part of ``loc`` or ``scale``, shape ``(*shape, K)``.

        Raises:
            KeyError: If there is no such parameter.
            ValueError: If the value does not fit, or ``param`` is ``logits``, which sites share.
        """
        if param == "logits":
            raise ValueError(
                "all sites share the components' weights. Write guide.logits as a whole: "
                "guide.set_flat_params((loc, scale, logits))."
            )
        super().set_site_param(param, site, value)


def _check_layout(layout: Layout) -> None:
    """Refuse angles.

    Raises:
        FamilyError: If a site is one.
    """
    for site in layout.sites:
        if site.is_circular:
            raise FamilyError(
                f"latent site '{site.name}' is an angle: values a turn apart are the same, and "
                "components of a mixture would settle on copies of one mode. Use AutoMeanField "
                "with family='von_mises' there."
            )
