"""The public names, exactly: adding or removing one is decided here and in the changelog."""

import inspect

import pytest

import pyro_mf as mf

PUBLIC = {"__version__"}


def test_public_names_are_exactly_these():
    assert set(mf.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_item_has_a_docstring_with_an_example(name):
    doc = inspect.getdoc(getattr(mf, name))
    assert doc, f"{name} has no docstring"
    assert ">>>" in doc, f"{name} shows no example"
