"""Metrics against slow loops and closed forms, and the worked examples of their docstrings."""

import doctest
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from utils.evaluation import metrics, paper_table, ranking
from utils.evaluation.metrics import (
    aurc,
    auroc,
    excess_aurc,
    level_r2,
    level_score,
    level_spearman,
    partial_spearman,
    rank_values,
    recall_at,
    recall_by_level,
    share_of_ties,
    spearman,
    uncertainty_by_depth,
)


@pytest.mark.parametrize(("module", "least"), [(metrics, 16), (ranking, 6), (paper_table, 1)])
def test_docstring_examples_hold(module, least):
    result = doctest.testmod(module)
    assert result.attempted >= least
    assert result.failed == 0


@pytest.mark.parametrize("queries", [10, 11, 19, 100])
def test_levels_drop_no_query_and_differ_by_at_most_one(queries):
    rng = np.random.default_rng(queries)
    correct, uncertainty = rng.random(queries) < 0.5, rng.random(queries)
    order = sorted(range(queries), key=lambda q: (uncertainty[q], q))
    sizes = [queries // 10 + (k < queries % 10) for k in range(10)]
    expected, start = [], 0
    for size in sizes:
        expected.append(sum(bool(correct[q]) for q in order[start : start + size]) / size)
        start += size
    assert recall_by_level(correct, uncertainty, 10) == pytest.approx(expected)


def test_level_statistics_agree_with_scipy():
    recall = [0.9, 0.8, 0.85, 0.5, 0.3]
    assert level_spearman(recall) == pytest.approx(stats.spearmanr(range(5), recall).statistic)
    assert level_r2(recall) == pytest.approx(np.corrcoef(range(5), recall)[0, 1] ** 2)
    assert level_score(recall) == pytest.approx(-level_spearman(recall) * level_r2(recall))
    tied = [0.9, 0.8, 0.8, 0.5, 0.8]
    assert level_spearman(tied) == pytest.approx(stats.spearmanr(range(5), tied).statistic)


def test_constant_recall_or_uncertainty_is_undefined_and_not_nan():
    for recall in ([0.5, 0.5, 0.5], [0.5]):
        assert level_spearman(recall) is level_r2(recall) is level_score(recall) is None
    assert spearman(np.ones(5), np.arange(5)) is None
    assert partial_spearman(np.arange(5), np.arange(5), np.ones(5)) is None


def test_aurc_of_ties_is_the_mean_over_their_orders():
    rng = np.random.default_rng(1)
    correct, uncertainty = rng.random(30) < 0.6, rng.integers(0, 4, size=30)
    areas = []
    for _ in range(4000):
        order = np.lexsort((rng.random(30), uncertainty))
        error = 1.0 - correct[order]
        areas.append(np.mean([error[: n + 1].mean() for n in range(30)]))
    assert aurc(correct, uncertainty) == pytest.approx(
        np.mean(areas), abs=4 * np.std(areas) / np.sqrt(4000)
    )


def test_perfect_order_has_no_excess_area():
    correct = np.array([True] * 7 + [False] * 3)
    assert excess_aurc(aurc(correct, np.arange(10)), correct) == pytest.approx(0, abs=1e-12)
    assert excess_aurc(aurc(correct, -np.arange(10)), correct) > 0.3


@pytest.mark.parametrize("right", [0, 1, 7, 10])
def test_the_excess_area_is_over_the_area_of_the_sorted_answers(right):
    correct = np.arange(10) < right
    best = np.mean([np.mean(~correct[: n + 1]) for n in range(10)])
    assert excess_aurc(0.9, correct) == pytest.approx(0.9 - best if best < 0.9 else 0.0)


def test_partial_correlation_equals_that_of_rank_residuals():
    rng = np.random.default_rng(2)
    given = rng.normal(size=200)
    x, y = given + rng.normal(size=200), given + rng.normal(size=200)
    ranks = [stats.rankdata(v) for v in (x, y, given)]
    residuals = [r - np.polyval(np.polyfit(ranks[2], r, 1), ranks[2]) for r in ranks[:2]]
    assert partial_spearman(x, y, given) == pytest.approx(np.corrcoef(*residuals)[0, 1], abs=1e-9)


# Weights: how often each query counts.


@pytest.fixture(params=[False, True])
def weighted(request):
    """60 queries, with ties or without, and five weights of them, some of which are 0."""
    rng = np.random.default_rng(3)
    uncertainty = rng.integers(0, 12, 60) / 10 if request.param else rng.random(60)
    return rng.random(60) < 0.6, uncertainty, rng.random(60), rng.integers(0, 4, size=(5, 60))


def test_levels_by_spacing_equal_a_plain_loop_and_scipys_correlations():
    rng = np.random.default_rng(4)
    uncertainty = rng.standard_normal(300) ** 3  # the outer levels are empty or nearly so
    correct = rng.random(300) > 0.5 + 0.1 * uncertainty
    weights = rng.integers(0, 3, (4, 300))
    together = metrics.recall_by_level(correct, uncertainty, 10, weights, metrics.SPACING)
    for weight, found in zip([np.ones(300, int), *weights], [None, *together], strict=True):
        if found is None:
            found = metrics.recall_by_level(correct, uncertainty, 10, by=metrics.SPACING)
        width = np.ptp(uncertainty) / 10
        expected = []
        for level in range(10):
            low = uncertainty.min() + level * width
            inside = (uncertainty >= low) & ((uncertainty < low + width) | (level == 9))
            has_query = (weight * inside).any()
            expected.append(np.average(correct, weights=weight * inside) if has_query else np.nan)
        np.testing.assert_allclose(found, expected)
        known = np.flatnonzero(~np.isnan(expected))
        assert 2 < len(known) < 10
        values = np.array(expected)[known]
        spearman = stats.spearmanr(known, values).statistic
        assert metrics.level_spearman(found) == pytest.approx(spearman)
        assert metrics.level_r2(found) == pytest.approx(
            stats.pearsonr(known, values).statistic ** 2
        )


def test_a_weighted_metric_is_that_of_repeated_queries(weighted):
    correct, x, y, weights = weighted
    for function, columns in (
        (metrics.mean, (y,)),
        (partial(recall_at, k=3), (1 + 10 * y,)),
        (partial(recall_by_level, levels=7), (correct, x)),
        (spearman, (x, y)),
        (partial_spearman, (x, y, x + y)),
        (partial(excess_aurc, 0.8), (correct,)),
    ):
        together = function(*columns, weight=weights)
        for weight, value in zip(weights, together, strict=True):
            repeated = function(*(np.repeat(column, weight) for column in columns))
            assert value == pytest.approx(repeated, abs=1e-12)
            assert function(*columns, weight=weight) == pytest.approx(repeated, abs=1e-12)


def test_the_weighted_area_equals_a_plain_loop_and_is_near_that_of_repeated_queries(weighted):
    correct, uncertainty, _, weights = weighted
    for weight, area in zip(weights, aurc(correct, uncertainty, weights), strict=True):
        areas = []
        for _ in range(2000):  # over orders of the tied queries
            order = np.lexsort((np.random.default_rng(len(areas)).random(60), uncertainty))
            w, wrong = weight[order], weight[order] * ~correct[order]
            risk = np.cumsum(wrong) / np.maximum(np.cumsum(w), 1)
            areas.append(np.sum(w * risk) / np.sum(w))
        error = 5 * np.std(areas) / np.sqrt(len(areas))
        tied = len(np.unique(uncertainty)) < 60
        assert area == pytest.approx(np.mean(areas), abs=0.02 if tied else 1e-12 + error)
        repeated = aurc(np.repeat(correct, weight), np.repeat(uncertainty, weight))
        assert area == pytest.approx(repeated, abs=0.03)


def test_a_weight_of_one_changes_nothing(weighted):
    correct, x, y, _ = weighted
    ones = np.ones(60)
    assert aurc(correct, x, ones) == aurc(correct, x)
    assert recall_by_level(correct, x, 7, ones) == recall_by_level(correct, x, 7)
    assert spearman(x, y, ones) == spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    np.testing.assert_allclose(rank_values(x), stats.rankdata(x))


def test_what_is_undefined_in_one_weight_is_nan_there_alone():
    weights = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    found = spearman([1.0, 1.0, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0], weights)
    assert np.isnan(found).tolist() == [True, False]


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_equals_scikit_learns(ties):
    rng = np.random.default_rng(0)
    wrong, uncertainty = (
        rng.random(60) < 0.8,
        rng.integers(0, 12, 60) / 10 if ties else rng.random(60),
    )
    assert auroc(~wrong, uncertainty) == pytest.approx(roc_auc_score(wrong, uncertainty))


def test_auroc_without_errors_is_undefined():
    assert auroc(np.array([True, True]), np.array([0.1, 0.2])) is None


def test_ties_are_the_queries_that_share_their_uncertainty():
    values = [3, 1, 3, 2, 3, 1, 5]
    assert share_of_ties(np.array(values)) == pytest.approx(
        sum(values.count(v) > 1 for v in values) / len(values)
    )


def test_depth_is_averaged_over_the_chains_that_reach_it():
    uncertainty = np.array([0.4, 0.3, 0.2, 0.1])
    assert uncertainty_by_depth(uncertainty, [[0, 1, 3], [1, 2]]) == [87.5, 62.5, 25.0]
