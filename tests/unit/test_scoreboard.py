"""The scoreboard's arithmetic: what is bad, how sure that is, and how verdicts are counted."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.scoreboard_methods import strata
from benchmarks.scoreboard_rows import judged_parameters, read, truth
from benchmarks.scoreboard_truth import Confusion, Error, Moments, Truth, from_zero, whole

REFERENCE = {
    "mean": 10.0,
    "sd": 2.0,
    "q05": 7.0,
    "q50": 10.0,
    "q95": 13.0,
    "mcse_mean": 0.02,
    "mcse_sd": 0.02,
}
GOOD, BAD = Truth(bad=False, edge=False), Truth(bad=True, edge=False)
NEARLY_GOOD, NEARLY_BAD = Truth(bad=False, edge=True), Truth(bad=True, edge=True)


def an_error(mean=0.0, ratio=1.0, *, se=0.01):
    return Error(mean, se, ratio, se, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("mean", "ratio", "expected"),
    [
        (0.0, 1.0, GOOD),
        (0.2, 1.2, GOOD),
        (0.24, 1.0, NEARLY_GOOD),
        (-0.24, 1.0, NEARLY_GOOD),
        (0.26, 1.0, NEARLY_BAD),
        (-0.3, 1.0, BAD),
        (0.0, 1.24, NEARLY_GOOD),
        (0.0, 0.74, NEARLY_BAD),
        (0.0, 0.7, BAD),
        (0.0, 1.3, BAD),
        (0.26, 1.3, BAD),
        (0.26, 1.0 + 0.24, NEARLY_BAD),
        (math.nan, 1.0, BAD),
        (0.0, math.inf, BAD),
    ],
)
def test_a_parameter_is_bad_beyond_a_quarter_and_on_the_edge_within_two_errors(
    mean, ratio, expected
):
    assert an_error(mean, ratio).truth == expected


def test_errors_are_relative_to_the_reference_and_its_own_error():
    found = Moments(11.0, 3.0, (6.0, 11.0, 15.0), mean_se=0.0, sd_se=0.0)
    error = Error.of(found, REFERENCE)
    assert error.mean == 0.5
    assert error.ratio == 1.5
    assert error.quantiles == (-0.5, 0.5, 1.0)
    assert error.mean_se == pytest.approx(0.01)
    assert error.ratio_se == pytest.approx(1.5 * 0.01)
    assert error.worst_quantile == 1.0
    assert error.size == 2.0
    assert error.log_sd == pytest.approx(math.log(1.5))


def test_one_bad_parameter_makes_a_fit_bad():
    assert whole([GOOD, GOOD]) == GOOD
    assert whole([GOOD, NEARLY_GOOD]) == NEARLY_GOOD
    assert whole([GOOD, NEARLY_BAD, NEARLY_GOOD]) == NEARLY_BAD
    assert whole([NEARLY_BAD, BAD, GOOD]) == BAD


@pytest.mark.parametrize(
    ("reference", "ours"),
    [("tau", "tau"), ("theta[1]", "theta[0]"), ("a[10,2]", "a[9,1]"), ("zgp_1[3]", "zgp_1[2]")],
)
def test_names_of_references_count_from_one(reference, ours):
    assert from_zero(reference) == ours


def test_confusion_counts_verdicts_against_truth():
    judged = [
        ("green", GOOD),
        ("green", NEARLY_GOOD),
        ("green", NEARLY_BAD),
        ("amber", GOOD),
        ("red", BAD),
        ("red", BAD),
    ]
    confusion = Confusion(judged)
    assert confusion.count("green", bad=True) == 1
    assert confusion.count("green", bad=True, edge=False) == 0
    assert confusion.count(bad=True) == 3
    assert confusion.green_share == pytest.approx(2 / 3)
    assert confusion.cells() == ["2 (1 edge)", "1 (1 edge)", "1", "0", "0", "2", "0", "0"]
    assert math.isnan(Confusion([("red", BAD)]).green_share)


def test_moments_of_independent_draws_come_with_their_standard_errors():
    rng = np.random.default_rng(0)
    runs = [Moments.of(rng.normal(3.0, 2.0, (20, 200))) for _ in range(200)]
    means, sds = np.array([m.mean for m in runs]), np.array([m.sd for m in runs])
    # 200 runs know an sd to 5 %; three of these are allowed.
    assert np.mean([m.mean_se for m in runs]) == pytest.approx(means.std(), rel=0.15)
    assert np.mean([m.sd_se for m in runs]) == pytest.approx(sds.std(), rel=0.15)
    assert means.std() == pytest.approx(2.0 / math.sqrt(4000), rel=0.15)
    hidden = Moments.of(np.random.default_rng(0).normal(3.0, 2.0, (20, 200)), error=0.5)
    assert hidden.mean_se == pytest.approx(0.5 * hidden.sd, rel=0.01)


def test_strata_hold_one_draw_each_and_keep_far_tails():
    shares = strata(20, 500, 3, seed=1)
    assert shares.shape == (20, 500, 3)
    assert torch.equal((shares * 500).long().sort(1).values[3, :, 2], torch.arange(500))
    columns = (shares - 0.5).flatten(0, 1).T
    assert float(torch.corrcoef(columns).triu(1).abs().max()) < 0.05  # 5 standard errors
    # A log-normal whose mean 20 independent batches would know to 5 %.
    found = Moments.of(torch.special.ndtri(shares[..., 0]).mul(1.5).exp().numpy())
    assert found.mean == pytest.approx(math.exp(1.5**2 / 2), rel=0.02)
    assert abs(found.mean - math.exp(1.5**2 / 2)) < 4 * found.mean_se


def a_row(method="reverse", **numbers):
    parameters = {
        name: {"mean": 0.0, "mean_se": 0.01, "ratio": ratio, "ratio_se": 0.01, "quantiles": [0] * 3}
        for name, ratio in numbers.items()
    }
    return {"posterior": "a-b", "method": method, "seed": 0, "parameters": parameters}


def test_the_last_line_of_a_key_counts_and_a_line_cut_short_does_not(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert read(path) == {}
    lines = [json.dumps(a_row(tau=1.0)), json.dumps(a_row(tau=2.0)), json.dumps(a_row())[:20]]
    path.write_text("\n".join(lines))
    (row,) = read(path).values()
    assert truth(row) == BAD
    assert truth(a_row()) is None


def test_parameters_without_a_verdict_are_not_counted():
    row = a_row(tau=1.0, mu=2.0)
    row["parameters"]["mu"]["status"] = "green"
    ((_, name, status, error),) = judged_parameters([row])
    assert (name, status, error.truth) == ("mu", "green", BAD)
