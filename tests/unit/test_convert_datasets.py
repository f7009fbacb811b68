"""Names and labels of axes, and the two generations of ArviZ behind one door."""

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_mf.convert import generations
from pyro_mf.convert.datasets import Axes, check_all_used, safe_name, to_dataset
from pyro_mf.density.sites import Plate

ROW, COL = Plate("row", -2, 4, 4), Plate("col", -1, 3, 3)
SAMPLE = {"chain": [0, 1], "draw": range(5)}


@pytest.mark.parametrize(
    ("plates", "event_dim", "shape", "names"),
    [
        ((), 0, (), ()),
        ((ROW, COL), 0, (4, 3), ("row", "col")),
        ((ROW,), 0, (4, 1), ("row", None)),
        ((COL,), 1, (3, 2), ("col", "x_dim_1")),
        ((), 2, (2, 2), ("x_dim_0", "x_dim_1")),
        ((), 1, (1,), ("x_dim_0",)),
        ((), 0, (1,), (None,)),
        ((), 0, (7,), ("x_dim_0",)),
        ((COL,), 0, (), ()),
        ((COL,), 0, (1,), (None,)),
        ((Plate("draw", -1, 3, 3),), 0, (3,), ("draw_",)),
    ],
)
def test_axes_take_the_names_of_plates(plates, event_dim, shape, names):
    assert Axes({"x": plates}, {"x": event_dim}).names("x", shape) == names


def test_dims_override_names_from_the_left():
    axes = Axes({"x": (COL,)}, {"x": 1}, dims={"x": ["person"]})
    assert axes.names("x", (3, 2)) == ("person", "x_dim_1")


def test_dims_for_every_axis_keep_axes_of_size_one():
    axes = Axes({"x": (ROW,)}, {"x": 0}, dims={"x": ["row", "one"]})
    assert axes.names("x", (4, 1)) == ("row", "one")


def test_too_many_dims_are_refused():
    with pytest.raises(ValueError, match=r"dims names 2 axes of 'x' .* it has 1, of shape \(3,\)"):
        Axes({"x": (COL,)}, {"x": 0}, dims={"x": ["a", "b"]}).names("x", (3,))


def test_one_name_for_two_axes_is_refused():
    with pytest.raises(ValueError, match="two axes of 'x' have one name"):
        Axes(event_dims={"x": 2}, dims={"x": ["a", "a"]}).names("x", (2, 2))


def test_values_are_kept_and_labelled():
    axes = Axes({"x": (ROW, COL)}, {"x": 0}, coords={"col": ["a", "b", "c"]})
    values = torch.arange(120.0).reshape(2, 5, 4, 3)
    ds = to_dataset({"x": values}, axes, SAMPLE, {"name": "test"})
    assert ds["x"].dims == ("chain", "draw", "row", "col")
    assert list(ds["col"].values) == ["a", "b", "c"]
    assert list(ds["row"].values) == [0, 1, 2, 3]
    assert ds.attrs == {"name": "test"}
    np.testing.assert_array_equal(ds["x"].values, values.numpy())


def test_axes_without_a_plate_are_squeezed():
    ds = to_dataset({"x": torch.ones(2, 5, 4, 1)}, Axes({"x": (ROW,)}, {"x": 0}), SAMPLE)
    assert ds["x"].shape == (2, 5, 4)


def test_data_have_no_sample_dimensions():
    ds = to_dataset({"y": np.ones((1, 3))}, Axes(dims={"y": ["row"]}))
    assert ds["y"].dims == ("row", "y_dim_1")


@pytest.mark.parametrize(("name", "safe"), [("chain", "chain_"), ("a/b", "a.b"), ("mu", "mu")])
def test_reserved_names_are_changed(name, safe):
    assert safe_name(name) == safe
    assert list(to_dataset({name: np.ones((2, 5))}, Axes(), SAMPLE).data_vars) == [safe]


