"""Exceptions and warnings: each says what was expected, what came, and what to do."""

from __future__ import annotations


class ModelError(ValueError):
    """The model, its arguments or its data cannot be turned into a density."""


class GuideMismatchError(ValueError):
    """A guide and a model do not have the same latent sites."""


class FamilyError(ValueError):
    """A family does not fit the site that it was asked for."""


class GuideNotSetUpError(RuntimeError):
    """A guide is asked for something that it knows only once it has seen its model run."""


class NonFiniteError(FloatingPointError):
    """A density, loss or gradient is NaN or infinite; the message names the site."""


class LinearResponseError(ArithmeticError):
    """There is no linear-response covariance at these parameters; the message says why."""


class CaptureWarning(UserWarning):
    """A model could not be run from a captured graph, and a slower tier is used instead."""


class ImproperWarning(UserWarning):
    """The log density does not depend on some latents, so their posterior is improper."""


class KhatWarning(UserWarning):
    """Importance weights are too heavy-tailed for what is computed from them."""


class MinibatchWarning(UserWarning):
    """Draws of a subsampled plate are returned without a word on which elements they are."""


class ConversionWarning(UserWarning):
    """A conversion leaves something out; the message says what and why."""


class CheckpointError(ValueError):
    """A file holds no saved fit of this model; the message says what is wrong with it."""


class ConvergenceWarning(UserWarning):
    """A fit ended before it had converged; the message says why, with the numbers."""


class ModesWarning(UserWarning):
    """Fits from different starts ended at different optima."""


class DifferentDataWarning(UserWarning):
    """A saved fit is loaded with other data, or another density, than it was fitted to."""


class ScoreGradientWarning(UserWarning):
    """Discrete sites are drawn instead of summed over; the message says which, and why."""


class EstimatorWarning(UserWarning):
    """The draws behind a forward KL's gradient should not be trusted; the message says why."""
