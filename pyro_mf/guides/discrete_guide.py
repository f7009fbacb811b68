"""The part of a guide that has factors of discrete sites: their parameters, draws and densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor

from pyro_mf import _pyro
from pyro_mf._errors import FamilyError, GuideMismatchError
from pyro_mf.density.sites import Layout
from pyro_mf.guides.discrete_factors import DiscreteSite
from pyro_mf.guides.flat_guide import FlatGuide
from pyro_mf.guides.prototype import Start


class DiscreteGuide(FlatGuide):
    """A flat guide that has, beside its flat vector, factors of the discrete sites asked for."""

    @property
    def discrete_sites(self) -> tuple[DiscreteSite, ...]:
        """The discrete sites that have factors; empty before the guide is set up."""
        return self._discrete

    @property
    def has_discrete_factors(self) -> bool:
        """Whether discrete sites have factors; known before the guide is set up."""
        return bool(self._discrete if self.is_set_up else self._discrete_spec)

    def probs(self, name: str) -> Tensor:
        """Probabilities of a discrete site's values under the guide, plates at full size.

        Args:
            name: Name of a discrete site that has a factor.

        Returns:
            Shape ``(*shape, K)``, differentiable: the probability of each value.

        Raises:
            KeyError: If there is no such site.
        """
        return self.log_probs(name).exp()

    @pyro_method
    def log_probs(self, name: str) -> Tensor:
        """Logarithms of :meth:`probs`, in nats.

        Args:
            name: As there.

        Raises:
            KeyError: If there is no such site.
        """
        site = self._discrete_site(name)
        return site.family.log_probs((self._logits(site),))

    @torch.no_grad()
    def set_log_probs(self, name: str, log_weights: Tensor) -> None:
        """Write the probabilities of a discrete site's values.

        Args:
            name: Name of a discrete site that has a factor.
            log_weights: Their logarithms up to a constant, finite, shape ``(*shape, K)`` or one
                that broadcasts to it.

        Raises:
            KeyError: If there is no such site.
            ValueError: If the shape is another, or a weight is not finite.
        """
        site = self._discrete_site(name)
        shape = (*site.shape, site.num_values)
        logits = self._logits(site)
        try:
            weights = log_weights.to(logits).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"log weights of site '{name}' have shape {shape}; got {tuple(log_weights.shape)}."
            ) from None
        if not bool(torch.isfinite(weights).all()):
            raise ValueError(f"log weights of site '{name}' must be finite; got {log_weights}.")
        self.get_parameter(f"{site.param_name}_unconstrained").copy_(site.family.init(weights)[0])

    @property
    def is_auto(self) -> bool:
        """Whether the choice of families is left to a fit; not where all sites are discrete."""
        return super().is_auto and isinstance(self._discrete_spec, dict)

    def discrete_params(self) -> tuple[Tensor, ...]:
        """Logits of every discrete site's factor, in the order of :attr:`discrete_sites`."""
        return tuple(map(self._logits, self.discrete_sites))

    @torch.no_grad()
    def set_discrete_params(self, logits: tuple[Tensor, ...]) -> None:
        """Write the logits of all discrete sites' factors.

        Args:
            logits: As :meth:`discrete_params` gives them.

        Raises:
            ValueError: If one has another shape, or there are more or fewer.
        """
        own = self.discrete_params()
        if [x.shape for x in logits] != [x.shape for x in own]:
            raise ValueError(
                f"logits of discrete sites must have shapes {[tuple(x.shape) for x in own]}; got "
                f"{[tuple(x.shape) for x in logits]}."
            )
        for site, value in zip(self.discrete_sites, logits, strict=True):
            leaf = self.get_parameter(f"{site.param_name}_unconstrained")
            leaf.copy_(value.detach().to(leaf))

    def _discrete_site(self, name: str) -> DiscreteSite:
        """A site by its name.

        Raises:
            KeyError: If it has no factor; says which have.
        """
        _ = self.layout  # refuses a guide that has not seen its model
        for site in self._discrete:
            if site.name == name:
                return site
        known = [site.name for site in self._discrete]
        raise KeyError(f"no factor of a discrete site '{name}'; there are factors of {known}")

    def _logits(self, site: DiscreteSite) -> Tensor:
        _pyro.own_parameters(self, self._own_names)
        logits: Tensor = getattr(self, site.param_name)
        return logits

    # -- what a guide does with them -------------------------------------------------------------

    def _discrete_factor(self, site: DiscreteSite, plates: Mapping[str, Any]) -> Any:
        """A site's factor as ``pyro.sample`` takes it, of the elements that are visited."""
        batch_dim, logits = len(site.shape), self._logits(site)
        logits = self._minibatch.take_batch(logits, batch_dim, site.plates, plates)
        return site.distribution(logits)

    def log_prob_discrete(self, values: Mapping[str, Tensor]) -> Tensor | float:
        """Log probability of the discrete sites that have factors.

        Args:
            values: For every such site a tensor ``(..., *shape)``.

        Returns:
            Shape ``(...)``, in nats; zero where there are none.
        """
        total: Tensor | float = 0.0
        for site in self._discrete:
            index = site.index_of(values[site.name])
            each = site.family.log_prob((self._logits(site),), index)
            total = (
                total + each.flatten(each.dim() - len(site.shape)).sum(-1)
                if site.shape
                else (total + each)
            )
        return total

    @torch.no_grad()
    def sample_discrete(self, num_draws: int) -> dict[str, Tensor]:
        """Draw the discrete sites that have factors, subsampled plates at full size.

        Args:
            num_draws: Number of draws S, at least 1.

        Returns:
            For every such site a tensor ``(S, *shape)``.
        """
        return {
            site.name: site.value_of(
                torch.distributions.Categorical(logits=self.log_probs(site.name)).sample(
                    (num_draws,)
                )
            )
            for site in self._discrete
        }

    @torch.no_grad()
    def _modes(self) -> dict[str, Tensor]:
        return {
            site.name: site.value_of(self.log_probs(site.name).argmax(-1))
            for site in self._discrete
        }

    # -- parameters, saved states ----------------------------------------------------------------

    @property
    def _own_names(self) -> tuple[str, ...]:
        return (*super()._own_names, *(site.param_name for site in self._discrete))

    def _create_params(self, start: Start) -> None:
        super()._create_params(start)
        names = [site.param_name for site in start.discrete]
        for site in start.discrete:
            if names.count(site.param_name) > 1 or hasattr(type(self), site.param_name):
                raise FamilyError(
                    f"the factor of site '{site.name}' would have its parameter under the name "
                    f"'{site.param_name}', which is taken. Rename the site."
                )
            if f"{site.param_name}_unconstrained" not in self._parameters:
                logits = site.initial_logits(start.loc)
                setattr(self, site.param_name, PyroParam(logits, constraints.real))
        _pyro.own_parameters(self, self._own_names)
        for site in start.discrete:
            self._check_logits(site, start.loc)

    def _check_logits(self, site: DiscreteSite, like: Tensor) -> None:
        """Refuse parameters that were loaded from another model's guide.

        Raises:
            GuideMismatchError: If they have another shape.
        """
        found, expected = getattr(self, site.param_name).shape, site.initial_logits(like).shape
        if found != expected:
            raise GuideMismatchError(
                f"parameter '{self._pyro_name}.{site.param_name}' has shape {tuple(found)}, but "
                f"the factor of site '{site.name}' needs {tuple(expected)}: it was loaded from, or "
                "belongs to, another model's guide. Call pyro.clear_param_store(), or load this "
                "model's parameters."
            )

    def _saved_shapes(self, layout: Layout) -> dict[str, list[int]]:
        own = {site.name: [*site.shape, site.num_values] for site in self._discrete}
        return {**super()._saved_shapes(layout), **own}
