"""Thresholds with a guarantee and probabilities of being right, against worlds that are known, scipy, scikit-learn."""

import doctest
import json

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss

from tests.benchmarks import coverage
from utils.cli import UserError
from utils.evaluation import selective
from utils.evaluation.selective import (
    brier,
    calibrate,
    choose_threshold,
    decide,
    expected_calibration_error,
    load_threshold,
    predict_right,
    split_queries,
)
from utils.files import save_json

FIGURES = {
    "threshold": selective.calibrated_threshold,
    "coverage": selective.coverage,
    "error": selective.error,
}


def guarantee(*arguments):
    """Threshold, coverage and error: a dict."""
    return {name: function(*arguments) for name, function in FIGURES.items()}


SETS, DELTA = 1000, 0.05
TOO_MANY = stats.binom.isf(
    1e-4, SETS, DELTA
)  # of sets: one test in 10,000 finds more where the guarantee holds


def test_the_examples_hold():
    assert doctest.testmod(selective).failed == 0


def draw(steps, rng, size=400):
    """Queries of a world whose answers of uncertainty u are wrong with probability u^2; u has so many values."""
    uncertainty = rng.random(size)
    if steps:
        uncertainty = np.ceil(uncertainty * steps) / steps
    return uncertainty, rng.random(size) < uncertainty**2


def true_error(threshold, steps):
    """Of the queries that are kept: the mean of u^2 up to the threshold."""
    if threshold is None:
        return 0.0
    kept = (
        np.arange(1, round(threshold * steps) + 1) / steps
        if steps
        else threshold * np.array([np.sqrt(1 / 3)])
    )
    return np.mean(kept**2)


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("risk", [0.1, 0.3])
def test_more_errors_than_allowed_are_as_rare_as_promised(steps, risk):
    rng = np.random.default_rng(0)
    thresholds = [choose_threshold(*draw(steps, rng), risk, 1 - DELTA) for _ in range(SETS)]
    errors = np.array([true_error(threshold, steps) for threshold in thresholds])
    assert (errors > risk + 1e-12).sum() <= TOO_MANY
    assert (
        sum(threshold is not None for threshold in thresholds) > 0.2 * SETS
    )  # not for want of thresholds
    if risk == 0.3 and not steps:
        assert np.mean(errors) > 0.6 * risk


def slow_threshold(uncertainty, is_wrong, risk, confidence):
    """Each sequence by itself, one threshold after another, by the quantile of a beta distribution."""
    starts = [start for start in (30, 60, 100, 150, 200) if start <= len(uncertainty)]
    reached = []
    for start in starts:
        for threshold in sorted(set(uncertainty.tolist())):
            kept = uncertainty <= threshold
            if kept.sum() < start:
                continue
            right = (kept & ~is_wrong).sum()
            level = 1 - (1 - confidence) / len(starts)
            if not right or stats.beta.ppf(level, (kept & is_wrong).sum() + 1, right) > risk:
                break
            reached.append(threshold)
    return max(reached, default=None)


@pytest.mark.parametrize("steps", [0, 9, 40])
@pytest.mark.parametrize(("risk", "confidence"), [(0.1, 0.95), (0.2, 0.9), (0.3, 0.99), (0.9, 0.5)])
def test_a_threshold_equals_a_plain_loops(steps, risk, confidence):
    found = []
    for seed in range(8):
        queries = draw(steps, np.random.default_rng(seed), 600)
        found.append(choose_threshold(*queries, risk, confidence))
        assert found[-1] == slow_threshold(*queries, risk, confidence)
    assert steps == 9 or any(found)


def test_nothing_qualifies_under_thirty_queries_or_where_all_are_wrong():
    assert choose_threshold(np.arange(29), np.zeros(29, bool), 0.3, 0.95) is None
    assert choose_threshold(np.arange(30), np.zeros(30, bool), 0.3, 0.95) == 29
    assert choose_threshold(np.arange(500), np.ones(500, bool), 0.3, 0.95) is None
    one_sure_error = np.arange(500) % 40 == 5  # which ends the sequence that starts at 30
    assert choose_threshold(np.arange(500), one_sure_error, 0.1, 0.95) == 499
    assert choose_threshold(np.arange(59), one_sure_error[:59], 0.05, 0.95) is None
    assert choose_threshold(np.zeros(500), np.arange(500) < 200, 0.3, 0.95) is None


def test_the_promise_is_kept_where_no_threshold_is_good_but_not_by_who_chooses_among_rows():
    assert coverage.broken_promises(1, 400) <= 0.05
    assert coverage.broken_promises(16, 100) > 0.15


@pytest.fixture
def captions():
    """Captions of 301 images, from one to five each, shuffled."""
    rng = np.random.default_rng(3)
    image = rng.permutation(np.repeat(np.arange(301) * 7, rng.integers(1, 6, 301)))
    uncertainty = rng.random(len(image))
    rank = np.where(rng.random(len(image)) < uncertainty**2, rng.integers(2, 9, len(image)), 1)
    return rank, uncertainty, image


