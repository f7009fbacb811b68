"""The public names, exactly: adding or removing one is decided here and in the changelog."""

import inspect

import pytest

import pyro_mf as mf

CALLABLE = {
    "AutoMeanField",
    "AutoMeanFieldMixture",
    "ForwardKL",
    "LogJoint",
    "ReverseKL",
    "calibrate",
    "compare_posteriors",
    "diagnose",
    "fit",
    "from_pyro",
    "from_pyro_svi",
    "loo",
    "plot_calibration",
    "plot_comparison",
    "plot_diagnosis",
    "plot_khat",
    "plot_pairs",
    "plot_predictive",
    "plot_ranks",
    "plot_sds",
    "plot_trace",
    "psis",
    "run_nuts",
}
RETURNED = {"Calibration", "Diagnosis", "FitResult", "NUTSResult", "PosteriorComparison"}
RAISED = {
    "CheckpointError",
    "FamilyError",
    "GuideMismatchError",
    "GuideNotSetUpError",
    "LinearResponseError",
    "ModelError",
    "NonFiniteError",
}
WARNED = {
    "CaptureWarning",
    "ConvergenceWarning",
    "ConversionWarning",
    "DifferentDataWarning",
    "EstimatorWarning",
    "ImproperWarning",
    "KhatWarning",
    "MinibatchWarning",
    "ModesWarning",
    "ScoreGradientWarning",
}


def test_public_names_are_exactly_these():
    assert set(mf.__all__) == CALLABLE | RETURNED | RAISED | WARNED


@pytest.mark.parametrize("name", sorted(mf.__all__))
def test_every_public_name_is_there_and_listed(name):
    assert getattr(mf, name).__name__ == name
    assert name in dir(mf)


@pytest.mark.parametrize("name", sorted(CALLABLE))
def test_every_public_item_shows_an_example(name):
    doc = inspect.getdoc(getattr(mf, name))
    assert doc, f"{name} has no docstring"
    assert ">>>" in doc, f"{name} shows no example"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pyro_mf' has no attribute 'ForwardELBO'"):
        _ = mf.ForwardELBO
