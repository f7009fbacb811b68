"""Saving and loading a fit: what comes back, and every file that is refused."""

import os
import pickle
import warnings
import zipfile

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_mf._errors import CheckpointError, ConvergenceWarning, DifferentDataWarning
from pyro_mf.fitting import FitResult, fit
from pyro_mf.fitting.checkpoint import FORMAT, VERSION, as_plain
from pyro_mf.guides import AutoMeanField


def model(x, prior=1.0):
    z = pyro.sample("z", dist.Normal(0.0, prior))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def other_site(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))


def other_support(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("scale", dist.Uniform(0.0, 3.0))


def other_shape(x):
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def other_order(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Normal(0.0, scale))


def other_likelihood(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.StudentT(3.0, z, scale), obs=x)


def other_prior(x):
    model(x, 1.001)


def learnable(x):
    prior = pyro.param("prior", torch.tensor(1.0), constraint=dist.constraints.positive)
    model(x, prior)


X = torch.tensor([0.3, -0.2, 1.1, 2.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    try:
        return fit(model, (X,), num_restarts=2)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def path(result, tmp_path):
    result.save(tmp_path / "fit.pt")
    return tmp_path / "fit.pt"


@pytest.mark.usefixtures("few_evaluations")
class TestRoundTrip:
    def test_everything_comes_back(self, result, path):
        loaded = FitResult.load(path, model, (X,))
        assert str(loaded) == str(result)
        assert loaded.losses == result.losses
        assert loaded.seconds == result.seconds
        assert torch.equal(loaded.guide.loc, result.guide.loc)
        assert torch.equal(loaded.guide.scale, result.guide.scale)
        assert loaded.summary().equals(result.summary())
        assert loaded.summary().attrs == result.summary().attrs
        for one, other in zip(loaded.restarts, result.restarts, strict=True):
            assert all(map(torch.equal, one.params, other.params))
        draws = loaded.sample(5, linear_response=True)
        assert torch.equal(draws["scale"], result.sample(5, linear_response=True)["scale"])

    def test_loaded_guide_has_parameters_of_its_own(self, result, path):
        loaded = FitResult.load(path, model, (X,))
        loaded.guide.locs.z = 100.0
        assert result.guide.median()["z"] < 10

    def test_torch_reads_the_file_and_finds_tensors_numbers_and_strings(self, path):
        content = torch.load(path, weights_only=True)
        assert content["format"] == FORMAT
        as_plain(content)

    def test_precision_may_change(self, path):
        torch.set_default_dtype(torch.float32)
        try:
            with pytest.warns(DifferentDataWarning):
                loaded = FitResult.load(path, model, (X.float(),))
        finally:
            torch.set_default_dtype(torch.float64)
        assert loaded.guide.loc.dtype == torch.float32
        assert loaded.restarts[0].params[0].dtype == torch.float32

    def test_loading_draws_nothing(self, path):
        before = torch.get_rng_state()
        FitResult.load(path, model, (X,))
        assert torch.equal(torch.get_rng_state(), before)

    def test_saving_again_replaces_the_file(self, result, path):
        size = path.stat().st_size
        result.save(path)
        assert path.stat().st_size == size
        assert list(path.parent.iterdir()) == [path]

    def test_file_has_the_permissions_of_any_other(self, path):
        plain = path.with_name("plain")
        plain.touch()
        assert path.stat().st_mode == plain.stat().st_mode

    def test_learnable_parameters_come_back(self, tmp_path):
        with pytest.warns(ConvergenceWarning):
            result = fit(learnable, (X,), max_gradients=50)
        fitted = pyro.param("prior").item()
        result.save(tmp_path / "fit.pt")
        pyro.clear_param_store()
        FitResult.load(tmp_path / "fit.pt", learnable, (X,))
        assert pyro.param("prior").item() == pytest.approx(fitted, rel=1e-6)
        with pytest.raises(CheckpointError, match="it has learnable parameters"):
            FitResult.load(tmp_path / "fit.pt", model, (X,))

    def test_a_loaded_fit_goes_on_where_it_stopped(self, tmp_path):
        with pytest.warns(ConvergenceWarning):
            result = fit(model, (X,), solver="stochastic", max_gradients=50)
        result.save(tmp_path / "fit.pt")
        pyro.clear_param_store()  # as in another process
        loaded = FitResult.load(tmp_path / "fit.pt", model, (X,))
        with pytest.warns(ConvergenceWarning):
            further = loaded.resume(max_gradients=50)
        assert further.num_gradients >= 100
        assert further.losses[: len(result.losses)] == result.losses

    def test_stock_guide_is_loaded_into_a_new_one(self, tmp_path):
        with pytest.warns(ConvergenceWarning):
            result = fit(model, (X,), guide=AutoMultivariateNormal(model), max_gradients=20)
        result.save(tmp_path / "fit.pt")
        pyro.clear_param_store()
        new = AutoMultivariateNormal(model)
        loaded = FitResult.load(tmp_path / "fit.pt", model, (X,), guide=new)
        assert torch.equal(loaded.guide.loc, result.guide.loc)
        with pytest.raises(CheckpointError, match="AutoMultivariateNormal, which load cannot make"):
            FitResult.load(tmp_path / "fit.pt", model, (X,))
        with pytest.raises(CheckpointError, match="got AutoMeanField"):
            FitResult.load(tmp_path / "fit.pt", model, (X,), guide=AutoMeanField(model))

    def test_function_guide_is_not_saved(self, tmp_path):
        def guide(x):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))

        with pytest.warns(ConvergenceWarning):
            result = fit(model, (X,), guide=guide, max_gradients=20)
        with pytest.raises(TypeError, match=r"guide is a function \(guide\)"):
            result.save(tmp_path / "fit.pt")


class TestRefused:
    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (other_site, r"it has a latent site 'z', this model has \['w'\]"),
            (other_support, r"support GreaterThan\(0\)|support .*Interval\(0, 3\)"),
            (other_shape, r"its 'z' has shape \(\) .* this model's \(2,\)"),
            (other_order, r"order \['z', 'scale'\], this model in \['scale', 'z'\]"),
        ],
    )
    def test_another_models_file(self, path, other, words):
        with pytest.raises(CheckpointError, match="another model: .*" + words):
            FitResult.load(path, other, (X,))

    def test_other_data_is_a_warning(self, path):
        with pytest.warns(DifferentDataWarning, match="made for other data"):
            FitResult.load(path, model, (X + 1.0,))
        with pytest.warns(DifferentDataWarning):
            FitResult.load(path, model, (X,), {"prior": 2.0})

    @pytest.mark.parametrize("other", [other_likelihood, other_prior])
    def test_another_model_with_the_same_sites_is_a_warning(self, path, other):
        with pytest.warns(DifferentDataWarning, match=r"model or data .* was -.* now is -"):
            FitResult.load(path, other, (X,))

    @pytest.mark.usefixtures("few_evaluations")
    @pytest.mark.parametrize("kind", ["flat", "stock"])
    def test_other_data_in_a_closure_are_a_warning(self, tmp_path, kind):
        data = X.clone()

        def closed():
            model(data)

        def new_guide():
            return AutoMultivariateNormal(closed) if kind == "stock" else None

        with pytest.warns(ConvergenceWarning):
            result = fit(closed, guide=new_guide(), solver="stochastic", max_gradients=20)
        result.save(tmp_path / "fit.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FitResult.load(tmp_path / "fit.pt", closed, guide=new_guide())
        data[0] += 1e-3
        with pytest.warns(DifferentDataWarning, match="model or data differ"):
            FitResult.load(tmp_path / "fit.pt", closed, guide=new_guide())

    def test_an_older_file_is_not_compared(self, path):
        content = torch.load(path, weights_only=True)
        del content["densities"]
        torch.save(content, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FitResult.load(path, other_prior, (X,))

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
    def test_a_file_cut_short(self, path, share):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError, match="is cut short or damaged"):
            FitResult.load(path, model, (X,))

    def test_a_damaged_file(self, path):
        content = bytearray(path.read_bytes())
        middle = content.find(b"data.pkl") + 200
        content[middle : middle + 400] = bytes(400)
        path.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match="cut short or damaged|other things than"):
            FitResult.load(path, model, (X,))

    def test_code_is_not_run(self, path, tmp_path):
        witness = tmp_path / "ran"

        class Code:
            def __reduce__(self):
                return (os.mkdir, (str(witness),))

        torch.save({"format": FORMAT, "version": VERSION, "guide": Code()}, path)
        with pytest.raises(CheckpointError, match="could run code .* nothing was run"):
            FitResult.load(path, model, (X,))
        assert not witness.exists()

    @pytest.mark.parametrize("kind", ["text", "pickle", "zip", "tensor", "dictionary"])
    def test_files_of_others(self, path, kind):
        if kind == "text":
            path.write_text("ELBO: -3")
        elif kind == "pickle":
            path.write_bytes(pickle.dumps({"a": 1}))
        elif kind == "zip":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("a", "b")
        else:
            torch.save(X if kind == "tensor" else {"a": X}, path)
        with pytest.raises(CheckpointError, match="is no file that FitResult.save wrote"):
            FitResult.load(path, model, (X,))

    def test_newer_format(self, path):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"version": VERSION + 1}, path)
        with pytest.raises(CheckpointError, match="newer version of pyro_mf"):
            FitResult.load(path, model, (X,))

    def test_a_part_is_missing(self, path):
        content = torch.load(path, weights_only=True)
        del content["restarts"][0]["elbo"]
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="lacks a part of a fit.*elbo"):
            FitResult.load(path, model, (X,))

    def test_a_flipped_bit(self, path):
        whole = path.read_bytes()
        scale = torch.load(path, weights_only=True)["restarts"][0]["params"][1]
        start = whole.find(scale.numpy().tobytes())
        assert start > 0
        entry = whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"/data/1"))
        end = whole.rfind(b"PK\x06\x07")
        for byte, bit in [(start, 0), (start + 6, 5), (entry + 38, 4), (end + 4, 0)]:
            content = bytearray(whole)
            content[byte] ^= 1 << bit
            path.write_bytes(bytes(content))
            with pytest.raises(CheckpointError, match="cut short or damaged"):
                FitResult.load(path, model, (X,))

    @pytest.mark.parametrize(
        "change",
        [
            {"version": None},
            {"version": "x"},
            {"version": True},
            {"version": 0},
            {"best": -1},
            {"best": 2},
            {"best": True},
            {"solver": "other"},
            {"seed": "x"},
            {"seconds": None},
            {"seconds": {"fit": "x"}},
            {"notes": "abc"},
            {"guide": {}},
            {
                "guide": {
                    "class": "AutoMeanField",
                    "kind": "flat",
                    "families": {"z": ["normal", {}]},
                }
            },
            {
                "guide": {
                    "class": "A",
                    "kind": "flat",
                    "families": {"z": ["normal", {}]},
                    "sites": [["z", 1]],
                }
            },
            {
                "guide": {
                    "class": "A",
                    "kind": "other",
                    "families": {"z": ["normal", {}]},
                    "sites": [],
                }
            },
            {"guide": []},
            {"data": None},
            {"model_params": {"a": 1.0}},
            {"response": {"found": {"loc": X, "covariance": X}, "refusal": ""}},
            {"response": {"found": {"loc": X, "other": X}, "refusal": "", "elbo": 0.0}},
            {"densities": {"points": X, "values": [0.0]}},
            {"restarts": []},
            {"restarts": {}},
            {"restarts": [1.0]},
        ],
    )
    def test_a_part_is_something_else(self, path, change):
        content = torch.load(path, weights_only=True)
        torch.save(content | change, path)
        with pytest.raises(CheckpointError):
            FitResult.load(path, model, (X,))

    @pytest.mark.parametrize(
        "change",
        [
            {"stop_reason": "foo"},
            {"params": []},
            {"params": [X[:2]]},
            {"params": [X[:2], -torch.ones(2)]},
            {"params": [X, X]},
            {"losses": 1.0},
            {"elbo": "x"},
            {"num_gradients": None},
            {"state": None},
        ],
    )
    def test_a_part_of_a_restart_is_something_else(self, path, change):
        content = torch.load(path, weights_only=True)
        content["restarts"] = [entry | change for entry in content["restarts"]]
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            FitResult.load(path, model, (X,))

    def test_a_folder(self, result, tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder. Give the path of a file"):
            FitResult.load(tmp_path, model, (X,))
        with pytest.raises(IsADirectoryError, match="is a folder. Give the path of a file"):
            result.save(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            FitResult.load(tmp_path / "nothing.pt", model, (X,))


class TestWriting:
    def test_a_crash_leaves_the_old_file(self, result, path, monkeypatch):
        old = path.read_bytes()

        def crash(*args, **kwargs):
            args[1].write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            result.save(path)
        assert path.read_bytes() == old
        assert list(path.parent.iterdir()) == [path]

    def test_no_folder(self, result, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none/fit\.pt'$"):
            result.save(tmp_path / "none" / "fit.pt")

    def test_what_is_no_data_is_refused(self):
        with pytest.raises(TypeError, match="got function"):
            as_plain({"a": [crashing]})

    def test_views_are_saved_alone(self):
        whole = torch.zeros(1000, 2)
        assert as_plain(whole[0]).untyped_storage().nbytes() == 16
        assert as_plain(np.float32(1.5)) == 1.5


def crashing():
    """Code, which is no data."""