def test_labels_of_the_wrong_length_are_refused():
    axes = Axes({"x": (COL,)}, {"x": 0}, coords={"col": ["a", "b"]})
    with pytest.raises(ValueError, match="2 labels for dimension 'col', whose size is 3"):
        to_dataset({"x": torch.ones(2, 5, 3)}, axes, SAMPLE)


def test_one_dimension_of_two_sizes_is_refused():
    axes = Axes(dims={"x": ["a"], "y": ["a"]})
    with pytest.raises(ValueError, match="dimension 'a' has size 3 in one variable and 2 in 'y'"):
        to_dataset({"x": np.ones(3), "y": np.ones(2)}, axes)


def test_a_dimension_called_as_a_variable_is_refused():
    with pytest.raises(ValueError, match="have the names of variables"):
        to_dataset({"x": np.ones(3)}, Axes(dims={"x": ["x"]}))


def test_two_variables_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two variables would be called 'a.b'"):
        to_dataset({"a.b": np.ones(3), "a/b": np.ones(3)}, Axes())


def test_half_precision_is_widened_for_netcdf():
    ds = to_dataset({"x": torch.ones(2, 5, dtype=torch.bfloat16)}, Axes(), SAMPLE)
    assert ds["x"].dtype == np.float32


def test_unused_coords_and_dims_are_refused():
    ds = {"posterior": to_dataset({"x": np.ones((2, 5, 3))}, Axes({}, {"x": 0}), SAMPLE)}
    check_all_used(ds, {"x_dim_0": [1, 2, 3]}, {"x": ["x_dim_0"]})
    with pytest.raises(ValueError, match=r"\['scool'\] that no variable has"):
        check_all_used(ds, {"scool": [1]}, {})
    with pytest.raises(ValueError, match=r"axes of \['tehta'\], which are no variables"):
        check_all_used(ds, {}, {"tehta": ["a"]})


def test_wrap_makes_what_the_installed_arviz_uses():
    result = generations.wrap({"posterior": xr.Dataset({"x": (("chain", "draw"), [[1.0]])})})
    expected = "DataTree" if generations.arviz_major() >= 1 else "InferenceData"
    assert type(result).__name__ == expected
    assert generations.is_result(result)
    assert not generations.is_result({"posterior": 1})


def test_groups_without_variables_are_left_out():
    full = xr.Dataset({"x": (("chain", "draw"), [[1.0]])})
    result = generations.wrap({"posterior": full, "log_likelihood": xr.Dataset()})
    assert generations.groups(result) == ["posterior"]


def test_netcdf_round_trip_keeps_groups_values_and_attributes(tmp_path):
    ds = xr.Dataset(
        {"x": (("chain", "draw"), np.random.default_rng(0).normal(size=(2, 5)))},
        attrs={"sample_dims": ["chain", "draw"], "is_approximate": 1, "guide": "AutoMeanField"},
    )
    fit = xr.Dataset({"loss": ("step", [3.0, 2.0])})
    result = generations.wrap({"posterior": ds, "vi_fit": fit}, {"name": "test"})
    result.to_netcdf(str(tmp_path / "result.nc"))
    back = generations.load(tmp_path / "result.nc")
    assert generations.groups(back) == ["posterior", "vi_fit"]
    assert back.attrs["name"] == "test"
    xr.testing.assert_equal(generations.dataset(back, "posterior"), ds)
    attrs = generations.dataset(back, "posterior").attrs
    assert list(attrs["sample_dims"]) == ["chain", "draw"]
    assert attrs["is_approximate"] == 1
    assert attrs["guide"] == "AutoMeanField"


def test_a_missing_group_is_named():
    result = generations.wrap({"posterior": xr.Dataset({"x": (("chain", "draw"), [[1.0]])})})
    with pytest.raises(KeyError, match=r"expected a group 'prior'; the result has \['posterior'\]"):
        generations.dataset(result, "prior")


def test_missing_arviz_says_what_to_install(monkeypatch):
    def missing(name):
        raise generations.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(generations.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="pip install 'arviz"):
        generations.arviz_major()