def test_the_halves_share_no_image_and_every_image_weighs_the_same(captions):
    image = captions[2]
    calibrated, others, weight = split_queries(image)
    assert len(calibrated) == len(set(image[calibrated])) == 151
    assert not set(image[calibrated]) & set(image[others])
    assert set(image[calibrated]) | set(image[others]) == set(image)
    assert len(others) == np.isin(image, image[others]).sum()
    assert [weight[image[others] == one].sum() for one in set(image[others])] == pytest.approx(
        [1 / 150] * 150
    )
    of_images = split_queries(np.unique(image))
    assert set(np.unique(image)[of_images[0]]) == set(
        image[calibrated]
    )  # of the other direction, too


def test_which_caption_is_drawn_does_not_depend_on_its_place():
    image = np.repeat(np.arange(4000), 5)
    place = split_queries(image)[0] % 5
    assert stats.chisquare(np.bincount(place)).pvalue > 1e-3


@pytest.mark.parametrize("k", [1, 5])
def test_coverage_and_error_are_those_of_a_caption_drawn_from_an_image(captions, k):
    rank, uncertainty, image = captions
    found = guarantee(rank, uncertainty, image, 0.3, 0.9, k)
    calibrated, others, _ = split_queries(image)
    assert (
        found["threshold"]
        == slow_threshold(uncertainty[calibrated], rank[calibrated] > k, 0.3, 0.9)
        is not None
    )
    kept, wrong = [], []
    for one in set(image[others]):
        keeps = uncertainty[image == one] <= found["threshold"]
        kept.append(keeps.mean())
        wrong.append((keeps & (rank[image == one] > k)).mean())
    assert found["coverage"] == pytest.approx(np.mean(kept))
    assert found["error"] == pytest.approx(np.sum(wrong) / np.sum(kept))


def test_without_a_threshold_nothing_is_kept(captions):
    found = guarantee(np.full(len(captions[0]), 9), *captions[1:], 0.1, 0.95, 5)
    assert found == {"threshold": None, "coverage": 0.0, "error": None}
    assert decide(0.0, None) == "ask back"
    assert decide(np.float32([0.1, np.nan]), np.float32(0.1).item()) == ["keep", "ask back"]


def test_a_single_image_is_no_error():
    one = np.array([1, 2]), np.array([0.1, 0.2]), np.array([3, 3])
    assert guarantee(*one, 0.1, 0.95, 1) == {"threshold": None, "coverage": 0.0, "error": None}
    assert brier(one[0] == 1, *one[1:]) is None
    assert expected_calibration_error(one[0] == 1, *one[1:]) is None


@pytest.mark.parametrize("steps", [0, 7])
def test_probabilities_equal_scikit_learns(steps):
    uncertainty, is_wrong = draw(steps, np.random.default_rng(0), 300)
    at = np.linspace(-0.5, 1.5, 401)
    expected = (
        IsotonicRegression(increasing=False, out_of_bounds="clip")
        .fit(uncertainty, ~is_wrong)
        .predict(at)
    )
    np.testing.assert_allclose(calibrate(uncertainty, ~is_wrong)(at), expected, atol=1e-9)


def test_the_figures_of_calibration_equal_plain_ones(captions):
    rank, uncertainty, image = captions
    answers = rank == 1, uncertainty, image
    found = {"Brier": brier(*answers), "ECE": expected_calibration_error(*answers)}
    probability, right, weight = predict_right(rank == 1, uncertainty, image)
    assert found["Brier"] == pytest.approx(
        brier_score_loss(right, probability, sample_weight=weight)
    )
    ece = 0.0
    for low in range(15):
        inside = (probability >= low / 15) & ((probability < (low + 1) / 15) | (low == 14))
        if inside.any():
            gap = np.average(probability[inside], weights=weight[inside])
            gap -= np.average(right[inside], weights=weight[inside])
            ece += weight[inside].sum() * abs(gap)
    assert found["ECE"] == pytest.approx(ece)
    assert 0 < found["ECE"] < 0.2 < found["Brier"] + 0.1


def test_a_threshold_is_found_by_its_risk(tmp_path):
    path = tmp_path / "pfe.threshold.json"
    known = [
        {"risk": r, "k": k, "threshold": t}
        for r, k, t in ((0.1, 1, None), (0.2, 1, 0.5), (0.1, 5, 0.7))
    ]
    save_json({"guarantees": known, "confidence": 0.9}, path)
    assert load_threshold(path) is None
    assert load_threshold(path, 0.2) == 0.5
    assert load_threshold(path, 0.1, 5) == load_threshold(path, k=5) == 0.7
    with pytest.raises(UserError, match=r"--risk 0\.3"):
        load_threshold(path, 0.3)
    assert load_threshold(path, 0.2, confidence=0.9) == 0.5
    with pytest.raises(UserError, match=r"for --confidence 0\.9, not 0\.95"):
        load_threshold(path, 0.2, confidence=0.95)


@pytest.mark.parametrize("threshold", ["abc", True, float("nan"), [0.1], {"a": 1}, ...])
def test_a_threshold_that_is_no_number_is_refused(tmp_path, threshold):
    path, known = tmp_path / "pfe.threshold.json", {"risk": 0.1, "k": 1, "threshold": threshold}
    if threshold is ...:  # missing
        del known["threshold"]
    path.write_text(json.dumps({"guarantees": [known], "confidence": 0.95}))
    with pytest.raises(UserError, match=r"pfe.threshold.json: a threshold is .*not a number"):
        load_threshold(path)
    for content in ([], {}, {"guarantees": {}}, "abc"):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="not a file of thresholds"):
            load_threshold(path)
